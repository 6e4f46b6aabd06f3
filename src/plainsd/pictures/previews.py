"""Pictures of latents while they are drawn: by TAESD where it is given, else by a projection that costs nothing.

`preview.json` is that projection from latents to rough pixels, stored with its model.

    {"latent_rgb": {"matrix": [[...], [...], [...]], "bias": [r, g, b]}}

One row of `matrix` for red, green and blue, (3, L) in all; a latent z, as the UNet sees it, becomes the pixel
`matrix @ z + bias`, -1 to 1. The file lies beside model_index.json, and in a single file's metadata; `plainsd.save`
writes it. For models of others, which have none, the projection is fitted when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from plainsd.errors import UserError
from plainsd.files.folder import PREVIEW
from plainsd.models.tiny_vae import AnyVAE, TinyVAE, check_same_latents
from plainsd.pictures.images import to_pil
from plainsd.pictures.model import StableDiffusion


@dataclass(frozen=True)
class Previewer:
    """What makes the pictures: one of the two."""

    latent_rgb: Tensor | None  # (L + 1, 3), a pixel a latent
    tiny: TinyVAE | None = None  # the whole picture, a little blurred

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, L, h, w) -> B pictures: of the latents' size by the projection, at full size by TAESD."""
        if self.tiny is not None:
            return to_pil(self.tiny.decode(latents.to(next(self.tiny.parameters()))).float())
        assert self.latent_rgb is not None
        return preview(latents, self.latent_rgb)


def previewer(sd: StableDiffusion, vae: AnyVAE | None = None) -> Previewer:
    """That of a model. `vae`: TAESD's, which must be of the model's family; a model that decodes by TAESD needs none
    beside it. UserError for another autoencoder: it would take longer than the step that it shows."""
    vae = sd.vae if vae is None else vae
    if isinstance(vae, TinyVAE):
        check_same_latents(vae.config, sd.vae.config, "the autoencoder for previews", "preview_vae")
        return Previewer(None, vae)
    if vae is not sd.vae:
        raise UserError("--preview-vae takes TAESD, which is quick enough for every step; give taesd_decoder")
    return Previewer(latent_rgb(sd))


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
def fit_latent_rgb(vae: AnyVAE, samples: int = 8, side: int = 8, seed: int = 0) -> Tensor:
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


def preview(latents: Tensor, latent_rgb: Tensor) -> list[Image.Image]:
    """Latents (B, L, h, w) -> B rough pictures, a pixel a latent, without the VAE."""
    latents = latents.float().cpu()
    pixels = torch.einsum("blhw,lc->bchw", latents, latent_rgb[:-1]) + latent_rgb[-1][:, None, None]
    return to_pil(pixels)
