"""What all methods of `plainsd train` share between options and loop: pictures, the run's folder, the run."""

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from dataclasses import field as made_by
from fractions import Fraction
from pathlib import Path

import torch
from torch import nn

from plainsd.allocator import release_freed_memory
from plainsd.device import DTYPES
from plainsd.disk import read_json
from plainsd.errors import UserError
from plainsd.listing import read_prompts
from plainsd.models.control import ControlNet
from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.vae import VAE
from plainsd.pictures.control import Control
from plainsd.pictures.defaults import size_multiple
from plainsd.pictures.images import grid, write_png
from plainsd.pictures.model import StableDiffusion
from plainsd.pictures.settings import RANDOM, drawn_seed
from plainsd.train import config
from plainsd.train.checkpoints import checkpoints, saving
from plainsd.train.claim import CONFIG_FILE, OPTIONS_FILE, claim
from plainsd.train.consistency import Distill
from plainsd.train.data.ahead import PixelsOf, pictures_ahead
from plainsd.train.data.captions import cut_captions
from plainsd.train.data.crops import Framing, check_whole_latents
from plainsd.train.data.examples import Examples
from plainsd.train.data.heldout import of_run
from plainsd.train.data.latents import Latents, cache_latents
from plainsd.train.data.live import LiveLatents
from plainsd.train.data.pictures import PictureSet, described, joined_sets, some_texts
from plainsd.train.data.record import changes, picture_digests, record, text_digests
from plainsd.train.data.scenes import SCENE_PREFIX
from plainsd.train.data.sources import Reading, parse_source, read_source
from plainsd.train.objective import PLAIN_OBJECTIVE, Objective
from plainsd.train.options import FitOptions, TrainOptions, given
from plainsd.train.order import Bucketed, Repeated
from plainsd.train.processes import World
from plainsd.train.run import Interrupted, Rhythm, run_training
from plainsd.train.shard import shard
from plainsd.train.trainer import Method

ENCODED_AT_ONCE = 2**18  # pixels, where pictures are large
FREE = {"out", "keep", "save_every", "log_every", "validate_every", "sample_every", "tensorboard", "workers",
        "config", "save_results_every", "save_epochs"}  # fmt: skip
RUN_FOLDERS = ("cache", "checkpoints", "prior", "results", "samples", "tensorboard", "vae")  # of a run's folder


@dataclass
class TrainJob:
    """One call of `plainsd train`, with its options resolved."""

    options: TrainOptions
    world: World
    dtype: torch.dtype  # of the arithmetic
    identity: dict[str, str] = made_by(default_factory=dict)  # as checked by `check_options`
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

    @property
    def save_dtype(self) -> torch.dtype:
        return DTYPES[self.options.telling.save_dtype]

    def say(self, text: str) -> None:
        if self.world.first:
            print(text, flush=True)

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
        """A whole model is a folder inside the run's, under the same name."""
        place = self.result()
        if self.options.method not in ("full", "scratch"):
            return
        if self.name in RUN_FOLDERS:
            raise UserError(
                f"--out {self.out}: the model gets the folder's name, and {self.name!r} is a part of every run; "
                "give another"
            )
        if place.exists() and not (place / "model_index.json").is_file():
            raise UserError(
                f"{place} is in the way: the model is to be written there; remove it, or give another --out"
            )

    def check_options(self, **more: str) -> None:
        """A run resumes only with the same options, except for those without effect on it, and for more steps or
        epochs. With cosine decay, more steps change the learning rate from here on."""
        path, now = self.out / OPTIONS_FILE, flat(self.options) | more
        old = read_json(path, DAMAGED) if path.is_file() else {}
        for name in now if old else ():
            if name in ("steps", "epochs") and longer(old.get(name), now[name]):
                self.say(f"{self.out} was to end after {old[name]} {name}; it goes on to {now[name]}")
            elif name not in FREE and old.get(name, now[name]) != now[name]:
                what = f"another --{name.replace('_', '-')}" if name not in more else "a model with other weights"
                raise UserError(
                    f"{self.out} holds a run with {what} ({old[name]}, now {now[name]}); give the same "
                    "options to resume, or another --out"
                )
        self.identity = now

    def claim(self) -> None:
        """Takes the folder for this run. Called after all checks."""
        if self.world.first:
            says = f"plainsd train --config {self.out / CONFIG_FILE}\nPaths are as they were given, in {Path.cwd()}."
            with saving("what is trained on"):
                record(self.reads, self.out)
            claim(self.out, self.identity, config.config_text(self.options, says))

    # ---- pictures

    def pictures(self, size: int, vae: AnyVAEConfig) -> tuple[PictureSet, PictureSet | None]:
        """Training pictures, and held-out pictures, of the model's `size` where --size does not say another."""
        data = self.options.reading
        size, prior = data.size or size, self.options.prior.prior
        check_whole_latents(size, vae.factor)
        shape = Framing(data.buckets, multiple=size_multiple(vae)) if data.buckets else Framing()
        framing = replace(shape, crop=data.crop, places=data.places, flip=data.flip)
        sources = [Path(parse_source(source)[0]) for source in self.options.data]
        found = joined_sets(self.read(source, size, data.heldout, prior) for source in self.options.data)
        pictures = PictureSet(found.items, size, framing, data.shuffle_tags)
        if framing != Framing() and any(item.computed for item in pictures.items):
            raise UserError("captions of emoji scenes say where things are; leave out --buckets, --crop and --flip")
        heldout = None
        if data.heldout:
            found = self.read(str(data.heldout), size, *sources, prior, heldout=True)
            heldout = PictureSet(found.items, size, shape)
            scenes = str(data.heldout).startswith(SCENE_PREFIX)  # the same file has both
            if not scenes and data.heldout.resolve() in [source.resolve() for source in sources]:
                self.say(f"--heldout {data.heldout} is trained on too: what is measured with it is not validation")
        elif data.hold_out:
            pictures, heldout = pictures.split(data.hold_out, self._held(pictures))
            heldout = PictureSet(heldout.items, size, shape)
        self.say(described(pictures))
        self.compare_pictures("pictures", pictures)
        if heldout:
            self.compare_pictures("heldout", heldout)
        return pictures, heldout

    def compare_pictures(self, part: str, pictures: PictureSet) -> None:
        if self.world.first:
            with saving("what is trained on"):
                digests = picture_digests(pictures.items, self.out / "cache")
            self.compare(part, digests)

    def compare(self, part: str, digests: list[str]) -> None:
        """Says whether a part of what the run reads is that of its last start; see data/record.py."""
        self.reads[part] = digests
        if checkpoints(self.out / "checkpoints") and (line := changes(digests, self.out, part)):
            self.say(line)

    def read(self, source: str, size: int, *others: Path | None, heldout: bool = False) -> PictureSet:
        """One source, without other sources and the run's folder, which may lie inside it."""
        data = self.options.reading
        without = (*filter(None, others), self.out)
        place = Path(parse_source(source)[0]).resolve()
        for other in without:
            if other.exists() and place in other.resolve().parents:
                self.say(f"{other} lies in {source}, and is not taken for a part of it")
        reading = Reading(
            data.caption,
            data.picture_column,
            data.text_column,
            data.split,
            data.stream,
            data.limit,
            data.bad_share,
            heldout,
            without,
        )
        with self.world.first_goes_ahead():
            return read_source(source, size, self.out / "cache", reading, self.say)

    def _held(self, pictures: PictureSet) -> set[int]:
        """The numbers of the pictures that this run holds out."""
        begun, share = bool(checkpoints(self.out / "checkpoints")), self.options.reading.hold_out
        with self.world.first_goes_ahead(), saving("what is held out"):
            return of_run(pictures.items, share, self.out, begun=begun, writes=self.world.first, say=self.say)

    @contextmanager
    def pixels(self, pictures: PictureSet) -> Iterator[PixelsOf]:
        """What gives the pixels of picks: scenes are drawn ahead of them, by other processes."""
        with pictures_ahead(pictures, self.order(pictures), self.options.reading.workers) as pixels:
            yield pixels

    def latents(self, vae: "VAE", pictures: PictureSet, *, batch: int = 64) -> Latents:
        with self.world.first_goes_ahead(), saving("the cached latents"):
            cached = cache_latents(
                vae,
                pictures,
                self.out / "cache",
                batch=batch,
                dtype=self.dtype,
                workers=self.options.reading.workers,
                check=self.world.first,
                say=self.say,
            )
        release_freed_memory()  # the feature maps of encoding
        return cached

    def live_examples(self, vae: "VAE", pictures: PictureSet, pixels: PixelsOf) -> Examples:
        """Without cached latents."""
        loss = self.options.loss
        latents = LiveLatents(vae, pictures, pixels, self.dtype)
        return Examples(pictures, latents, given(loss.dropout), loss.timestep_power)

    def examples(self, vae: "VAE", pictures: PictureSet) -> Examples:
        batch = max(1, min(64, ENCODED_AT_ONCE // pictures.size**2)) if pictures.size > 128 else 64
        loss = self.options.loss
        return Examples(pictures, self.latents(vae, pictures, batch=batch), given(loss.dropout), loss.timestep_power)

    def count_long_captions(self, sd: "StableDiffusion", pictures: PictureSet) -> None:
        """Reports how many captions are truncated, if any."""
        (captions, _), chunks = some_texts(pictures.items), self.options.reading.chunks
        if count := cut_captions(sd, sorted(captions), chunks):
            room = min(encoder.config.positions - 2 for encoder in sd.text_encoders) * chunks
            self.say(
                f"{count} of {len(captions)} captions are longer than what is read of them ({room} tokens); raise "
                "--chunks to read more"
            )

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

    # ---- the run

    def spread(self, sd: "StableDiffusion") -> list[nn.Module]:
        """With --shard, spreads the networks that have something to learn over the processes, and the UNet always."""
        if not self.world.sharded:
            return []
        learning = [network for network in sd.text_encoders if any(p.requires_grad for p in network.parameters())]
        for network in (sd.unet, *learning):
            shard(network)
        return [sd.unet, *learning]

    def order(self, pictures: PictureSet) -> Repeated | Bucketed:
        repeats, pace = [item.repeats for item in pictures.items], self.options.pace
        if not pictures.framing.buckets:
            return Repeated(repeats, pace.seed)
        order = Bucketed(
            [pictures.views(i)[0].size for i in range(len(pictures))], repeats, given(pace.batch), pace.seed
        )
        if order.surplus:
            self.say(f"{order.surplus} pictures an epoch are shown once more, to fill up micro-batches of one shape")
        return order

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
        telling, order = self.options.telling, self.order(pictures)
        if self.world.sharded and (telling.save_results_every or telling.save_epochs):
            raise UserError("results on the way need whole weights, and --shard keeps them in parts; leave out "
                            "--save-results-every and --save-epochs, or --shard")  # fmt: skip
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
                tensorboard=telling.tensorboard,
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
        pictures, the first, the second, ..."""
        file = self.options.telling.prompts
        if file is None:
            return None
        prompts = read_prompts(file)
        if self.world.first:
            self.compare("prompts", text_digests(prompts))

        def sample(path: Path) -> None:
            from plainsd.generate import final, text_to_image

            if net is None or pictures is None:
                images = final(text_to_image(sd, prompts, seed=0, size=self.options.reading.size))
            else:
                maps = [pictures.map(i % len(pictures)) for i in range(len(prompts))]
                images = [
                    final(text_to_image(sd, prompt, seed=0, size=map.size, control=[Control(net, map)]))[0]
                    for prompt, map in zip(prompts, maps, strict=True)
                ]
            if self.world.first:
                write_png(grid(images, min(8, len(images))), path)

        return sample


def longer(old: object, now: str) -> bool:
    """Of two numbers of steps or epochs as text, None among them."""
    return isinstance(old, str) and old.isdecimal() and now.isdecimal() and int(now) > int(old[:20])


DAMAGED = "put it back from a copy, or give another --out"


def recorded_seed(file: Path) -> int:
    """Of the run with these options."""
    seed = read_json(file, DAMAGED).get("seed", "0")
    if not (isinstance(seed, str) and re.fullmatch(r"\d{1,20}", seed)):
        raise UserError(f"{file} is damaged: it has the seed {seed!r}; {DAMAGED}")
    return int(seed)


def flat(options) -> dict[str, str]:
    """Every option by its own name, as text."""
    found: dict[str, str] = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if is_dataclass(value) and not isinstance(value, type):
            found |= {name: str(entry) for name, entry in asdict(value).items()}
        else:
            found[field.name] = " ".join(value) if field.name == "data" else str(value)
    return found


def weights_digest(*networks: nn.Module) -> str:
    """Sixteen hexadecimal digits that other weights do not have: of up to 16 numbers of each tensor."""
    digest = hashlib.sha256()
    for network in networks:
        for name, tensor in network.state_dict().items():
            some = tensor.flatten()[:: max(1, tensor.numel() // 16)][:16]
            digest.update(f"{name} {tuple(tensor.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
