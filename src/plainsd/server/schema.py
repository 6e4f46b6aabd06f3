"""The request models."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr

from plainsd.pictures.settings import MASK_OPTIONS, RANDOM
from plainsd.text.prompts import LoraTag

UNSOUND = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")  # surrogates stand alone in Python's strings


def clean(text: str) -> str:
    """Valid text: no lone surrogates, no control characters except line breaks and tabs."""
    if UNSOUND.search(text):
        raise ValueError("has control characters or broken Unicode; take them out")
    return text


MAX_NAME = 1000  # characters; a name may be a path below a folder
Text = Annotated[str, AfterValidator(clean)]
Name = Annotated[str, Field(max_length=MAX_NAME), AfterValidator(clean)]

Seed = Annotated[int, BeforeValidator(lambda value: RANDOM if value == "random" else value)]
Side = Annotated[int, Field(ge=0, le=65536)]


class LoRA(BaseModel):
    """A LoRA from the server's folder, and its strengths."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: Name
    strength: float = Field(1.0, ge=-10, le=10)
    text_strength: float | None = Field(None, ge=-10, le=10, description="on the text encoders; none: the same")

    def as_tag(self) -> LoraTag:
        return LoraTag(self.name, self.strength, self.strength if self.text_strength is None else self.text_strength)


class Preprocessing(BaseModel):
    """How a control map is made of a picture."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    preprocess: Name = Field(
        "none",
        description="none, canny or inpaint: of the image drawn over, -1 under its mask. With a mask, and no image "
        "here, none is inpaint",
    )
    low: float = Field(100, ge=0, le=1e4, description="canny's thresholds")
    high: float = Field(200, ge=0, le=1e4)
    resolution: int | None = Field(None, ge=64, le=2048, description="of the shorter side, before it is preprocessed")


class MapRequest(Preprocessing):
    """A picture, and how a control map is made of it."""

    image: Text = Field(description="a picture in base64")


class UnitRequest(BaseModel):
    """What controls and image prompts share."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    name: Name = Field(description="of a file or folder in the server's folder")
    strength: float = Field(1.0, ge=0, le=10)
    start: float = Field(0.0, ge=0, le=1, description="start, as a fraction of the steps")
    end: float = Field(1.0, ge=0, le=1, description="end, as a fraction of the steps")
    _label: str | None = PrivateAttr(None)

    @property
    def label(self) -> str | None:
        """How error messages name it; None: by its place in the request."""
        return self._label

    def labelled(self, label: str) -> Self:
        self._label = label
        return self


class ControlRequest(UnitRequest, Preprocessing):
    """A ControlNet or T2I-Adapter, and the map that it reads."""

    image: Text | None = Field(
        None,
        description="a picture in base64: the map, or what `preprocess` makes one of; none: the image drawn over",
    )
    guess: bool = Field(False, description="prompted rows only, less for finer parts")
    mode: Name = Field("balanced", description="balanced, prompt or control: which is more important, as in A1111")
    kind: list[int] = Field([], max_length=1, description="of the map, for a net of several kinds (union), from 0")
    resize: Literal["stretch", "crop", "fill"] = Field(
        "stretch", description="what is done with a map of another shape than the picture, whose size it gets"
    )
    _pixel_perfect: bool = PrivateAttr(False)

    @property
    def pixel_perfect(self) -> bool:
        """Of A1111's units: `resolution` follows from the picture that is drawn."""
        return self._pixel_perfect

    @pixel_perfect.setter
    def pixel_perfect(self, is_it: bool) -> None:
        self._pixel_perfect = is_it


class ImagePromptRequest(UnitRequest):
    """An IP-Adapter, and the pictures that it reads."""

    images: list[Text] = Field(min_length=1, max_length=16, description="pictures in base64")
    masks: list[Text] = Field(
        [], max_length=16, description="in base64; a picture acts where its mask is light. One for all, or one for each"
    )
    encoder: Name | None = Field(None, description="its image encoder, by name; none: the first that fits")


class Axis(BaseModel):
    """One side of an X/Y grid."""

    model_config = ConfigDict(extra="forbid")
    name: Name = Field(description="a setting, such as guidance, steps, seed or sampler")
    values: list[Name | bool | int | float] = Field(min_length=1)


class JobRequest(BaseModel):
    """Pictures to generate. Omitted fields take the model's defaults."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"prompt": "a red apple", "count": 2}]})

    prompt: Text = Field(
        "", description="the prompt; {red|blue} and __wildcards__ are resolved for each picture by its seed"
    )
    negative: Text = Field("", description="negative prompt")
    settled: list[Literal["prompt", "negative", "hires_prompt", "hires_negative"]] = Field(
        [],
        max_length=4,
        description="prompts whose choices are made already, such as a picture's: they stay as they are",
    )
    styles: list[Name] = Field([], max_length=32, description="names of styles to apply to prompt and negative prompt")
    model: Name | None = Field(None, description="one of GET /api/models")
    size: tuple[int, int] | None = Field(
        None, description="width and height in pixels, multiples of 8 (16 for the embedded model)"
    )
    steps: int | None = None
    guidance: float | None = Field(
        None, description="guidance scale (CFG); 1, and 0 too, turns it off, without the negative prompt"
    )
    image_guidance: float | None = Field(None, description="image guidance scale, of editing models (InstructPix2Pix)")
    like: Name | None = Field(
        None, description="diffusers, a1111 or comfyui: reproduce what that program makes of the same settings"
    )
    sampler: Name | None = None
    spacing: Name | None = Field(None, description="of the noise levels")
    seed: Seed | None = Field(
        None,
        description="of the first picture, the following have the next; none, -1 or random: any. Of one above "
        "2**32 - 1 the low 32 bits count",
    )
    noise: Name | None = Field(
        None, description="whose random numbers: cpu (PyTorch's), nv (an NVIDIA GPU's, on any device), comfyui"
    )
    ensd: int | None = Field(None, description="A1111's eta noise seed delta: added to the seed for noise on the way")
    seed_resize: tuple[int, int] | None = Field(
        None, description="the first noise is that of a picture of this size, in the middle of this one's"
    )
    batch_index: int | None = Field(None, description="with noise comfyui: which one of a batch the first picture is")
    batch_size: int | None = Field(None, description="and how many pictures that batch has")
    count: int = Field(1, description="pictures")
    loras: list[LoRA] = Field([], max_length=32)
    controls: list[ControlRequest] = Field([], max_length=4, description="maps to follow")
    image_prompts: list[ImagePromptRequest] = Field([], max_length=4, description="pictures used as prompts")
    embeddings: list[Name] = Field(
        [],
        max_length=32,
        description="embeddings that the prompts require, by word; others are used if their word occurs",
    )
    refiner: Name | None = Field(None, description="another model, for the last steps")
    handover: float | None = Field(None, description="fraction of the timesteps after which the refiner takes over")
    image: Text | None = Field(None, description="a PNG, JPEG or WebP file in base64, for image to image")
    strength: float | None = Field(None, description="denoising strength: fraction of the steps that run")
    mask: Text | None = Field(None, description="a picture of the same size in base64; its light part is repainted")
    outpaint: tuple[Side, Side, Side, Side] | None = Field(
        None, description="pixels to add to the picture at its left, top, right and bottom"
    )
    mask_blur: float = Field(0, ge=0, le=64, allow_inf_nan=False, description="blurs the mask's edge, in pixels")
    mask_grow: int | None = Field(None, description="grows the mask by this many pixels; a negative value shrinks it")
    masked_padding: int | None = Field(
        None, description="inpaints only the masked area plus this margin, at the full size"
    )
    masked_content: Name | None = Field(
        None, description="initial content under the mask: original, fill, noise or nothing"
    )
    soft_mask: bool = Field(False, description="grey levels of the mask set how early each pixel starts to change")
    hires: float | None = Field(None, description="hires fix: a second pass on the picture enlarged by this factor")
    upscaler: Name | None = Field(None, description="upscaler of the hires pass, one of `upscalers` in GET /api/info")
    hires_steps: int | None = Field(
        None, description="steps of the second pass, all of which run; none: `strength` times `steps`"
    )
    hires_sampler: Name | None = Field(None, description="sampler of the second pass; likewise the following")
    hires_spacing: Name | None = None
    hires_prompt: Text | None = None
    hires_negative: Text | None = None
    hires_guidance: float | None = None
    variation_seed: Seed | None = Field(None, description="likewise; but none: no variation")
    variation_strength: float | None = None
    clip_skip: int | None = None
    eta: float | None = None
    rescale: float | None = None
    interval: tuple[float, float] | None = None
    perturbed: float | None = None
    threshold: float | None = None
    apg: float | None = None
    apg_parallel: float | None = None
    apg_momentum: float | None = None
    tiling: bool | None = Field(None, description="seamless tiling")
    cache: int | None = Field(None, description="DeepCache: run deep layers only every N steps; faster, less exact")
    grid: list[Axis] | None = Field(
        None,
        min_length=1,
        max_length=2,
        description="X/Y grid: one picture for each combination of values, and a labelled sheet",
    )

    def choices(self) -> dict[str, Any]:
        """The given settings that the tasks know."""
        names = ("size", "steps", "guidance", "image_guidance", "sampler", "spacing", "seed", "strength", "hires",
                 "upscaler", "variation_seed", "variation_strength", "clip_skip", "eta", "rescale", "interval",
                 "perturbed", "threshold", "apg", "apg_parallel", "apg_momentum", "tiling", "cache", "handover",
                 "outpaint", *MASK_OPTIONS,
                 "like", "noise", "ensd", "seed_resize",
                 "batch_index", "batch_size", "hires_steps", "hires_sampler",
                 "hires_spacing", "hires_prompt", "hires_negative", "hires_guidance")  # fmt: skip
        return {name: value for name in names if (value := getattr(self, name)) is not None}
