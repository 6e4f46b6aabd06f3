"""Captioned pictures in a folder, and which of them each step sees.

A folder holds `metadata.jsonl` (one line a picture: `file_name`, and `text`: a caption or a list of them), or pairs
`name.png` + `name.txt` (one caption a line). The order of the pictures is a function of (seed, position) alone.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from plainsd.errors import UserError
from plainsd.images import open_picture, to_tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Item:
    path: Path
    texts: tuple[str, ...]


@dataclass(frozen=True)
class Pictures:
    """Pictures of `size` x `size` pixels: resized so that the short side fits, the middle cut out."""

    items: tuple[Item, ...]
    size: int

    def __len__(self) -> int:
        return len(self.items)

    def pixels(self, indices: Sequence[int]) -> Tensor:
        """(B, 3, size, size) in [-1, 1]."""
        return torch.cat([to_tensor(fit_square(open_picture(self.items[i].path), self.size)) for i in indices])

    def caption(self, index: int, generator: torch.Generator) -> str:
        """One of the picture's captions, drawn with `generator`."""
        texts = self.items[index].texts
        return texts[int(torch.randint(len(texts), (), generator=generator))]


def fit_square(picture: Image.Image, size: int) -> Image.Image:
    scale = size / min(picture.size)
    if scale != 1:
        picture = picture.resize([max(size, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def read_folder(folder: str | Path, size: int, *, bad_share: float = 0.01, check: bool = True,
                say: Callable[[str], None] = print) -> Pictures:
    """All captioned pictures of a folder. Broken pictures and empty captions are left out, counted and listed.

    More than `bad_share` of them is a UserError: then something is wrong with the folder, not with a file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; --data wants a folder of captioned pictures")
    found = list(_from_metadata(folder) if (folder / "metadata.jsonl").is_file() else _from_pairs(folder))
    if not found:
        raise UserError(f"{folder}: no pictures; put metadata.jsonl there, or pairs such as cat.png and cat.txt")
    items, bad = [], []
    for item, fault in tqdm(found, "checking pictures", disable=None if check else True, leave=False):
        fault = fault or (_fault(item) if check else None)
        if fault:
            bad.append(f"{item.path.name}: {fault}")
        else:
            items.append(item)
    if bad:
        say(f"left out {len(bad)} of {len(found)} pictures: {'; '.join(bad[:5])}{' ...' if len(bad) > 5 else ''}")
    if not items or len(bad) > bad_share * len(found):
        raise UserError(f"{folder}: {len(bad)} of {len(found)} pictures cannot be used, more than {bad_share:.0%} "
                        f"(first: {bad[0]}); mend them or raise --bad-share")
    return Pictures(tuple(items), size)


def _from_metadata(folder: Path):
    for number, line in enumerate((folder / "metadata.jsonl").read_text("utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            texts = row["text"] if isinstance(row["text"], list) else [row["text"]]
            yield Item(folder / row["file_name"], tuple(t for t in texts if t.strip())), None
        except (ValueError, KeyError, TypeError, AttributeError):
            yield Item(folder / f"metadata.jsonl line {number}", ()), "not {\"file_name\": ..., \"text\": ...}"


def _from_pairs(folder: Path):
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES):
        text = path.with_suffix(".txt")
        lines = text.read_text("utf-8").splitlines() if text.is_file() else []
        yield Item(path, tuple(line for line in lines if line.strip())), None


def _fault(item: Item) -> str | None:
    if not item.texts:
        return "no caption"
    try:
        picture = open_picture(item.path)
    except (UserError, OSError) as error:
        return str(error)
    return f"only {picture.size[0]}x{picture.size[1]} pixels" if min(picture.size) < 8 else None


# ---- which pictures, and which random numbers: functions of (seed, position)


class Order:
    """Every epoch all pictures once, each epoch in another order. Position p counts pictures from the run's start."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed
        self._epoch, self._permutation = -1, None

    def __call__(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, torch.randperm(self.count, generator=random(self.seed, 1, epoch))
        return int(self._permutation[place])


def random(seed: int, purpose: int, position: int) -> torch.Generator:
    """A generator of its own for each (seed, purpose, position): whoever draws first, the numbers are the same."""
    mixed = (seed * 0x9E3779B97F4A7C15 + purpose * 0xBF58476D1CE4E5B9 + position * 0x94D049BB133111EB) % 2**64
    mixed ^= mixed >> 31
    mixed = mixed * 0xD6E8FEB86659FD93 % 2**64           # a 64-bit mix, so that neighbours have unrelated seeds
    return torch.Generator().manual_seed((mixed ^ mixed >> 32) & (2**63 - 1))
