"""`plainsd train`: one command, one method each time."""

import dataclasses
import json
import shutil
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from plainsd.checkpoint import choose_device, choose_dtype, load_vae, save, save_vae
from plainsd.errors import UserError
from plainsd.folder import read_json
from plainsd.generate import StableDiffusion
from plainsd.images import grid, to_pil, write_png
from plainsd.models.clip import TextEncoder
from plainsd.models.unet import UNet
from plainsd.models.vae import VAE
from plainsd.tokenizer import Tokenizer
from plainsd.train.data import Pictures, random, read_folder
from plainsd.train.loop import FitOptions
from plainsd.train.run import Rhythm, run
from plainsd.train.scratch import ScratchMethod, cache_latents
from plainsd.train.vae import VaeMethod, init_vae, measure_scaling, validate
from plainsd.variants import Variant


@dataclass
class Train:
    """Train on a folder of captioned pictures. Started again with the same --out, it goes on where it was."""

    method: Literal["vae", "scratch"]
    """vae: an autoencoder from nothing. scratch: text encoder and UNet from nothing, on a trained autoencoder"""
    data: Path
    """folder with metadata.jsonl, or with pairs name.png and name.txt"""
    out: Path
    """folder of the run: log, curve, samples, checkpoints, and at the end the result"""
    model: Path
    """JSON file that describes the networks: the fields of plainsd.variants.Variant"""
    vae: Path | None = None
    """scratch: folder of the trained autoencoder"""
    tokenizer: Path | None = None
    """scratch: folder with vocab.json and merges.txt"""
    heldout: Path | None = None
    """folder of captioned pictures that are only used to measure"""
    prompts: Path | None = None
    """scratch: file with one prompt a line, for the sample pictures"""
    carry: tuple[Path, ...] = ()
    """scratch: files to put beside the finished model's weights"""
    size: int | None = None
    """pixels, width and height of the training pictures; the model's own if not given"""
    steps: int = 10_000
    batch: int = 64
    """pictures a micro-batch"""
    accumulate: int = 1
    """micro-batches a step"""
    lr: float = 1e-3
    warmup: int = 200
    """steps of linear warm-up; then a cosine down to 1 %"""
    weight_decay: float = 0.01
    beta2: float = 0.999
    """memory of AdamW's second moment; 0.99 suits short runs"""
    clip: float = 1.0
    ema: float = 0.999
    dropout: float = 0.1
    """scratch: share of captions left empty"""
    timestep_power: float = 1.0
    """scratch: below 1, noisy timesteps come more often; there the caption decides, elsewhere it hardly matters"""
    kl_weight: float = 1e-4
    """vae: pull of the latents towards the unit normal"""
    edge_weight: float = 1.0
    """vae: weight of the error in pixel differences"""
    patch_weight: float = 0.0
    """vae: weight of the patch discriminator"""
    patch_after: int = 0
    """vae: pictures seen before the discriminator counts"""
    seed: int = 0
    save_every: int = 500
    keep: int = 2
    log_every: int = 20
    validate_every: int = 500
    sample_every: int = 1000
    bad_share: float = 0.01
    """largest share of broken pictures and empty captions that is left out silently but for a line; more is an error"""
    device: str = "auto"
    dtype: str = "auto"
    """arithmetic: bfloat16 (autocast, weights stay float32) or float32; auto asks the processor"""

    def run(self) -> int:
        torch.manual_seed(self.seed)                        # the networks' first weights
        variant = read_variant(self.model)
        if self.size:
            variant = replace(variant, size=self.size)
        self._device = choose_device(self.device)
        self._dtype = choose_dtype(self.dtype, self._device)
        self._keep_options()
        pictures = read_folder(self.data, variant.size, bad_share=self.bad_share)
        heldout = read_folder(self.heldout, variant.size, bad_share=self.bad_share) if self.heldout else None
        method = {"vae": self._vae, "scratch": self._scratch}[self.method]
        return method(variant, pictures, heldout)

    def _keep_options(self) -> None:
        """A run is one set of options: another set in the same folder is refused, but for those of no consequence."""
        path, free = self.out / "options.json", {"keep", "save_every", "log_every", "validate_every", "sample_every", "out"}
        now = {name: str(value) for name, value in dataclasses.asdict(self).items()}
        if path.is_file():
            old = read_json(path)
            changed = [name for name in now if name not in free and old.get(name, now[name]) != now[name]]
            if changed:
                name = changed[0]
                raise UserError(f"{self.out} holds a run with another --{name.replace('_', '-')} ({old[name]}, now "
                                f"{now[name]}); give the same options to resume, or another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(now, indent=1), encoding="utf-8")

    def _options(self) -> FitOptions:
        return FitOptions(
            steps=self.steps, batch=self.batch, accumulate=self.accumulate, lr=self.lr, warmup=self.warmup, betas=(0.9, self.beta2),
            weight_decay=self.weight_decay, clip=self.clip, ema=self.ema, seed=self.seed, save_every=self.save_every,
            keep=self.keep, bf16=self._dtype == torch.bfloat16,
        )

    def _run(self, method, count: int, check: Callable | None, sample: Callable | None) -> bool:
        rhythm = Rhythm(self.log_every, self.validate_every, self.sample_every)
        trainer = run(method, count, self._options(), self.out, rhythm, check, sample)
        if trainer is None:
            print(f"stopped and saved in {self.out}; the same command goes on from there")
            return False
        if trainer.ema:
            with torch.no_grad():
                for p, value in zip(trainer.parameters, trainer.ema.values, strict=True):
                    p.copy_(value)
        method.modules.eval()
        return True

    def _network(self, network: nn.Module) -> nn.Module:
        return network.to(self._device).to(memory_format=torch.channels_last)

    # ---- method vae

    def _vae(self, variant: Variant, pictures: Pictures, heldout: Pictures | None) -> int:
        vae = self._network(VAE(variant.vae))
        init_vae(vae)
        method = VaeMethod(vae, pictures, self.edge_weight, self.kl_weight, self.patch_weight, self.patch_after)
        shown = heldout or pictures

        def sample(path: Path) -> None:
            real = shown.pixels(range(min(16, len(shown)))).to(self._device)
            with torch.inference_mode():
                fake = vae.decode(vae.encode(real).mean)
            write_png(grid([i for pair in zip(to_pil(real), to_pil(fake), strict=True) for i in pair], 8), path)

        check = (lambda: validate(vae, heldout)) if heldout else None
        if not self._run(method, len(pictures), check, sample):
            return 0
        scale = measure_scaling(vae, pictures)
        vae.config = replace(vae.config, scaling_factor=scale)
        save_vae(vae, self.out / "vae", variant)
        print(f"autoencoder in {self.out / 'vae'}, scaling factor {scale:.5f}")
        if heldout:
            print("held-out pictures: PSNR {psnr:.2f} dB, L1 {l1:.4f}".format(**validate(vae, heldout)))
        return 0

    # ---- method scratch

    def _scratch(self, variant: Variant, pictures: Pictures, heldout: Pictures | None) -> int:
        if not self.vae or not self.tokenizer:
            raise UserError("method scratch needs --vae and --tokenizer: train the first with --method vae")
        vae = load_vae(self.vae, device=self._device, dtype=torch.float32)
        vae = vae.to(memory_format=torch.channels_last).requires_grad_(False)
        tokenizer = Tokenizer.from_folder(self.tokenizer)
        text = replace(variant.text[0], vocab=len(tokenizer), eos=tokenizer.end)
        tokenizer.max_length = text.positions
        variant = replace(variant, vae=vae.config, text=(text,))
        unet, encoder = self._network(UNet(variant.unet)), self._network(TextEncoder(text))
        init_weights(unet, encoder)
        schedule, cache = variant.schedule.build(), self.out / "cache"
        method = ScratchMethod(
            unet, encoder, tokenizer, schedule, variant.prediction,
            cache_latents(vae, pictures, cache, dtype=self._dtype), pictures, self.dropout,
            self.timestep_power,
        )
        sd = StableDiffusion([tokenizer], [encoder], unet, vae, schedule, variant.prediction, variant)
        check = None
        if heldout:
            held_latents = cache_latents(vae, heldout, cache, dtype=self._dtype)
            check = lambda: method.validate(held_latents, heldout)              # noqa: E731
        prompts = [p for p in self.prompts.read_text("utf-8").splitlines() if p.strip()] if self.prompts else None

        def sample(path: Path) -> None:
            from plainsd.generate import final, text_to_image

            write_png(grid(final(text_to_image(sd, prompts, seed=0)), 8), path)

        if not self._run(method, len(pictures), check, sample if prompts else None):
            return 0
        save(sd, self.out / "model", dtype=torch.float16)
        for file in self.carry:
            shutil.copy(file, self.out / "model" / file.name)
        print(f"model in {self.out / 'model'}")
        return 0


def init_weights(unet: UNet, encoder: TextEncoder) -> None:
    """Small text embeddings (as CLIP's), and a UNet whose residual branches and output begin at zero.

    A branch that begins at zero lets the signal through unchanged, so that the first steps are not spent on undoing noise.
    """
    nn.init.normal_(encoder.token.weight, std=0.02)
    nn.init.normal_(encoder.position.weight, std=0.01)
    for name, p in unet.named_parameters():
        if name.rsplit(".", 1)[0].endswith(("conv2", "proj_out", "conv_out")):
            nn.init.zeros_(p)


def read_variant(path: Path) -> Variant:
    """A Variant from JSON: the dataclass's own field names, nested; what is left out keeps its default."""
    return build(Variant, read_json(path), str(path))


def build(kind: type, fields: dict, where: str):
    hints = typing.get_type_hints(kind)
    unknown_names = [name for name in fields if name not in hints]
    if unknown_names:
        raise UserError(f"{where}: {kind.__name__} has no field {unknown_names[0]!r}; it has {', '.join(hints)}")
    try:
        return kind(**{name: convert(hints[name], value, where) for name, value in fields.items()})
    except TypeError as error:
        raise UserError(f"{where}: {kind.__name__}: {error}") from error


def convert(hint, value, where: str):
    if dataclasses.is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(value, list):
        inner = typing.get_args(hint)
        return tuple(convert(inner[0], v, where) if inner and not isinstance(inner[0], types.EllipsisType) else v for v in value)
    return value
