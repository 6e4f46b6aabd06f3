"""A whole model: its networks and tokenizers, its noise schedule, and its memory options."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from plainsd.device import can_pack
from plainsd.diffusion.schedule import EDMSchedule, NoiseSchedule
from plainsd.errors import UserError
from plainsd.models.clip import TextEncoder
from plainsd.models.forms import make_plain, quantized
from plainsd.models.tiny_vae import AnyVAE
from plainsd.models.unet import UNet
from plainsd.models.variants import Variant, encoder_names
from plainsd.pictures.upscaling import Upscaler
from plainsd.text.tokenizer import Tokenizer

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass(frozen=True)
class Saving:
    """Options that save memory. None: when free memory is short."""

    bands: bool | None = None
    rows: int | None = None  # at most so many of a batch go through the UNet or the VAE at once


class Stage:
    """The device that holds one network at a time; the others stay on the CPU."""

    def __init__(self, device: torch.device, networks: list[nn.Module]):
        self.device, self.networks = device, networks

    def call(self, network: nn.Module) -> None:
        for other in self.networks:
            if other is not network:
                moved(other, "cpu")
        moved(network, self.device)


def moved(network: NetworkT, device: torch.device | str) -> NetworkT:
    """Moves a network in place, also while something is drawn: its weights can be trained afterwards, as those that are
    made in inference mode cannot."""
    with torch.inference_mode(False):
        return network.to(device)


LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
MAKING = threading.Lock()


@contextmanager
def alone(sd: StableDiffusion, others: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Keeps other threads from a model's networks and from `others`, all of which several models may share: tiling,
    perturbed guidance and offloading change them for the time of a call."""
    models = [sd] if sd.refiner is None else [sd, sd.refiner]
    networks = {network for one in models for network in (*one.text_encoders, one.unet, one.vae)} | {*others}
    with ExitStack() as held:
        for network in sorted(networks, key=id):  # in one order, so that no two threads wait for each other
            with MAKING:
                lock = LOCKS.setdefault(network, threading.RLock())
            held.enter_context(lock)
        yield


@dataclass
class StableDiffusion:
    """The parts of one model. SDXL has two tokenizers and text encoders, all others one of each."""

    tokenizers: list[Tokenizer]
    text_encoders: list[TextEncoder]
    unet: UNet
    vae: AnyVAE
    schedule: NoiseSchedule | EDMSchedule
    prediction: str  # what the network predicts: "epsilon", "v_prediction", "sample" (x0), or "edm", see denoiser.py
    variant: Variant
    path: Path | None = None  # where it was loaded from
    refiner: StableDiffusion | None = None  # samples the lowest noise levels, see `sampling.turns`
    upscaler: Upscaler | None = None  # for the hires pass, if the settings name it
    saving: Saving = Saving()  # memory options
    stage: Stage | None = None  # runs offloaded networks; None: all are on the device
    latent_rgb: Tensor | None = None  # (L + 1, 3), as stored with the model, see previews.py

    @property
    def device(self) -> torch.device:
        return self.stage.device if self.stage else next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StableDiffusion:
        """Moves and casts the networks in place; returns itself. What `faster` packed is plain afterwards where nothing
        is packed: on another device than a CPU, and in a dtype that oneDNN does not have here."""
        if dtype not in (None, self.dtype) and quantized(self.unet):
            raise UserError(f"the model's weights are in 8 bits and cannot be cast to {dtype}; load it in that")
        target = torch.device(self.device if device is None else device)
        stays = target.type == "cpu" and (dtype is None or can_pack(dtype))
        network: nn.Module
        for network in (*self.text_encoders, self.unet, self.vae):
            if not stays:
                make_plain(network)
            network.to(device=device, dtype=dtype)
        if self.refiner is not None:
            self.refiner.to(device, dtype)
        return self


def assemble(
    variant: Variant,
    networks: Mapping[str, nn.Module],
    tokenizers: Iterable[Tokenizer] = (),
    path: Path | None = None,
    latent_rgb: Tensor | None = None,
) -> StableDiffusion:
    """A model from its parts: the networks by their folders' names (`unet`, `vae`, `text_encoder`, `text_encoder_2`),
    the schedule and the prediction type of its variant. For names and shapes alone, leave the tokenizers out and pass
    networks on the meta device (`plainsd.files.stored.empties`)."""
    return StableDiffusion(
        tokenizers=list(tokenizers),
        text_encoders=[networks[name] for name in encoder_names(variant)],
        unet=networks["unet"],
        vae=networks["vae"],
        schedule=variant.schedule.build(),
        prediction=variant.prediction,
        variant=variant,
        path=path,
        latent_rgb=latent_rgb,
    )
