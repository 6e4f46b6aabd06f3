"""`preview.json`: the cheap projection from latents to rough pixels, stored with its model.

    {"latent_rgb": {"matrix": [[...], [...], [...]], "bias": [r, g, b]}}

One row of `matrix` for red, green and blue, (3, L) in all; a latent z, as the UNet sees it, becomes the pixel
`matrix @ z + bias`, -1 to 1. The file lies beside model_index.json, and in a single file's metadata; `plainsd.save`
writes it. For models of others, which have none, the projection is fitted when it is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plainsd.errors import UserError
from plainsd.pictures.previews import fit_latent_rgb

if TYPE_CHECKING:
    from plainsd.pictures.model import StableDiffusion

FILE = "preview.json"


def latent_rgb(sd: StableDiffusion) -> Tensor:
    """What came with the model, or else a fit: (L + 1, 3), the last row the constant."""
    return fit_latent_rgb(sd.vae) if sd.latent_rgb is None else sd.latent_rgb


def preview_text(projection: Tensor) -> str:
    rows = [[round(value, 6) for value in row] for row in projection.T.tolist()]  # (3, L + 1)
    table = {"matrix": [row[:-1] for row in rows], "bias": [row[-1] for row in rows]}
    return json.dumps({"latent_rgb": table}) + "\n"


def read_preview(texts: Mapping[str, str], channels: int, where: str) -> Tensor | None:
    """The projection among a model's texts, (L + 1, 3); None where there is none."""
    if FILE not in texts:
        return None
    try:
        table = json.loads(texts[FILE])["latent_rgb"]
        matrix, bias = (torch.tensor(table[name], dtype=torch.float32) for name in ("matrix", "bias"))
    except (ValueError, LookupError, TypeError, RuntimeError) as error:
        raise damaged(where, f"it cannot be read ({error})") from error
    if matrix.shape != (3, channels) or bias.shape != (3,) or not (matrix.isfinite().all() and bias.isfinite().all()):
        raise damaged(where, f"a matrix of 3 x {channels} finite numbers and a bias of 3 are wanted")
    return torch.cat([matrix.T, bias[None]])


def damaged(where: str, why: str) -> UserError:
    return UserError(f"{FILE} of {where} is damaged: {why}; delete it, and previews are fitted anew")
