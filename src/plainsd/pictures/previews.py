"""Previews of latents during sampling: by TAESD if given, else by a linear projection that costs next to nothing.

`preview.json` is that projection from latents to RGB, stored with its model.

    {"latent_rgb": {"matrix": [[...], [...], [...]], "bias": [r, g, b]}}

One row of `matrix` for red, green and blue, (3, L) in all; a latent z, as the UNet sees it, becomes the pixel
`matrix @ z + bias`, -1 to 1. It is stored beside model_index.json, or in a single file's metadata; `plainsd.save`
writes it. For models without one the projection is fitted on first use.
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
from plainsd.json_reader import parsed_json
from plainsd.models.tiny_vae import AnyVAE, TinyVAE, check_same_latents
from plainsd.pictures.images import to_pil
from plainsd.pictures.model import StableDiffusion


@dataclass(frozen=True)
class Previewer:
    """Makes previews in one of the two ways."""

    latent_rgb: Tensor | None  # (L + 1, 3), one pixel per latent
    tiny: TinyVAE | None = None  # the whole picture, a little blurred

    @torch.inference_mode()
    def __call__(self, latents: Tensor) -> list[Image.Image]:
        """Latents (B, L, h, w) -> B pictures: of the latents' size by the projection, at full size by TAESD."""
        if self.tiny is not None:
            return to_pil(self.tiny.decode(latents.to(next(self.tiny.parameters()))).float())
        assert self.latent_rgb is not None
        return preview(latents, self.latent_rgb)


def previewer(sd: StableDiffusion, vae: AnyVAE | None = None) -> Previewer:
    """The previewer of a model. `vae`: a TAESD of the model's family; a model that decodes by TAESD needs none.
    UserError for another autoencoder: it would take longer than the step itself."""
    vae = sd.vae if vae is None else vae
    if isinstance(vae, TinyVAE):
        check_same_latents(vae.config, sd.vae.config, "the autoencoder for previews", "preview_vae")
        return Previewer(None, vae)
    if vae is not sd.vae:
        raise UserError("--preview-vae takes TAESD, which is quick enough for every step; give taesd_decoder")
    return Previewer(latent_rgb(sd))


def latent_rgb(sd: StableDiffusion) -> Tensor:
    """The model's own projection, or else a fit: (L + 1, 3), the last row the bias."""
    return fit_latent_rgb(sd.vae) if sd.latent_rgb is None else sd.latent_rgb


def preview_text(projection: Tensor) -> str:
    rows = [[round(value, 6) for value in row] for row in projection.T.tolist()]  # (3, L + 1)
    table = {"matrix": [row[:-1] for row in rows], "bias": [row[-1] for row in rows]}
    return json.dumps({"latent_rgb": table}) + "\n"


def read_preview(texts: Mapping[str, str], channels: int, where: str) -> Tensor | None:
    """The projection from a model's metadata, (L + 1, 3); None if there is none."""
    if PREVIEW not in texts:
        return None
    try:
        table = parsed_json(texts[PREVIEW])["latent_rgb"]
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
    """A least-squares projection from a latent to RGB: (L + 1, 3), its last row the bias.

    Fitted on random latents and the VAE's decoded pixels, averaged over each latent's patch. The latents are noise at
    several scales, because a picture's latents are mostly smooth. It costs an eighth of decoding one 512x512 picture.
    Use float32: in float16 some VAEs overflow and CPUs are very slow.
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
    """Latents (B, L, h, w) -> B rough pictures, one pixel per latent, without the VAE."""
    latents = latents.float().cpu()
    pixels = torch.einsum("blhw,lc->bchw", latents, latent_rgb[:-1]) + latent_rgb[-1][:, None, None]
    return to_pil(pixels)
