"""Previews of jobs: by the TAESD of --preview-vae where it fits the model, else by a projection."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from plainsd.checkpoint import load_vae
from plainsd.errors import UserError
from plainsd.files.convert import read_vae_alone
from plainsd.models.tiny_vae import AnyVAEConfig, TinyVAEConfig, check_same_latents
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.previews import Previewer, previewer

log = logging.getLogger("plainsd.server")


def check_preview_vae(path: Path, models: Mapping[str, AnyVAEConfig]) -> None:
    """UserError if the file is no TAESD; a warning for each model, by name and autoencoder, that it does not fit."""
    for name, own in models.items():
        config = read_vae_alone(path, own).config
        if not isinstance(config, TinyVAEConfig):
            raise UserError(f"--preview-vae '{path}' is no TAESD, which is quick enough for every step; give "
                            "taesd_decoder", field="preview_vae")  # fmt: skip
        try:
            check_same_latents(config, own, f"previews of {name} are made without --preview-vae", "preview_vae")
        except UserError as error:
            log.warning(str(error))


def previewer_of(sd: StableDiffusion, path: Path | None) -> Previewer:
    """By TAESD if it fits and can still be read."""
    if path is not None:
        try:
            return previewer(sd, load_vae(path, device=sd.device, dtype=sd.dtype, like=sd.vae.config))
        except (UserError, OSError) as error:
            log.info("previews are made without --preview-vae: %s", error)
    return previewer(sd)
