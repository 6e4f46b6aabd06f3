"""What all methods of `plainsd train` share between options and loop: the run's folder, the run."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from dataclasses import field as made_by
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plainsd.device import DTYPES
from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.generate import Events, final, text_to_image
from plainsd.listing import read_prompts
from plainsd.models.control import ControlNet
from plainsd.pictures.control import Control
from plainsd.pictures.images import grid, write_png
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import RANDOM, drawn_seed
from plainsd.train import config
from plainsd.train.checkpoints import saving
from plainsd.train.checks import without_effect
from plainsd.train.claim import CONFIG_FILE, DAMAGED, OPTIONS_FILE, claim, flat, longer, real_places, recorded_seed
from plainsd.train.consistency import Distill
from plainsd.train.data.pictures import PictureSet
from plainsd.train.data.record import record, text_digests
from plainsd.train.data.run_data import RunData
from plainsd.train.methods.dreambooth import AT_ONCE
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective
from plainsd.train.optimizer import adam8bit
from plainsd.train.options import FitOptions, TrainOptions, given
from plainsd.train.processes import World
from plainsd.train.run import Interrupted, Rhythm, check_tensorboard, run_training
from plainsd.train.shard import shard
from plainsd.train.trainer import Method

FREE = {"out", "keep", "save_every", "log_every", "validate_every", "sample_every", "tensorboard", "workers",
        "config", "save_results_every", "save_epochs", "save_dtype", "prompts", "bad_share", "checkpointing",
        "device"}  # fmt: skip
RUN_FOLDERS = ("cache", "checkpoints", "prior", "results", "samples", "tensorboard", "vae")  # of a run's folder
RESULT_FOLDERS = {  # a file each
    "full": "model_index.json",
    "scratch": "model_index.json",
    "controlnet": "config.json",
    "vae": "config.json",
}
OTHER_MODELS = {  # else it has other weights
    "model_prediction": "another prediction",
    "model_schedule": "another noise schedule",
    "model_size": "another size",
}


EMBEDS = "learned_embeds"  # diffusers' name of a learned word's file


def word_as_file(token: str) -> str:
    """A learned word as a file's name."""
    return re.sub(r"[^\w.-]+", "-", token).strip("-.") or "word"


def lora_endings(kind: str) -> dict[str, str]:
    """What a LoRA's files add to the result's name, by naming of layers; diffusers reads plain LoRA alone."""
    return {"kohya": ".safetensors"} | ({"peft": "-peft.safetensors"} if kind == "lora" else {})


@dataclass
class TrainJob:
    """One call of `plainsd train`, with its options resolved."""

    options: TrainOptions
    world: World
    dtype: torch.dtype  # of the arithmetic
    identity: dict[str, Any] = made_by(default_factory=dict)  # as checked by `check_options`
    reads: dict[str, list[str]] = made_by(default_factory=dict)  # digests of the pictures, see data/record.py

    @property
    def out(self) -> Path:
        return self.options.out

    @property
    def name(self) -> str:
        """The name of the result, which is that of the run's folder."""
        return self.out.resolve().name or "model"

    def result(self, mark: str | None = None) -> Path:
        """Path of the result, without suffix; with a mark such as "step00000500", of an intermediate one."""
        return self.out / self.name if mark is None else self.out / "results" / f"{self.name}-{mark}"

    def result_files(self) -> list[Path]:
        """Files and folders that the whole result is written to."""
        options, place = self.options, self.result()
        if options.method == "vae":
            return [self.out / "vae"]
        if options.method == "inversion":
            return [self.out / f"{name}.safetensors" for name in (word_as_file(options.inversion.token or ""), EMBEDS)]
        if options.method == "lora":
            return [place.with_name(place.name + ending) for ending in lora_endings(options.lora.kind).values()]
        file = place.with_name(f"{place.name}.safetensors")
        return [place, file] if options.method == "controlnet" else [place]

    @property
    def save_dtype(self) -> torch.dtype:
        return DTYPES[self.options.telling.save_dtype]

    def say(self, text: str) -> None:
        self.world.say(text)

    @property
    def data(self) -> RunData:
        return RunData(self.options, self.world, self.dtype, self.reads)

    def on_device(self, network: nn.Module) -> nn.Module:
        return network.to(self.world.device).to(memory_format=torch.channels_last)

    # ---- what the run is

    def draw_seed(self) -> None:
        """Replaces -1 by a random seed, or by the seed of the run to resume; the same in every process."""
        if self.options.pace.seed != RANDOM:
            return
        file = self.out / OPTIONS_FILE
        seed = recorded_seed(file) if file.is_file() else drawn_seed()
        seed = int(self.world.total([seed if self.world.first else 0])[0])
        self.say(f"seed {seed}")
        self.options = replace(self.options, pace=replace(self.options.pace, seed=seed))

    def check_name(self) -> None:
        """UserError where what is to be written would replace what is not of this run. A whole model is a folder inside
        the run's, under the same name, and so is a ControlNet; an autoencoder is the folder `vae`."""
        alone, marker = self.options.method == "vae", RESULT_FOLDERS.get(self.options.method)
        place = self.out / "vae" if alone else self.result()
        begun = (self.out / OPTIONS_FILE).is_file()
        for path in () if begun else self.result_files():
            if path.exists():
                raise UserError(
                    f"{path} is in the way: the result is to be written there, and that is not of this run; remove it, "
                    "or give another --out"
                )
        if marker is None:
            return
        if self.name in RUN_FOLDERS and not alone:
            raise UserError(
                f"--out {self.out}: the result gets the folder's name, and {self.name!r} is a part of every run; "
                "give another"
            )
        if place.exists() and not (place / marker).is_file():
            raise UserError(
                f"{place} is in the way: the result is to be written there; remove it, or give another --out"
            )

    def check_means(self) -> None:
        """A UserError where the options want what is not there: a package, a loss, processes that can share a step."""
        telling, pace = self.options.telling, self.options.pace
        if self.world.sharded and (telling.save_results_every or telling.save_epochs):
            raise UserError("results on the way need whole weights, and --shard keeps them in parts; leave out "
                            "--save-results-every and --save-epochs, or --shard")  # fmt: skip
        self.world.check(given(pace.batch), given(pace.accumulate))
        self.objective()
        if pace.adam8bit:
            adam8bit(self.world.device)
        if telling.tensorboard:
            check_tensorboard()

    def check_options(self, **more: str) -> None:
        """A run resumes only with the same options, except for those without effect on it, and for more steps or
        epochs. With cosine decay, more steps change the learning rate from here on."""
        path, where = self.out / OPTIONS_FILE, real_places(self.options)
        now = flat(self.options) | {"dtype": str(self.dtype).removeprefix("torch.")} | more
        old = read_json(path, DAMAGED) if path.is_file() else {}
        idle = without_effect(self.options)  # older versions wrote down what did nothing
        if old.get("dtype") == "auto":  # as they wrote, on whichever device
            del old["dtype"]
        known = old.get("places")
        same = {name for name in where if isinstance(known, dict) and known.get(name) == where[name]}
        for name in now if old else ():
            if name in ("steps", "epochs") and longer(old.get(name), now[name]):
                self.say(f"{self.out} was to end after {old[name]} {name}; it goes on to {now[name]}")
            elif name not in FREE | idle | same and old.get(name, now[name]) != now[name]:
                model = f"a model of {OTHER_MODELS[name]}" if name in OTHER_MODELS else "a model with other weights"
                what = model if name in more else f"another --{name.replace('_', '-')}"
                raise UserError(
                    f"{self.out} holds a run with {what} ({old[name]}, now {now[name]}); give the same "
                    "options to resume, or another --out"
                )
        self.identity = now | {"places": where}

    def claim(self) -> None:
        """Takes the folder for this run. Called after all checks."""
        if self.world.first:
            says = f"plainsd train --config {self.out / CONFIG_FILE}\nPaths are as they were given, in {Path.cwd()}."
            with saving("what is trained on"):
                record(self.reads, self.out)
            claim(self.out, self.identity, config.config_text(self.options, says))

    # ---- the run

    def objective(self) -> Objective:
        loss = self.options.loss
        return (
            PLAIN_OBJECTIVE
            if self.distill()
            else Objective(loss.min_snr, loss.offset_noise, loss.perturbation, loss.huber)
        )

    def distill(self) -> Distill | None:
        own = self.options.lora
        return None if own.distill is None else Distill(own.distill, own.distill_steps, given(self.options.loss.huber))

    def spread(self, sd: "StableDiffusion") -> list[nn.Module]:
        """With --shard, spreads the networks that have something to learn over the processes, and the UNet always."""
        if not self.world.sharded:
            return []
        learning = [network for network in sd.text_encoders if any(p.requires_grad for p in network.parameters())]
        for network in (sd.unet, *learning):
            shard(network)
        return [sd.unet, *learning]

    def fit_options(self, epoch: int, size: int = 0) -> FitOptions:
        """`epoch`: positions in one; `size`: of the pictures."""
        pace, telling = self.options.pace, self.options.telling
        batch, accumulate = given(pace.batch), given(pace.accumulate)
        return FitOptions(
            steps=pace.steps or math.ceil(given(pace.epochs) * epoch / (batch * accumulate)),
            batch=batch,
            accumulate=accumulate,
            lr=given(pace.lr),
            warmup=given(pace.warmup),
            cosine=pace.decline == "cosine",
            betas=(0.9, pace.beta2),
            weight_decay=given(pace.weight_decay),
            clip=pace.clip,
            ema=pace.ema,
            seed=pace.seed,
            save_every=telling.save_every,
            keep=telling.keep,
            bf16=self.dtype == torch.bfloat16,
            adam8bit=pace.adam8bit,
            muon=pace.optimizer == "muon",
            long_attention=size >= 384,
        )

    def rhythm(self, epoch: int) -> Rhythm:
        """`epoch`: positions in one."""
        telling, pace = self.options.telling, self.options.pace
        return Rhythm(
            telling.log_every,
            telling.validate_every,
            telling.sample_every,
            telling.save_results_every,
            telling.save_epochs,
            Fraction(given(pace.batch) * given(pace.accumulate), epoch),
        )

    def train(
        self,
        method: Method,
        pictures: PictureSet,
        check: Callable[[], dict[str, float]] | None,
        sample: Callable[[Path], None] | None,
        *,
        before: bool = False,
        save: Callable[[str | None], None],
    ) -> bool:
        """To the end, with the averaged weights in place then; False where SIGTERM stopped it before. `save` writes the
        result; with a mark one on the way to it, see `result`."""
        order = self.data.order(pictures)
        rhythm = self.rhythm(order.count)
        options = self.fit_options(order.count, pictures.size)
        stopped = f"stopped and saved in {self.out}; the same command goes on from there"
        try:
            trainer = run_training(
                method,
                order,
                options,
                self.out,
                rhythm,
                check,
                sample,
                before=before,
                tensorboard=self.options.telling.tensorboard,
                world=self.world,
                save=save,
                claim=self.claim,
            )
        except Interrupted:
            self.say(stopped)
            raise
        if trainer is None:
            self.say(stopped)
            return False
        if trainer.ema:
            with torch.no_grad():
                for p, value in zip(trainer.parameters, trainer.ema.values, strict=True):
                    p.copy_(value)
        method.modules.eval()
        return True

    def sampler(
        self, sd: "StableDiffusion", net: ControlNet | None = None, *, pictures: PictureSet | None = None
    ) -> Callable[[Path], None] | None:
        """Draws a grid of the prompts, always with the same noise; with a ControlNet each after the map of one of the
        pictures, the first, the second, ... A UserError now for what cannot be drawn."""
        prompts = self.prompts()
        if self.world.first:
            self.data.compare("prompts", text_digests(prompts))
        begun = partial(self.begun, sd, prompts, net, pictures)
        list(begun())  # checks prompts and size

        def sample(path: Path) -> None:
            images = [image for events in begun() for image in final(events)]
            if self.world.first:
                write_png(grid(images, min(8, len(images))), path)

        return sample if prompts else None

    def begun(
        self, sd: StableDiffusion, prompts: list[str], net: ControlNet | None = None, pictures: PictureSet | None = None
    ) -> Iterator[Events]:
        """What draws the prompts, a few at a time; prompt i with seed i, or 0 where it has a map."""
        if net is None or pictures is None:
            for first in range(0, len(prompts), AT_ONCE):
                some = prompts[first : first + AT_ONCE]
                yield text_to_image(sd, some, seed=first, size=self.options.reading.size)
            return
        for i, prompt in enumerate(prompts):
            map = pictures.map(i % len(pictures))
            yield text_to_image(sd, prompt, seed=0, size=map.size, control=[Control(net, map)])

    def prompts(self) -> list[str]:
        file = self.options.telling.prompts
        return [] if file is None else read_prompts(file)

    def check_prompts(self, sd: StableDiffusion) -> None:
        """A UserError for what cannot be drawn, before anything takes long."""
        list(self.begun(sd, self.prompts()))
