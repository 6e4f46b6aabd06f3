"""The latent cache: a frozen autoencoder gives the same latents every epoch.

One file per set of pictures: the Gaussians of all views in float16, concatenated. A second file has a line per view:
its key, a digest of picture, view and autoencoder; its place; and the CRC-32 of its latents. Latents found in another
set's file in the same folder are copied, so that only new pictures are encoded; those whose sum is another are encoded
again.
"""

import hashlib
import itertools
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.models.vae import VAE
from plainsd.pictures.conditioning import Size
from plainsd.pictures.images import to_mask, to_tensor
from plainsd.train.data.crops import Framing, View, cut_out
from plainsd.train.data.pictures import PictureSet
from plainsd.train.order import Pick

KEY_LINE = re.compile(r"^([0-9a-f]{16}) (\d{1,15}) (\d{1,15})(?: ([0-9a-f]{8}))?$", re.MULTILINE)


@dataclass(frozen=True)
class Latents:
    """The VAE's Gaussian of every view of every picture: means, then standard deviations, then a mask if there is one.

    `data` is flat float16, mapped from a file. Picture i's views begin at starts[i], each of them (C, *shapes[i]).
    """

    data: Tensor
    shapes: list[tuple[int, int]]  # (h, w) of each picture
    starts: list[int]
    channels: int  # C: 2 L, and one more with masks
    views: int  # of each picture
    scaling_factor: float
    masked: bool

    def moments(self, index: int, view: int = 0) -> Tensor:
        """(C, h, w) float16."""
        shape = (self.channels, *self.shapes[index])
        size = shape[0] * shape[1] * shape[2]
        return self.data[self.starts[index] + view * size :][:size].view(shape)

    def choose(self, picks: Sequence[Pick]) -> list[int]:
        """The number of a view for each pick."""
        if self.views == 1:
            return [0] * len(picks)
        return [int(torch.randint(self.views, (), generator=p.generator)) for p in picks]

    def draw(self, picks: Sequence[Pick], views: Sequence[int] | None = None) -> Tensor:
        """A scaled latent of each pick, (B, L, h, w) float32. All must be of one shape."""
        moments = self._stacked(picks, views)
        return drawn_latents(moments[:, : self.channels // 2 * 2], picks, self.scaling_factor)

    def masks(self, picks: Sequence[Pick], views: Sequence[int] | None = None) -> Tensor | None:
        """The loss weight of each position, 0 to 1: (B, 1, h, w)."""
        return self._stacked(picks, views)[:, -1:] if self.masked else None

    def _stacked(self, picks: Sequence[Pick], views: Sequence[int] | None) -> Tensor:
        views = views or [0] * len(picks)
        return torch.stack([self.moments(p.index, v).float() for p, v in zip(picks, views, strict=True)])


def drawn_latents(moments: Tensor, picks: Sequence[Pick], scaling_factor: float) -> Tensor:
    """Means and standard deviations (B, 2 L, h, w) -> a scaled latent of each pick, by its own generator."""
    mean, std = moments.chunk(2, dim=1)
    noise = torch.stack([torch.randn(mean.shape[1:], generator=p.generator) for p in picks])
    return (mean + std * noise) * scaling_factor


def check_latents(vae: VAE) -> None:
    """A UserError for an autoencoder whose latents are not scaled by one number."""
    if vae.config.latents_mean is not None:
        raise UserError(
            "this autoencoder's latents are normalised channel by channel (latents_mean), as Playground 2.5's are, and "
            "training does not know that; choose another base"
        )


def cache_latents(
    vae: VAE,
    pictures: PictureSet,
    folder: Path,
    *,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
    check: bool = True,
    say: Callable[[str], None] = print,
) -> Latents:
    """Encodes every view of every picture once, into a file of `folder` that is named after them and the VAE.

    `workers` threads read pictures ahead. Their number changes nothing else. `check`: latents that are there already
    are read and compared with their sums.
    """
    config, count = vae.config, pictures.framing.count
    check_latents(vae)
    views = [pictures.views(i) for i in range(len(pictures))]
    masked = any(item.masked for item in pictures.items)
    channels = 2 * config.latent_channels + masked
    shapes = [(first.size[1] // config.factor, first.size[0] // config.factor) for first, *_ in views]
    sizes = [channels * h * w for h, w in shapes]  # of one view, in numbers
    starts = [0, *itertools.accumulate(size * count for size in sizes)]
    path = folder / f"latents-{fingerprint(vae, pictures)}.f16"
    there = path.is_file() and path.stat().st_size == 2 * starts[-1]
    if check or not there:
        wanted = [
            WantedView(i, view, starts[i] + n * sizes[i], sizes[i])
            for i, row in enumerate(views)
            for n, view in enumerate(row)
        ]
        keys = view_keys(vae, pictures, wanted, masked)
        if not there or not is_whole(path, wanted, keys, say):
            folder.mkdir(parents=True, exist_ok=True)
            sums = dict.fromkeys((want.start for want in wanted), 0)
            with written_whole(path) as unfinished, open(unfinished, "wb") as file:
                file.truncate(2 * starts[-1])
                for start, numbers in _made(vae, pictures, wanted, keys, folder, masked, batch, dtype, workers):
                    file.seek(2 * start)
                    file.write(numbers)
                    sums[start] = zlib.crc32(numbers)
                write_keys(path, wanted, keys, list(sums.values()))
    data = torch.from_file(str(path), shared=False, size=starts[-1], dtype=torch.float16)
    return Latents(data, shapes, starts[:-1], channels, count, config.scaling_factor, masked)


class WantedView(NamedTuple):
    """One view of one picture, and its place in the file, counted in numbers."""

    index: int  # type: ignore[assignment]  # hides the tuple's method, which nobody needs
    view: View
    start: int
    size: int


def _made(
    vae: VAE,
    pictures: PictureSet,
    wanted: list[WantedView],
    keys: list[str],
    folder: Path,
    masked: bool,
    batch: int,
    dtype: torch.dtype,
    workers: int,
) -> Iterator[tuple[int, bytes]]:
    """(start, float16 bytes) of every view: copied from another file of the folder, or encoded."""
    kept, missing = _kept(folder), []
    for key, want in zip(keys, wanted, strict=True):
        if key in kept and kept[key].size == want.size and (numbers := kept[key].read()) is not None:
            yield want.start, numbers
        else:
            missing.append(want)
    by_shape: dict[Size, list[WantedView]] = {}
    for want in missing:
        by_shape.setdefault(want.view.size, []).append(want)
    chunks = [group[i : i + batch] for group in by_shape.values() for i in range(0, len(group), batch)]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        load, many = partial(_load, pictures, masked, vae.config.factor), pool.map if workers else map
        coming = many(load, chunks[0]) if chunks else []
        for chunk, following in zip(
            tqdm(chunks, "encoding pictures", leave=False, disable=None), [*chunks[1:], []], strict=False
        ):
            pixels, masks = zip(*coming, strict=True)
            coming = many(load, following)
            moments = vae_moments(vae, torch.cat(pixels), dtype)
            moments = torch.cat([moments, torch.cat(masks)], dim=1) if masked else moments
            for want, one in zip(chunk, moments.half(), strict=True):
                yield want.start, one.contiguous().numpy().tobytes()


def _load(pictures: PictureSet, masked: bool, factor: int, want: WantedView) -> tuple[Tensor, Tensor | None]:
    """Pixels (1, 3, H, W); and with masks, the share of each latent position that counts, (1, 1, h, w)."""
    item = pictures.items[want.index]
    pixels = to_tensor(cut_out(item.open(), want.view))
    if not masked:
        return pixels, None
    light = to_mask(cut_out(item.open_mask(), want.view)) if item.masked else torch.ones(1, 1, *pixels.shape[2:])
    return pixels, F.avg_pool2d(light, factor)


@torch.no_grad()
def vae_moments(vae: VAE, pixels: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, 3, H, W) -> means and standard deviations, (B, 2L, H/f, W/f) float32 on the CPU."""
    device = next(vae.parameters()).device
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        q = vae.encode(pixels.to(device).contiguous(memory_format=torch.channels_last))
    return torch.cat([q.mean.float(), (0.5 * q.logvar.float()).exp()], dim=1).cpu()


# ---- names


def fingerprint(vae: VAE, pictures: PictureSet) -> str:
    """Sixteen hexadecimal digits that change with the VAE's weights, with the pictures and their masks, and with their
    size and how they are cut."""
    digest = hashlib.sha256(f"{vae.config} {pictures.size}".encode())
    _add_weights(digest, vae)
    for item in pictures.items:
        digest.update(f"{item.mark()}\n".encode())
    if pictures.framing != Framing():
        digest.update(f"{pictures.framing}".encode())
    for item in pictures.items:
        if item.masked:
            digest.update(f"{item.name} masked".encode())
    return digest.hexdigest()[:16]


def view_keys(vae: VAE, pictures: PictureSet, wanted: Sequence[WantedView], masked: bool) -> list[str]:
    """Sixteen hexadecimal digits for each view, that change with the VAE's weights, the picture, its mask, or the view.

    Files of older runs have masks under keys that did not know which; no key here is equal to one of those."""
    base = hashlib.sha256(f"{vae.config} {'masks and all' if masked else False}".encode())
    _add_weights(base, vae)
    marks = [item.mark() for item in pictures.items]
    return [hashlib.sha256(f"{base.hexdigest()} {marks[w.index]} {w.view}".encode()).hexdigest()[:16] for w in wanted]


def _add_weights(digest, vae: VAE) -> None:
    for tensor in vae.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())


# ---- what is kept


class KeptView(NamedTuple):
    """The latents of one view in a file. `crc`: None in files of older versions."""

    file: Path
    start: int
    size: int
    crc: int | None

    def read(self) -> bytes | None:
        """float16; None if they are not as they were written."""
        with open(self.file, "rb") as source:
            source.seek(2 * self.start)
            numbers = source.read(2 * self.size)
        return numbers if self.crc is None or zlib.crc32(numbers) == self.crc else None


def _kept(folder: Path) -> dict[str, KeptView]:
    """The latents in the files of a folder, by their keys."""
    return {key: view for file in sorted(folder.glob("latents-*.f16")) for key, view in kept_in(file)}


def kept_in(file: Path) -> Iterator[tuple[str, KeptView]]:
    """Key and latents of each view that lies in a file."""
    keys = file.with_suffix(".keys")
    if keys.is_file() and file.is_file():
        there = file.stat().st_size // 2
        for key, start, size, crc in KEY_LINE.findall(keys.read_text("utf-8", errors="replace")):
            view = KeptView(file, int(start), int(size), int(crc, 16) if crc else None)
            if view.start + view.size <= there:
                yield key, view


def write_keys(file: Path, wanted: Sequence[WantedView], keys: Sequence[str], sums: Sequence[int]) -> None:
    with written_whole(file.with_suffix(".keys")) as unfinished:
        lines = (f"{key} {w.start} {w.size} {crc:08x}\n" for key, w, crc in zip(keys, wanted, sums, strict=True))
        unfinished.write_text("".join(lines))


def is_whole(file: Path, wanted: Sequence[WantedView], keys: Sequence[str], say: Callable[[str], None]) -> bool:
    """Whether all latents in a file are as they were written. Those of older versions get their sums now."""
    known = {(key, view.start): view for key, view in kept_in(file)}
    sums, unknown, bad = [], 0, 0
    with open(file, "rb") as source:
        for key, want in zip(keys, wanted, strict=True):
            source.seek(2 * want.start)
            sums.append(zlib.crc32(source.read(2 * want.size)))
            written = known.get((key, want.start))
            unknown += written is None or written.crc is None
            bad += written is not None and written.crc not in (None, sums[-1])
    if unknown == len(wanted):
        say(f"{file} has no checksums, as older versions wrote it; it is taken as it is, and gets them now")
        write_keys(file, wanted, keys, sums)
    elif bad := bad + unknown:
        say(f"{file} is damaged: {bad} of {len(wanted)} latents are not as they were written; they are made again")
    return not bad
