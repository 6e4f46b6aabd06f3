"""`preview.json`: the cheap projection from latents to rough pixels, stored with its model.

    {"latent_rgb": {"matrix": [[...], [...], [...]], "bias": [r, g, b]}}

One row of `matrix` for red, green and blue, (3, L) in all; a latent z, as the UNet sees it, becomes the pixel
`matrix @ z + bias`, -1 to 1. The file lies beside model_index.json, and in a single file's metadata; `plainsd.save`
writes it. For models of others, which have none, the projection is fitted when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError
from plainsd.files.folder import PREVIEW
from plainsd.models.vae import VAE
from plainsd.pictures.images import to_pil
from plainsd.pictures.model import StableDiffusion


def latent_rgb(sd: StableDiffusion) -> Tensor:
    """What came with the model, or else a fit: (L + 1, 3), the last row the constant."""
    return fit_latent_rgb(sd.vae) if sd.latent_rgb is None else sd.latent_rgb


def preview_text(projection: Tensor) -> str:
    rows = [[round(value, 6) for value in row] for row in projection.T.tolist()]  # (3, L + 1)
    table = {"matrix": [row[:-1] for row in rows], "bias": [row[-1] for row in rows]}
    return json.dumps({"latent_rgb": table}) + "\n"


def read_preview(texts: Mapping[str, str], channels: int, where: str) -> Tensor | None:
    """The projection among a model's texts, (L + 1, 3); None where there is none."""
    if PREVIEW not in texts:
        return None
    try:
        table = json.loads(texts[PREVIEW])["latent_rgb"]
        matrix, bias = (torch.tensor(table[name], dtype=torch.float32) for name in ("matrix", "bias"))
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise damaged_preview(where, f"it cannot be read ({error})") from error
    if matrix.shape != (3, channels) or bias.shape != (3,) or not (matrix.isfinite().all() and bias.isfinite().all()):
        raise damaged_preview(where, f"a matrix of 3 x {channels} finite numbers and a bias of 3 are wanted")
    return torch.cat([matrix.T, bias[None]])


def damaged_preview(where: str, why: str) -> UserError:
    return UserError(f"{PREVIEW} of {where} is damaged: {why}; delete it, and previews are fitted anew")


@torch.inference_mode()
def fit_latent_rgb(vae: VAE, samples: int = 8, side: int = 8, seed: int = 0) -> Tensor:
    """A matrix that turns a latent into one rough pixel: (L + 1, 3), its last row the constant.

    Least squares over random latents and what the VAE decodes them to, averaged over each latent's patch of pixels. The
    latents are noise of several coarsenesses, because a picture's latents are smooth for the most part. It takes an
    eighth of the work of decoding one 512x512 picture. In float16 some VAEs overflow and CPUs crawl: float32 is
    asked.
    """
    if next(vae.parameters()).dtype == torch.float16:
        vae = deepcopy(vae).float()
    generator = torch.Generator().manual_seed(seed)
    channels, weight = vae.config.latent_channels, next(vae.parameters())
    coarse = [
        torch.randn(samples // 4, channels, s, s, generator=generator, dtype=torch.float32)
        for s in (1, 2, side // 2, side)
    ]
    latents = torch.cat([F.interpolate(c, (side, side), mode="nearest") for c in coarse])  # (S, L, side, side)
    pixels = vae.decode(vae.config.unscaled(latents.to(weight))).float().cpu()
    patches = F.avg_pool2d(pixels.clamp(-1, 1), vae.config.factor)  # (S, 3, side, side)
    inputs = F.pad(latents.movedim(1, -1).reshape(-1, channels), (0, 1), value=1.0)  # (S side side, L + 1)
    return torch.linalg.lstsq(inputs, patches.movedim(1, -1).reshape(-1, 3)).solution


def preview(latents: Tensor, latent_rgb: Tensor, factor: int) -> list[Image.Image]:
    """Latents (B, L, H, W) -> B rough pictures at full size, without the VAE."""
    latents = latents.float().cpu()
    pixels = torch.einsum("blhw,lc->bchw", latents, latent_rgb[:-1]) + latent_rgb[-1][:, None, None]
    return to_pil(F.interpolate(pixels, scale_factor=factor, mode="nearest"))
