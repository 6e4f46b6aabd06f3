"""CLIP embeddings of a folder's pictures, and its near-duplicates.

Two pictures are near-duplicates where the cosine of their embeddings is at least a threshold. Of each set of them the
first is kept: a picture is a duplicate of the kept one that is nearest to it.

Shape letters: N pictures, P width of an embedding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from plainsd.disk import written_whole
from plainsd.errors import UserError
from plainsd.files.tensorfile import stored, write_safetensors
from plainsd.listing import files_below, suffix_of
from plainsd.pictures.clip_score import Clip
from plainsd.pictures.images import open_picture
from plainsd.train.data.folders import is_beside, is_picture

CLIP_BATCH = 16  # pictures encoded at once
ROWS = 1024  # pictures compared at once with all before them
EMBEDDING_FORMATS = (".npz", ".safetensors")


class Duplicate(NamedTuple):
    """Numbers of a picture and of the kept one that it is like, and their cosine."""

    picture: int
    like: int
    cosine: float


def pictures_in(folder: Path) -> list[Path]:
    """All pictures of a folder and its subfolders; not the masks and maps beside them."""
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}; give one of pictures", field="folder", value=str(folder))
    found = [path for path in files_below(folder) if is_picture(path) and not is_beside(path)]
    if not found:
        raise UserError(f"{folder} has no pictures; give another folder", field="folder", value=str(folder))
    return found


def embedded(
    clip: Clip,
    paths: Sequence[Path],
    unreadable: Callable[[str], None],
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[list[Path], np.ndarray]:
    """The pictures that can be read, and their embeddings, (N, P) float32 of length 1. `unreadable` is called with a
    line for each of the others."""
    read, rows = [], []
    for start in range(0, len(paths), CLIP_BATCH):
        some = paths[start : start + CLIP_BATCH]
        images: list[Image.Image] = []
        for path in some:
            try:
                images.append(open_picture(path))
                read.append(path)
            except UserError as error:
                unreadable(str(error))
        if images:
            rows.append(clip.pictures(images).cpu().numpy())
        progress(len(some))
    if not rows:
        raise UserError("none of the pictures can be read; save them as PNG", field="folder")
    return read, np.concatenate(rows)


COSINE_ROUNDING = 1e-6


def near_duplicates(embeddings: np.ndarray, threshold: float) -> list[Duplicate]:
    """By the order of the pictures. `embeddings` (N, P) of length 1. In float32 the cosine of a vector with itself is 1
    but for COSINE_ROUNDING."""
    kept: np.ndarray = np.zeros(len(embeddings), dtype=bool)
    found: list[Duplicate] = []
    for start in range(0, len(embeddings), ROWS):
        block = embeddings[start : start + ROWS]
        cosines = block @ embeddings[: start + len(block)].T  # (R, all up to the last of them)
        for row, number in enumerate(range(start, start + len(block))):
            before = np.where(kept[:number], cosines[row, :number], -np.inf)
            nearest = int(before.argmax()) if number else 0
            if number and before[nearest] >= threshold - COSINE_ROUNDING:
                found.append(Duplicate(number, nearest, min(float(before[nearest]), 1.0)))
            else:
                kept[number] = True
    return found


def check_embeddings_file(path: Path) -> None:
    if suffix_of(path) not in EMBEDDING_FORMATS:
        raise UserError(f"--out '{path}': embeddings are written as .npz or .safetensors; name it so", field="out",
                        value=str(path))  # fmt: skip


def write_embeddings(path: Path, names: Sequence[str], embeddings: np.ndarray) -> None:
    """`embeddings` (N, P), and the pictures' names: the array `files` of an .npz, or `files` in the metadata of a
    .safetensors file, as a JSON list."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as draft:
        if suffix_of(path) == ".npz":
            with draft.open("wb") as file:  # by name, numpy would add a suffix
                np.savez(file, files=np.array(names), embeddings=embeddings)
        else:
            tensors = {"embeddings": stored(torch.from_numpy(embeddings))}
            write_safetensors(draft, tensors, {"files": json.dumps(list(names))})
