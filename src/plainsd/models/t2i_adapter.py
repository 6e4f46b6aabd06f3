"""T2I-Adapter: a small network that reads a map once, and gives features for each level of the UNet's way down.

Mou et al. 2023 (arXiv:2302.08453). Pixels are folded into channels; then come two residual blocks a level. The features
are added to the outputs of the UNet's way down: the `features` of `UNet.forward`.

Shape letters: B batch, C channels of a level, H W height and width of the map in pixels, f pixels a side folded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from plainsd.models.unet import UNet

SLIM = 4  # times that a light block is narrower inside


@dataclass(frozen=True)
class AdapterConfig:
    """SD 1.x's full adapter by default (77,369,280 parameters)."""

    kind: str = "full"  # or "xl", "light"
    channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers: int = 2  # residual blocks a level
    hint_channels: int = 3  # of a map; 1: grey
    factor: int = 8  # f; SDXL's 16

    @property
    def halved(self) -> tuple[bool, ...]:
        """Which levels begin with a halving. SDXL's third alone."""
        return tuple(level == 2 if self.kind == "xl" else level > 0 for level in range(len(self.channels)))


class AdapterBlock(nn.Module):
    """x plus two convolutions of it. (B, C, H, W) -> (B, C, H, W). `side` of the second one: 1, in light adapters 3."""

    def __init__(self, channels: int, side: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, side, padding=side // 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(x)))


class AdapterLevel(nn.Module):
    """Halved, brought to a width, refined, and in light adapters brought to the level's width only then."""

    def __init__(self, config: AdapterConfig, c_in: int, c_out: int, halved: bool):
        super().__init__()
        light = config.kind == "light"
        inner = c_out // SLIM if light else c_out
        self.halved = halved
        self.proj_in = nn.Conv2d(c_in, inner, 1) if light or c_in != inner else nn.Identity()
        self.blocks = nn.ModuleList(AdapterBlock(inner, 3 if light else 1) for _ in range(config.layers))
        self.proj_out = nn.Conv2d(inner, c_out, 1) if light else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if self.halved:
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        x = self.proj_in(x)
        for block in self.blocks:
            x = block(x)
        return self.proj_out(x)


class T2IAdapter(nn.Module):
    """A map (B, 3, H, W), 0 to 1, both sides multiples of f -> a feature for each level, (B, C, H / f, W / f) and
    less."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        folded, first = config.hint_channels * config.factor**2, config.channels[0]
        light = config.kind == "light"
        self.conv_in = nn.Identity() if light else nn.Conv2d(folded, first, 3, padding=1)
        widths = (folded if light else first, *config.channels)
        self.levels = nn.ModuleList(
            AdapterLevel(config, *pair, halved)
            for pair, halved in zip(zip(widths, config.channels, strict=False), config.halved, strict=True)
        )

    def forward(self, map: Tensor) -> list[Tensor]:
        x = self.conv_in(F.pixel_unshuffle(map, self.config.factor))
        return [x := level(x) for level in self.levels]


def feature_places(unet: UNet) -> list[int]:
    """Where a UNet's features join it, counted from conv_in's output: after the last block of each level before it is
    halved; of a level that does not attend, after that (it has it of diffusers' blocks); at last the middle, if any."""
    config, found = unet.config, []
    for level, depth in enumerate(config.depth):
        halving = (level + 1) * (config.layers + 1)
        last = level == len(config.depth) - 1
        found.append(halving if not depth and not last else halving - 1)
    return [*found, len(unet.down) + 1] if config.mid_depth is not None else found


def as_features(unet: UNet, each: Sequence[Tensor]) -> list[Tensor | None]:
    """An adapter's features as `UNet.forward` takes them. Those past the levels belong to the middle."""
    features: list[Tensor | None] = [None] * (len(unet.down) + 2)
    for place, feature in zip(feature_places(unet), each, strict=False):
        features[place] = feature
    return features
