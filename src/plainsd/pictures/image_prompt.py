"""Pictures as prompts, through IP-Adapters (models/image_prompt.py).

An image encoder encodes each picture once; the adapter projects that to tokens, and these to extra keys and values for
each cross-attention. Uncond rows get the tokens of a vector of zeros, or with "plus" and "full" adapters those of a
picture of zeros.

Shape letters: R rows of the batch, K pictures of one prompt, M tokens, T width of the text, D of a cross-attention, N
positions of a level.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError
from plainsd.models.image_prompt import ImageAdapter, ImageAdapterConfig, attentions_of, tower_fits, width_read
from plainsd.models.layers import Beside
from plainsd.models.unet import EachBeside, UNet
from plainsd.models.vision import VisionStates, VisionTower
from plainsd.pictures.control import acts_between, dtype_of
from plainsd.pictures.control_checks import check_range, check_strength, family
from plainsd.pictures.images import to_rgb
from plainsd.pictures.model import StableDiffusion, moved
from plainsd.pictures.settings import ImagePromptNote

LONGEST = 64  # times the shorter side: what is longer is not scaled whole, only to be cut to a square
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, eq=False)
class ImageReader:
    """An IP-Adapter and its image encoder."""

    adapter: ImageAdapter
    tower: VisionTower

    def __post_init__(self) -> None:
        own, its = self.tower.config, self.adapter.config
        if not tower_fits(own, its):
            raise UserError(
                f"the image encoder does not fit the adapter: it gives {width_read(own, its)} numbers and the adapter "
                f"reads {its.states}; choose {encoder_of(its)}",
                field="image_encoder",
            )


TOWERS = {  # by whether the projected vector is used, and its width: those of public adapters
    (True, 1024): "OpenCLIP's ViT-H/14",
    (True, 1280): "OpenCLIP's ViT-bigG/14",
    (False, 1280): "OpenCLIP's ViT-H/14",
    (False, 1664): "OpenCLIP's ViT-bigG/14",
}


def encoder_of(adapter: ImageAdapterConfig) -> str:
    """The name of the tower that a public adapter of these sizes was trained with."""
    return TOWERS.get((adapter.kind == "base", adapter.states), "the tower it was trained with")


@dataclass(frozen=True, eq=False)
class ImagePrompt:
    """Pictures to use as a prompt, of any mode and size. `mask`: they act where it is light (scaled to the result's
    size); several masks are one for each picture."""

    adapter: ImageReader
    image: Image.Image | Sequence[Image.Image]
    strength: float = 1.0
    mask: Image.Image | Sequence[Image.Image] | None = None
    start: float = 0.0  # from this fraction of the steps ...
    end: float = 1.0  # ... to this: as of a Control
    name: str = "image prompt"  # of the adapter, for the metadata
    _read: dict = field(init=False, default_factory=dict, repr=False)  # tokens, by device and dtype

    @property
    def images(self) -> list[Image.Image]:
        return [self.image] if isinstance(self.image, Image.Image) else list(self.image)

    @property
    def masks(self) -> list[Image.Image]:
        """Empty, one for all pictures, or one for each."""
        return [] if self.mask is None else [self.mask] if isinstance(self.mask, Image.Image) else list(self.mask)

    @property
    def note(self) -> ImagePromptNote:
        return ImagePromptNote(
            self.name, float(self.strength), len(self.images), len(self.masks), float(self.start), float(self.end)
        )

    def acts(self, step: int, steps: int) -> bool:
        return acts_between(self.start, self.end, step, steps)

    def tokens(self, device: torch.device) -> Tensor:
        """(2, K, M, T): uncond tokens, and those of each picture, in the adapter's dtype. Moves both networks to the
        device, in place."""
        adapter = moved(self.adapter.adapter, device)  # it projects the tokens, also those read before
        own = dtype_of(adapter)
        if (device, own) not in self._read:
            tower = moved(self.adapter.tower, device)
            pixels = torch.cat([clip_pixels(image, tower.config.size) for image in self.images])
            pixels = pixels.to(device, dtype_of(tower))
            states = as_dtype(tower(pixels), own)
            black = as_dtype(tower(torch.zeros_like(pixels[:1])), own) if adapter.config.kind != "base" else states
            nothing = adapter.nothing(states, black).expand(len(pixels), -1, -1)
            self._read[device, own] = torch.stack([nothing, adapter.read(states)])
        return self._read[device, own]


def as_dtype(states: VisionStates, dtype: torch.dtype) -> VisionStates:
    return VisionStates([state.to(dtype) for state in states.hidden], states.embeds.to(dtype))


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """CLIP's image preprocessing: shorter side scaled to `size`, centre crop, normalised. (1, 3, size, size)."""
    image = to_rgb(image)
    short, long = sorted(image.size)
    if long > LONGEST * short:  # the rest of a strip is cut off below
        left, top = ((side - min(side, LONGEST * short)) // 2 for side in image.size)
        image = image.crop((left, top, image.width - left, image.height - top))
        short, long = sorted(image.size)
    wider = int(size * long / short)
    image = image.resize((wider, size) if image.width >= image.height else (size, wider), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    levels = np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.float64) / 255
    normal = (levels - CLIP_MEAN) / CLIP_STD
    return torch.from_numpy(normal).permute(2, 0, 1)[None].float()


# --- checks ----------------------------------------------------------------------------------------------------------


def check_image_prompts(sd: StableDiffusion, prompts: Sequence[ImagePrompt]) -> tuple[ImagePromptNote, ...]:
    """Notes for the pictures' metadata. UserError for what does not fit."""
    for number, prompt in enumerate(prompts, 1):
        which = f"image prompt {number} ({prompt.name})" if len(prompts) > 1 else f"image prompt {prompt.name!r}"
        try:
            _check_image_prompt(sd, prompt, which)
        except UserError as error:
            error.entry = number - 1
            raise
    return tuple(prompt.note for prompt in prompts)


def _check_image_prompt(sd: StableDiffusion, prompt: ImagePrompt, which: str) -> None:
    check_strength(prompt.strength, which, "image_prompt")
    check_range(prompt.start, prompt.end, which, "image_prompt")
    if not prompt.images:
        raise UserError(f"{which} has no picture; give one or more", field="image_prompt")
    if len(prompt.masks) not in (0, 1, len(prompt.images)):
        what = f"{len(prompt.masks)} masks and {len(prompt.images)} pictures"
        raise UserError(f"{which} has {what}; give one mask for all, or one for each", field="image_prompt")
    if reason := image_mismatch(prompt.adapter.adapter, sd):
        raise UserError(f"{which} does not fit the model: {reason}; choose one of its family", field="image_prompt")


def image_mismatch(adapter: ImageAdapter, sd: StableDiffusion) -> str | None:
    """Why the adapter cannot speak to this model's UNet; None: it can."""
    own, its = sd.unet.config, adapter.config
    if its.context != own.context:
        return f"it is beside texts of {its.context} numbers, and {family(own)}'s are {own.context}"
    widths = widths_of(sd.unet)
    if its.widths != widths:
        return (
            f"it has {len(its.widths)} pairs of projections, and {family(own)} asks for {len(widths)} of other widths"
        )
    return None


def widths_of(unet: UNet) -> tuple[int, ...]:
    """The width of each cross-attention, in the order of an adapter's file."""
    blocks = [*unet.down, *unet.up, unet.mid]
    return tuple(block.attn.norm.num_channels for block in blocks for _ in attentions_of(block))


# --- at each step ----------------------------------------------------------------------------------------------------


class ImagePrompts:
    """All image prompts of one run. Keys and values are computed once, for all steps."""

    def __init__(
        self,
        sd: StableDiffusion,
        prompts: Sequence[ImagePrompt],
        size: tuple[int, int],
        steps: int,
        shown: tuple[int, int] | None = None,
    ):
        """`size`: width and height in pixels of what is drawn; `shown`: of the picture that is cut out of it, if not
        all."""
        self.unet, self.steps, self.dtype = sd.unet, steps, sd.dtype
        places = level_sizes(sd.unet, (size[1] // sd.vae.config.factor, size[0] // sd.vae.config.factor))
        self.prompts = [prompt for prompt in prompts if prompt.strength]
        self.each = [self.read(p, p.tokens(sd.device), places, size, shown or size) for p in self.prompts]
        self.batches: dict[tuple[tuple[bool, ...], tuple[bool, ...]], list[EachBeside]] = {}

    def read(
        self,
        prompt: ImagePrompt,
        tokens: Tensor,
        places: list[tuple[int, int]],
        size: tuple[int, int],
        shown: tuple[int, int],
    ) -> list[list[Beside]]:
        """Keys and values for each cross-attention, in the order of an adapter's file.

        Pictures without masks, or with one mask for all, are attended to together; else one by one, as in diffusers'
        pipelines."""
        around = (0, size[0] - shown[0], 0, size[1] - shown[1])
        masks = [F.pad(light(mask, shown), around, mode="replicate").to(tokens) for mask in prompt.masks]
        layers: list[list[Beside]] = [[] for _ in places]
        each = len(masks) > 1
        for number in range(len(prompt.images) if each else 1):
            some = tokens[:, number] if each else tokens.flatten(1, 2)  # (2, M, T) or (2, K M, T)
            where = masks[number] if masks else None
            for layer, place, (k, v) in zip(layers, places, prompt.adapter.adapter(some), strict=True):
                acts = None if where is None else shrunk(where, place).to(self.dtype)
                layer.append(Beside(k.to(self.dtype), (v * prompt.strength).to(self.dtype), acts))
        return layers

    def __call__(self, step: int, prompted: Sequence[bool], *rest) -> dict[str, list[EachBeside]]:
        """The UNet's extra arguments. `prompted`: whether each row has its prompt."""
        acting = tuple(prompt.acts(step, self.steps) for prompt in self.prompts)
        if not any(acting):
            return {}
        key = tuple(prompted), acting
        if key not in self.batches:
            rows = [int(one) for one in prompted]
            some = [layers for layers, acts in zip(self.each, acting, strict=True) if acts]
            together = [[one for each in layers for one in each] for layers in zip(*some, strict=True)]
            layers = [[Beside(k[rows], v[rows], where) for k, v, where in layer] for layer in together]
            self.batches[key] = by_block(self.unet, layers)
        return {"beside": self.batches[key]}


def by_block(unet: UNet, layers: Sequence[Sequence[Beside]]) -> list[EachBeside]:
    """From the order of an adapter's file (down, up, middle) to the UNet's, one list per block."""
    following = iter(layers)
    down, up, mid = (
        [[next(following) for _ in attentions_of(block)] for block in part] for part in (unet.down, unet.up, [unet.mid])
    )
    return [*down, *mid, *up]


def level_sizes(unet: UNet, size: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width of each cross-attention's input for latents of this size, in the order of an adapter's file."""
    sizes, found = [size], []
    for block in unet.down:
        found += [sizes[-1] for _ in attentions_of(block)]
        if block.resample is not None:
            height, width = sizes[-1]
            sizes.append((-(-height // 2), -(-width // 2)))
    for place, block in enumerate(unet.up):
        found += [sizes[-1 - place // (unet.config.layers + 1)] for _ in attentions_of(block)]
    return found + [sizes[-1] for _ in attentions_of(unet.mid)]


def light(mask: Image.Image, size: tuple[int, int]) -> Tensor:
    """1 where a mask is light, 0 elsewhere: (1, 1, H, W)."""
    grey = to_rgb(mask, background="black").convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.LANCZOS)
    return (torch.from_numpy(np.array(grey))[None, None] >= 127.5).float()


def shrunk(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """(1, 1, H, W) -> (N, 1) at a level of this size, by bicubic scaling."""
    return F.interpolate(mask, size=size, mode="bicubic").flatten()[:, None]
