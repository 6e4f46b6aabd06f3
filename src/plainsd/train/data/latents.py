"""The latent cache: a frozen autoencoder gives the same latents every epoch.

One file per set of pictures: the Gaussians of all views in float16, concatenated. A second file has one key per view, a
digest of picture, view and autoencoder: latents found in another set's file in the same folder are copied, so that only
new pictures are encoded.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator, Sequence
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

KEY_LINE = re.compile(r"^([0-9a-f]{16}) (\d{1,15}) (\d{1,15})$", re.MULTILINE)


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


def cache_latents(
    vae: VAE,
    pictures: PictureSet,
    folder: Path,
    *,
    batch: int = 64,
    dtype: torch.dtype = torch.float32,
    workers: int = 0,
) -> Latents:
    """Encodes every view of every picture once, into a file of `folder` that is named after them and the VAE.

    `workers` threads read pictures ahead. Their number changes nothing else.
    """
    config, count = vae.config, pictures.framing.count
    if config.latents_mean is not None:
        raise UserError(
            "this autoencoder's latents are normalised channel by channel (latents_mean), as Playground 2.5's are, and "
            "training does not know that; choose another base"
        )
    views = [pictures.views(i) for i in range(len(pictures))]
    masked = any(item.masked for item in pictures.items)
    channels = 2 * config.latent_channels + masked
    shapes = [(first.size[1] // config.factor, first.size[0] // config.factor) for first, *_ in views]
    sizes = [channels * h * w for h, w in shapes]  # of one view, in numbers
    starts = [0, *itertools.accumulate(size * count for size in sizes)]
    path = folder / f"latents-{fingerprint(vae, pictures)}.f16"
    if not path.is_file() or path.stat().st_size != 2 * starts[-1]:
        folder.mkdir(parents=True, exist_ok=True)
        wanted = [
            WantedView(i, view, starts[i] + n * sizes[i], sizes[i])
            for i, row in enumerate(views)
            for n, view in enumerate(row)
        ]
        keys = view_keys(vae, pictures, wanted, masked)
        with written_whole(path) as unfinished, open(unfinished, "wb") as file:
            file.truncate(2 * starts[-1])
            for start, numbers in _made(vae, pictures, wanted, keys, folder, masked, batch, dtype, workers):
                file.seek(2 * start)
                file.write(numbers)
        with written_whole(path.with_suffix(".keys")) as unfinished:
            unfinished.write_text("".join(f"{key} {w.start} {w.size}\n" for key, w in zip(keys, wanted, strict=True)))
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
        if key in kept and kept[key][2] == want.size:
            file, start, size = kept[key]
            with open(file, "rb") as source:
                source.seek(2 * start)
                yield want.start, source.read(2 * size)
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


def _kept(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """The latents in the files of a folder: key -> file, start, size."""
    kept: dict[str, tuple[Path, int, int]] = {}
    for keys in sorted(folder.glob("latents-*.keys")):
        file = keys.with_suffix(".f16")
        if file.is_file():
            lines = KEY_LINE.findall(keys.read_text("utf-8", errors="replace"))
            there = file.stat().st_size // 2
            found = ((key, int(start), int(size)) for key, start, size in lines)
            kept |= {key: (file, start, size) for key, start, size in found if start + size <= there}
    return kept
