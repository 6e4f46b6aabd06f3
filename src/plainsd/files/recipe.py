"""What a model was made of, written into it: for other programs as A1111 does, and for us in model_index.json."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plainsd.errors import UserError
from plainsd.files.configs import NOTE
from plainsd.files.hashes import file_hash, weights_hash
from plainsd.files.stored import Contents

AVERAGED = "model_ema."  # a training's averaged copy of the weights, which would no longer be of this model


def with_recipe(contents: Contents, recipe: Mapping[str, Any], models: Mapping[str, str]) -> Contents:
    """The contents with a note of how they were made; `models`: hash -> name of all that went in.

    A single file gets A1111's two entries of metadata; every layout gets the recipe in model_index.json."""
    index = json.loads(contents.texts["model_index.json"])
    index[NOTE] = (index.get(NOTE) or {}) | {"recipe": dict(recipe)}
    texts = contents.texts | {"model_index.json": json.dumps(index, indent=2, sort_keys=True) + "\n"}
    notes = {
        "sd_merge_recipe": json.dumps(dict(recipe)),
        "sd_merge_models": json.dumps({digits: {"name": name} for digits, name in models.items()}),
    }
    leftovers = {name: stored for name, stored in contents.leftovers.items() if not name.startswith(AVERAGED)}
    return replace(contents, texts=texts, notes=contents.notes | notes, leftovers=leftovers)


def digits_of(path: Path) -> str:
    """A file's SHA-256, as A1111 names models; of a folder ten digits of its UNet's."""
    return file_hash(path) if path.is_file() else weights_hash(path, "unet") or path.name


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """In the type that a file shall hold. UserError where its numbers are too large for that."""
    narrow = tensor.to(dtype)
    if not narrow.isfinite().all():
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} would hold numbers that {kind} cannot, or none at all; write it with --dtype float32")
    return narrow
