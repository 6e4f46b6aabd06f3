"""ControlNet: a copy of the UNet's way down that reads a map beside the latent, and says what to add to the UNet.

Zhang et al. 2023 (arXiv:2302.05543). The map (edges, a pose, depth) is brought down to the size of the latent by a
small network of convolutions and added to what `conv_in` makes of the latent. The copy's outputs pass 1x1 convolutions
that begin at zero, so that a new net changes nothing; what comes out is the `residuals` of `UNet.forward`. A union net
(xinsir 2024, ControlNet++) is one for several kinds of maps, and is told which.

Shape letters: B batch, C channels, H W latent height and width, f pixels a latent, M text tokens, T text width, E width
of the time embedding, V width of SDXL's vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.errors import UserError
from plainsd.models.clip import quick_gelu
from plainsd.models.layers import Attention, timestep_embedding
from plainsd.models.unet import UNet, UNetConfig, WayDown, embedding_mlp

KIND_SINUSOID = 256  # numbers that stand for each kind of a union net's maps, given or not
UNION_HEADS = 8


@dataclass(frozen=True)
class ControlConfig:
    """SD 1.x's numbers by default (361,279,120 parameters)."""

    unet: UNetConfig = UNetConfig()  # of its way down and middle; the rest is not looked at
    hint: tuple[int, ...] = (16, 32, 96, 256)  # widths that bring a map down; f = 2 ** (their count - 1)
    hint_channels: int = 3
    bgr: bool = False  # reads a map's channels in this order
    pooled: bool = False  # each residual is its mean over all positions ("shuffle")
    kinds: int = 0  # of maps that a union net knows; 0: it is a net for one

    @property
    def factor(self) -> int:
        return 2 ** (len(self.hint) - 1)


class Hint(nn.Sequential):
    """3x3 convolutions with SiLU between them, of which every second one halves the map; the last begins at zero.
    (B, 3, f H, f W), 0 to 1 -> (B, C, H, W)."""

    def __init__(self, config: ControlConfig):
        widths = config.hint
        convs = [nn.Conv2d(config.hint_channels, widths[0], 3, padding=1)]
        for width, wider in zip(widths, widths[1:], strict=False):
            convs += [nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, wider, 3, padding=1, stride=2)]
        super().__init__(*convs, zeroed(nn.Conv2d(widths[-1], config.unet.channels[0], 3, padding=1)))

    def forward(self, x: Tensor) -> Tensor:
        *convs, last = self
        for conv in convs:
            x = F.silu(conv(x))
        return last(x)


class Union(nn.Module):
    """What a union net has beside a ControlNet: it knows the kind of each map.

    From a map's mean and its kind a transformer block makes a vector that is added to the whole map. In the published
    code that block's attention goes along the batch, not along the maps; the vectors of one picture's rows, with and
    without prompt, are equal there, so each finds nothing but its own value. So it does here whatever else is in the
    batch, and the latent's vector, which stands beside the maps', has no effect at all.
    """

    def __init__(self, config: ControlConfig):
        super().__init__()
        dim = config.unet.channels[0]
        self.kind = nn.Embedding(config.kinds, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, UNION_HEADS, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.shift = zeroed(nn.Linear(dim, dim))
        self.time = embedding_mlp(KIND_SINUSOID * config.kinds, 4 * dim)

    def embed(self, kinds: Sequence[int]) -> Tensor:
        """Which kinds are given, beside the timestep: (1, E)."""
        on = torch.zeros(len(self.kind.weight), device=self.kind.weight.device)
        on[list(kinds)] = 1
        return self.time(timestep_embedding(on, KIND_SINUSOID).flatten()[None].to(self.kind.weight))

    def forward(self, hint: Tensor, kind: int, share: float) -> Tensor:
        """One map, `share` of it: (B, C, H, W) -> (B, C, H, W)."""
        hint = share * hint
        x = hint.mean((2, 3)) + share * self.kind.weight[kind]
        x = x + self.attn.out(self.attn.v(self.norm1(x)))
        x = x + self.fc2(quick_gelu(self.fc1(self.norm2(x))))
        return hint + share * self.shift(x)[..., None, None]


class ControlNet(WayDown):
    """x (B, C_in, H, W), timestep () or (B,), context (B, M, T), hint (1 or B, C, H, W) from `read`, vector (B, V) ->
    the residuals: one for conv_in's output, one for each block of the way down, the last for the middle's.

    `kinds`: of a union net's maps.
    """

    def __init__(self, config: ControlConfig):
        super().__init__(config.unet)
        self.control = config
        self.hint = Hint(config)
        self.union = Union(config) if config.kinds else None
        widths = [*self.widths, config.unet.channels[-1]]
        self.zero = nn.ModuleList(zeroed(nn.Conv2d(width, width, 1)) for width in widths)

    def read(self, maps: Sequence[Tensor], kinds: Sequence[int] = (), share: float = 1.0) -> Tensor:
        """What is added to conv_in's output, the same at every step: maps (1 or B, 3, f H, f W), 0 to 1 -> (1 or B, C,
        H, W). A union net takes several, each of a kind, and `share` of each."""
        hints = [self.hint(one.flip(1) if self.control.bgr else one) for one in maps]
        if self.union is None:
            (hint,) = hints
            return hint
        return sum((self.union(*pair, share) for pair in zip(hints, kinds, strict=True)), torch.zeros_like(hints[0]))

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | float,
        context: Tensor,
        hint: Tensor,
        vector: Tensor | None = None,
        kinds: Sequence[int] = (),
    ) -> list[Tensor]:
        emb = self.embed(timestep, x, vector, None)
        if self.union is not None:
            emb = emb + self.union.embed(kinds)
        outputs = [x := self.conv_in(x) + hint]
        for block in self.down:
            outputs.append(x := block(x, emb, context))
        outputs.append(self.mid(x, emb, context))
        found = [conv(output) for conv, output in zip(self.zero, outputs, strict=True)]
        return [each.mean((2, 3), keepdim=True) for each in found] if self.control.pooled else found


def zeroed(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def hint_widths(factor: int) -> tuple[int, ...]:
    """Widths of the convolutions that bring a map down by a VAE's factor: SD's, the last one again and again beyond."""
    widths, halvings = ControlConfig.hint, factor.bit_length() - 1
    return (widths + widths[-1:] * halvings)[: halvings + 1]


def control_of(unet: UNet, hint: Sequence[int] = ControlConfig.hint) -> ControlNet:
    """A new net for a UNet, which does not change it yet: the weights of its way down and middle are copied."""
    if unet.config.in_channels != unet.config.out_channels:
        raise UserError("a ControlNet reads latents alone; make it of the model that this one was made from")
    net = ControlNet(ControlConfig(way_down(unet.config), tuple(hint)))
    own, theirs = net.state_dict(), unet.state_dict()
    net.load_state_dict({name: theirs.get(name, tensor) for name, tensor in own.items()})
    return net.to(unet.conv_in.weight)


def way_down(config: UNetConfig) -> UNetConfig:
    """What of a UNet's config a ControlNet has."""
    return replace(config, up_depth=None, out_channels=config.in_channels, guidance_dim=None)
