"""A model's files in either layout: read, written, and turned into each other a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from plainsd.device import choose_dtype
from plainsd.errors import unknown
from plainsd.files.folder import read_folder, write_folder
from plainsd.files.hub import find
from plainsd.files.single import read_single, write_single
from plainsd.files.stored import Contents
from plainsd.files.tokenizers import is_clip, read_tokenizers, tokenizer_texts, tokenizers
from plainsd.listing import suffix_of

LAYOUTS = ("diffusers", "single-file")


def convert(
    source: str | Path,
    target: str | Path,
    layout: str | None = None,
    *,
    variant_file: str | None = None,
    family: str | None = None,
    dtype: str | torch.dtype | None = None,
    change: Callable[[Contents], Contents] = lambda contents: contents,
) -> None:
    """From one layout to the other, a tensor at a time. There and back again is bit-identical, names included. The
    layout None is read off the target's name, as by `save`. `change`: what is done on the way."""
    path = find(source, variant_file)
    contents = change(read(path, variant_file, family))
    if not any(name.startswith("tokenizer") for name in contents.texts):
        texts = tokenizer_texts(tokenizers(contents, path), contents.variant)
        contents = replace(contents, texts=contents.texts | texts)
    write(contents, Path(target), layout, dtype and choose_dtype(dtype, torch.device("cpu")))


def read(path: Path, variant_file: str | None = None, family: str | None = None, *, vae: bool = True) -> Contents:
    if path.is_dir():
        return read_folder(path, variant_file)
    return read_single(path, family, vae=vae)


def write(contents: Contents, target: Path, layout: str | None, dtype: torch.dtype | None) -> None:
    layout = layout or ("single-file" if suffix_of(target) == ".safetensors" else "diffusers")
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if layout == "diffusers":
        return write_folder(contents, target, dtype)
    own = {path: text for path, text in contents.texts.items() if path.startswith("tokenizer")}
    if all(is_clip(tokenizer) for tokenizer in read_tokenizers(own, contents.variant)):
        contents = replace(contents, texts={path: text for path, text in contents.texts.items() if path not in own})
    return write_single(contents, target, dtype)
