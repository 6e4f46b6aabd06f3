"""A model compared with diffusers and transformers, on the user's own weights: `plainsd verify`.

Each network is built by both in float32 and given the same input; then both draw the same picture in five steps. A
folder is read by their loaders, a single file by their conversion, so that our reading is compared too. One network is
in memory at a time; for the picture, one whole model.

Shape letters: B batch, C channels, H W height and width in pixels, h w those of the latents, N tokens.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from plainsd.checkpoint import load
from plainsd.device import choose_device
from plainsd.diffusion.schedule import EDMSchedule
from plainsd.errors import UserError
from plainsd.files.configs_out import pipeline
from plainsd.files.convert import read
from plainsd.files.hub import find
from plainsd.files.predicted import CHOICES
from plainsd.files.stored import Contents
from plainsd.files.tokenizers import tokenizer_names, tokenizers
from plainsd.generate import image_to_image, inpaint, text_to_image
from plainsd.models.clip import TextEncoder
from plainsd.models.tiny_vae import TinyVAEConfig
from plainsd.models.variants import VARIANTS, Variant, encoder_names
from plainsd.pictures.conditioning import SINUSOID, size_vector
from plainsd.pictures.defaults import size_multiple
from plainsd.pictures.drawing import Pictures
from plainsd.pictures.images import to_pil, to_tensor
from plainsd.pictures.sampling import decode
from plainsd.reports.references import pipe_there, quiet, reference_network, tokenizers_there

TOLERANCE = 1e-4  # relative, of one network; float32 rounding gives 1e-7 to 1e-5
LATENT_TOLERANCE = 2e-3  # of the latents after five steps; with zero terminal SNR they begin at sigma 4096
VERIFY_STEPS = 5
MAX_SIDE = 256  # pixels: the arithmetic is the same at any size
VERIFY_PROMPTS = ("a red apple", "blurred")  # short: diffusers truncates prompts longer than 77 tokens
TEXTS = (
    *VERIFY_PROMPTS,
    "",
    "a cat on a wooden table, 50mm photo",
    "Größe 3½ naïve's",
    "猫 🍎 on\ta mat!!!",
    "1girl, (masterpiece:1.2), don't",
)
NEEDED = ("diffusers", "transformers", "accelerate")


class Comparison(NamedTuple):
    """One line of the table. `error` is relative to the largest value, or a count."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for nan


def check_packages() -> None:
    try:
        for name in NEEDED:
            import_module(name)
    except ImportError as error:
        missing = (error.name or "one of them").partition(".")[0]
        raise UserError(
            f"verify compares with {', '.join(NEEDED)}, and {missing} is not installed; pip install 'plainsd[verify]'"
        ) from error


@torch.inference_mode()
def verify(
    source: str | Path | None = None,
    *,
    variant_file: str | None = None,
    family: str | None = None,
    device: str = "auto",
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Iterator[Comparison]:
    """A row for each tokenizer and network, and two for a picture. Arguments as for `plainsd.load`."""
    check_packages()
    place = choose_device(device)
    path = find(source, variant_file)
    contents = read(path, variant_file, family, prediction=prediction, zero_snr=zero_snr)
    with quiet(), exact_float32():
        yield from tokenizer_rows(contents, path)
        for name in (*encoder_names(contents.variant), "vae", "unet"):
            network = contents.networks[name]
            run = {"unet": compare_unet, "vae": compare_vae}.get(name, compare_text)
            yield from run(
                name,
                contents.variant,
                place,
                network.build,
                lambda name=name: reference_network(contents, path, name, variant_file).to(place),
            )
        yield from picture_rows(contents, path, variant_file, place)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Turns off TF32, in which GPUs round float32 products to 10 bits."""
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = False
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


# --- one network at a time -------------------------------------------------------------------------------------------


def error(ours: Tensor, other: Tensor) -> float:
    """The largest difference, relative to the reference's largest value."""
    if ours.shape != other.shape:
        return float("inf")
    return ((ours - other).abs().max() / other.abs().max()).item()


def worst(errors: list[float]) -> float:
    """The largest, or nan where there is one."""
    return torch.tensor(errors).max().item()


def differences(
    device: torch.device, build: Callable, build_there: Callable, ours: Callable, there: Callable
) -> list[float]:
    """Compares `ours` of our network with `there` of theirs, lists of tensors; never both networks in memory."""
    network = build(device, torch.float32)
    mine = ours(network)
    del network
    gc.collect()
    return [error(a, b) for a, b in zip(mine, there(build_there()), strict=True)]


def numbers(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def picture_size(variant: Variant) -> tuple[int, int]:
    """Not square, so that height and width cannot be mistaken for each other; of whole latents."""
    multiple = size_multiple(variant.vae)
    side = max(min(variant.size, MAX_SIDE) // multiple, 1) * multiple
    return side, max(side * 3 // 4 // multiple, 1) * multiple


def compare_text(
    name: str, variant: Variant, device: torch.device, build: Callable, build_there: Callable
) -> Iterator[Comparison]:
    text = variant.text[encoder_names(variant).index(name)]
    ids = torch.randint(text.eos, (3, text.positions), generator=torch.Generator().manual_seed(0))
    ids[0, 5:] = ids[1, 40:] = ids[2, -1] = text.eos  # short, half and full
    ids = ids.to(device)

    def ours(encoder: TextEncoder) -> list[Tensor]:
        states = encoder(ids)
        return [states.final, states.hidden[-2], states.pooled]

    def there(encoder: nn.Module) -> list[Tensor]:
        states = encoder(ids, output_hidden_states=True)
        return [
            states.last_hidden_state,
            states.hidden_states[-2],
            states.text_embeds if text.projection else states.pooler_output,
        ]

    yield Comparison(name.replace("_", " "), worst(differences(device, build, build_there, ours, there)), TOLERANCE)


def compare_vae(
    name: str, variant: Variant, device: torch.device, build: Callable, build_there: Callable
) -> Iterator[Comparison]:
    """A noisy gradient and a flat picture. In flat feature maps the variance is as small as the epsilon of a norm, so
    that a wrong epsilon shows."""
    (width, height), vae = picture_size(variant), variant.vae
    busy = to_tensor(gradient((width, height))).to(device) + 0.1 * numbers(device, 1, 3, height, width)
    noise = numbers(device, 1, vae.latent_channels, height // vae.factor, width // vae.factor) / vae.scaling_factor
    pixels, latents = (torch.cat([one, torch.zeros_like(one)]) for one in (busy, noise))

    tiny = isinstance(vae, TinyVAEConfig)  # encodes without a distribution

    def ours(vae: nn.Module) -> list[Tensor]:
        gaussian = vae.encode(pixels)
        logvar = [] if tiny else [*gaussian.logvar.split(1)]
        return [*gaussian.mean.split(1), *logvar, *vae.decode(latents).split(1)]

    def there(vae: nn.Module) -> list[Tensor]:
        if tiny:
            return [*vae.encode(pixels).latents.split(1), *vae.decode(latents).sample.split(1)]
        gaussian = vae.encode(pixels).latent_dist
        return [*gaussian.mean.split(1), *gaussian.logvar.split(1), *vae.decode(latents).sample.split(1)]

    *encoded, busy_decoded, flat_decoded = differences(device, build, build_there, ours, there)
    yield Comparison("vae, encode", worst(encoded), TOLERANCE)
    yield Comparison("vae, decode", worst([busy_decoded, flat_decoded]), TOLERANCE)


def compare_unet(
    name: str, variant: Variant, device: torch.device, build: Callable, build_there: Callable
) -> Iterator[Comparison]:
    config, (width, height) = variant.unet, (side // variant.vae.factor for side in picture_size(variant))
    inputs = (
        numbers(device, 2, config.in_channels, height, width),
        torch.tensor([901.0, 37.0], device=device),
        numbers(device, 2, variant.text[0].positions, config.context),
    )
    mine, other = {}, {}
    if config.vector:
        pooled = numbers(device, 2, variant.text[-1].projection or variant.text[-1].width)
        count = (config.vector - pooled.shape[1]) // SINUSOID
        sizes = torch.tensor([[1024, 768, 0, 16, 1000, 700][:count]] * 2, device=device)
        mine["vector"] = size_vector(pooled, sizes)
        other["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": sizes}
    if config.guidance_dim:
        mine["guidance"] = other["timestep_cond"] = numbers(device, 2, config.guidance_dim)
    (found,) = differences(
        device, build, build_there, lambda unet: [unet(*inputs, **mine)], lambda unet: [unet(*inputs, **other).sample]
    )
    yield Comparison("unet", found, TOLERANCE)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def tokenizer_rows(contents: Contents, path: Path) -> Iterator[Comparison]:
    """How many test texts are tokenized differently."""
    names, ours = tokenizer_names(contents.variant), tokenizers(contents, path)
    for name, mine, other in zip(names, ours, tokenizers_there(contents, path), strict=True):
        wrong = sum([mine.start, *mine.encode(text), mine.end] != other(text).input_ids for text in TEXTS)
        yield Comparison(name.replace("_", " "), wrong, 0)


# --- a picture -------------------------------------------------------------------------------------------------------


def gradient(size: tuple[int, int]) -> Image.Image:
    width, height = size
    y, x = np.mgrid[:height, :width] / max(size)
    return Image.fromarray((np.stack([x, y, (x - y) ** 2], axis=-1) * 255).astype(np.uint8))


def half(size: tuple[int, int], factor: int) -> Image.Image:
    """A mask over the left half, in whole latents."""
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, max(size[0] // 2 // factor, 1) * factor, size[1]))
    return mask


def picture_rows(
    contents: Contents, path: Path, variant_file: str | None, device: torch.device
) -> Iterator[Comparison]:
    """Five DDIM steps with guidance, from the same noise: the latents, then the pixels in 1/255."""
    variant, size = contents.variant, picture_size(contents.variant)
    photo, mask = gradient(size), half(size, variant.vae.factor)
    edm = isinstance(variant.schedule, EDMSchedule)
    zero_snr = not isinstance(variant.schedule, EDMSchedule) and variant.schedule.zero_terminal_snr
    spacing = variant.spacing if edm else "trailing" if variant.spacing == "trailing" else "leading"
    choices: dict[str, Any] = {"steps": VERIFY_STEPS, "sampler": "euler" if edm else "ddim", "spacing": spacing}
    name = pipeline(variant)
    noise: dict[str, Any] = {"prediction": variant.prediction} if variant.prediction in CHOICES and not edm else {}
    noise |= {} if edm else {"zero_snr": zero_snr}
    family = variant.name if variant.name in VARIANTS else None
    sd = load(path, device=device, dtype=torch.float32, variant_file=variant_file, family=family, **noise)
    if "Inpaint" in name:
        events = inpaint(sd, VERIFY_PROMPTS[0], photo, mask, 1.0, VERIFY_PROMPTS[1], **choices)
    elif "Pix2Pix" in name:
        events = image_to_image(sd, VERIFY_PROMPTS[0], photo, None, VERIFY_PROMPTS[1], **choices)
    elif "Img2Img" in name:
        events = image_to_image(sd, VERIFY_PROMPTS[0], photo, 1.0, VERIFY_PROMPTS[1], **choices)
    else:
        events = text_to_image(sd, *VERIFY_PROMPTS, size=size, **choices)
    *_, pictures = events
    assert isinstance(pictures, Pictures)
    mine = pictures.latents, bytes_of(decode(sd, pictures.latents))
    del sd, events
    gc.collect()

    told = {"image": photo, "strength": 1.0} if "Inpaint" in name or "Img2Img" in name else {}
    if "Inpaint" in name:
        told["mask_image"] = mask
    if "Pix2Pix" in name:
        told["image"] = photo
    if "Img2Img" not in name and name != "StableDiffusionInstructPix2PixPipeline":
        told |= {"width": size[0], "height": size[1]}
    pipe = pipe_there(contents, path, variant_file, choices["spacing"], device)
    latents = pipe(
        VERIFY_PROMPTS[0],
        negative_prompt=VERIFY_PROMPTS[1],
        num_inference_steps=VERIFY_STEPS,
        guidance_scale=variant.guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **told,
    ).images
    pixels = bytes_of(pipe.vae.decode(variant.vae.unscaled(latents)).sample)
    yield Comparison(f"latents after {VERIFY_STEPS} steps", error(mine[0], latents), LATENT_TOLERANCE)
    yield Comparison("pixels, in 1/255", int(np.abs(mine[1] - pixels).max()), 1 + zero_snr)


def bytes_of(pixels: Tensor) -> np.ndarray:
    return np.asarray(to_pil(pixels)[0]).astype(int)


# --- the table -------------------------------------------------------------------------------------------------------


def lines(rows: Iterable[Comparison], failed: list[Comparison]) -> Iterator[str]:
    """The table, line by line as rows come. Rows beyond their tolerance are appended to `failed`."""
    for number, row in enumerate(rows):
        if not number:
            yield f"{'':<24}{'error':>10}{'tolerance':>12}"
        failed += [] if row.passed else [row]
        status = "PASS" if row.passed else "FAIL"
        yield f"{row.name:<24}{error_text(row.error):>10}{error_text(row.tolerance):>12}  {status}"


def error_text(value: float) -> str:
    return f"{value:d}" if isinstance(value, int) else f"{value:.0e}" if value else "equal"
