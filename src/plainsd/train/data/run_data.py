"""What a run is fed: its pictures, whether they are those of its last start, their latents and their order."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from plainsd.allocator import release_freed_memory
from plainsd.errors import UserError
from plainsd.models.tiny_vae import AnyVAEConfig
from plainsd.models.vae import VAE
from plainsd.pictures.defaults import size_multiple
from plainsd.pictures.model import StableDiffusion
from plainsd.train.checkpoints import checkpoints, saving
from plainsd.train.checks import as_flag
from plainsd.train.data.ahead import PixelsOf, pictures_ahead
from plainsd.train.data.captions import cut_captions
from plainsd.train.data.crops import Framing, check_whole_latents
from plainsd.train.data.examples import Examples
from plainsd.train.data.folders import Reading
from plainsd.train.data.heldout import of_run
from plainsd.train.data.latents import Latents, cache_latents
from plainsd.train.data.live import LiveLatents
from plainsd.train.data.pictures import PictureSet, described, joined_sets, some_texts
from plainsd.train.data.record import changes, picture_digests
from plainsd.train.data.scenes import SCENE_PREFIX
from plainsd.train.data.sources import folder_of, is_listed, is_table, read_source
from plainsd.train.options import Data, TrainOptions, given
from plainsd.train.order import Bucketed, Repeated
from plainsd.train.processes import World

ENCODED_AT_ONCE = 2**18  # pixels, where pictures are large


def heldout_folder(options: TrainOptions) -> Path | None:
    """Where the files of --heldout lie, which may be inside other sources."""
    return folder_of(str(options.reading.heldout)) if options.reading.heldout else None


@dataclass
class RunData:
    """What `options` have a run read."""

    options: TrainOptions
    world: World
    dtype: torch.dtype  # of the arithmetic
    reads: dict[str, list[str]]  # digests of what was read so far, see record.py

    def pictures(self, size: int, vae: AnyVAEConfig) -> tuple[PictureSet, PictureSet | None]:
        """Training pictures, and held-out pictures, of the model's `size` where --size does not say another."""
        data = self.options.reading
        size, prior = data.size or size, self.options.prior.prior
        check_whole_latents(size, vae.factor)
        shape = Framing(data.buckets, multiple=size_multiple(vae)) if data.buckets else Framing()
        framing = replace(shape, crop=data.crop, places=data.places, flip=data.flip)
        sources, held = [folder_of(source) for source in self.options.data], heldout_folder(self.options)
        self._check_columns()
        found = joined_sets(self._read(source, size, held, prior) for source in self.options.data)
        pictures = PictureSet(found.items, size, framing, data.shuffle_tags)
        if framing != Framing() and any(item.computed for item in pictures.items):
            raise UserError("captions of emoji scenes say where things are; leave out --buckets, --crop and --flip")
        heldout = None
        if held:
            found = self._read(str(data.heldout), size, *sources, prior, heldout=True)
            heldout = PictureSet(found.items, size, shape)
            scenes = str(data.heldout).startswith(SCENE_PREFIX)  # the same file has both
            if not scenes and held.resolve() in [source.resolve() for source in sources]:
                self.world.say(
                    f"--heldout {data.heldout} is trained on too: what is measured with it is not validation"
                )
        elif data.hold_out:
            pictures, heldout = pictures.split(data.hold_out, self._held(pictures))
            heldout = PictureSet(heldout.items, size, shape)
        self.world.say(described(pictures))
        self.compare_pictures("pictures", pictures)
        if heldout:
            self.compare_pictures("heldout", heldout)
        return pictures, heldout

    def compare_pictures(self, part: str, pictures: PictureSet) -> None:
        if self.world.first:
            with saving("what is trained on"):
                digests = picture_digests(pictures.items, self.options.out / "cache")
            self.compare(part, digests)

    def compare(self, part: str, digests: list[str]) -> None:
        """Says whether a part of what the run reads is that of its last start; see data/record.py."""
        self.reads[part] = digests
        if checkpoints(self.options.out / "checkpoints") and (line := changes(digests, self.options.out, part)):
            self.world.say(line)

    def _check_columns(self) -> None:
        """A UserError for options of tables where none is read."""
        data, sources = self.options.reading, [*self.options.data]
        if data.heldout:
            sources.append(str(data.heldout))
        names = [
            name
            for name in ("text_column", "picture_column", "split", "stream")
            if getattr(data, name) != getattr(Data, name)
        ]
        if not names or any(is_table(source, [self.options.out]) for source in sources):
            return
        if names == ["text_column"] and any(is_listed(source) for source in sources):
            return
        raise UserError(
            f"{as_flag(names[-1])} is for parquet files, tar shards and datasets on the hub, and there is none in "
            f"--data {' '.join(sources)}; leave it out",
            field=names[-1],
        )

    def _read(self, source: str, size: int, *others: Path | None, heldout: bool = False) -> PictureSet:
        """One source, without other sources and the run's folder, which may lie inside it."""
        data = self.options.reading
        without = (*filter(None, others), self.options.out)
        place = folder_of(source).resolve()
        for other in without:
            if other.exists() and place in other.resolve().parents:
                self.world.say(f"{other} lies in {source}, and is not taken for a part of it")
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
            return read_source(source, size, self.options.out / "cache", reading, self.world.say)

    def _held(self, pictures: PictureSet) -> set[int]:
        """The numbers of the pictures that this run holds out."""
        begun, share = bool(checkpoints(self.options.out / "checkpoints")), self.options.reading.hold_out
        with self.world.first_goes_ahead(), saving("what is held out"):
            return of_run(
                pictures.items, share, self.options.out, begun=begun, writes=self.world.first, say=self.world.say
            )

    @contextmanager
    def pixels(self, pictures: PictureSet) -> Iterator[PixelsOf]:
        """What gives the pixels of picks: scenes are drawn ahead of them, by other processes."""
        with pictures_ahead(pictures, self.order(pictures), self.options.reading.workers) as pixels:
            yield pixels

    def latents(self, vae: VAE, pictures: PictureSet, *, batch: int = 64) -> Latents:
        with self.world.first_goes_ahead(), saving("the cached latents"):
            cached = cache_latents(
                vae,
                pictures,
                self.options.out / "cache",
                batch=batch,
                dtype=self.dtype,
                workers=self.options.reading.workers,
                check=self.world.first,
                say=self.world.say,
            )
        release_freed_memory()  # the feature maps of encoding
        return cached

    def live_examples(self, vae: VAE, pictures: PictureSet, pixels: PixelsOf) -> Examples:
        """Without cached latents."""
        loss = self.options.loss
        latents = LiveLatents(vae, pictures, pixels, self.dtype)
        return Examples(pictures, latents, given(loss.dropout), loss.timestep_power)

    def examples(self, vae: VAE, pictures: PictureSet) -> Examples:
        batch = max(1, min(64, ENCODED_AT_ONCE // pictures.size**2)) if pictures.size > 128 else 64
        loss = self.options.loss
        return Examples(pictures, self.latents(vae, pictures, batch=batch), given(loss.dropout), loss.timestep_power)

    def count_long_captions(self, sd: StableDiffusion, pictures: PictureSet) -> None:
        """Reports how many captions are truncated, if any."""
        (captions, _), chunks = some_texts(pictures.items), self.options.reading.chunks
        if count := cut_captions(sd, sorted(captions), chunks):
            room = min(encoder.config.positions - 2 for encoder in sd.text_encoders) * chunks
            self.world.say(
                f"{count} of {len(captions)} captions are longer than what is read of them ({room} tokens); raise "
                "--chunks to read more"
            )

    def order(self, pictures: PictureSet) -> Repeated | Bucketed:
        repeats, pace = [item.repeats for item in pictures.items], self.options.pace
        if not pictures.framing.buckets:
            return Repeated(repeats, pace.seed)
        order = Bucketed(
            [pictures.views(i)[0].size for i in range(len(pictures))], repeats, given(pace.batch), pace.seed
        )
        if order.surplus:
            self.world.say(
                f"{order.surplus} pictures an epoch are shown once more, to fill up micro-batches of one shape"
            )
        return order
