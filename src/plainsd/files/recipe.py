"""The recipe of a merged model, stored in it: as A1111 does for other programs, and in model_index.json for us."""

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
from plainsd.json_reader import parsed_json

AVERAGED = "model_ema."  # the EMA copy of the weights, which no longer fits the merged model


def with_recipe(contents: Contents, recipe: Mapping[str, Any], models: Mapping[str, str]) -> Contents:
    """The contents with their recipe; `models`: hash -> name of every source.

    A single file gets A1111's two entries of metadata; every layout gets the recipe in model_index.json."""
    index = parsed_json(contents.texts["model_index.json"])
    index[NOTE] = (index.get(NOTE) or {}) | {"recipe": dict(recipe)}
    texts = contents.texts | {"model_index.json": json.dumps(index, indent=2, sort_keys=True) + "\n"}
    notes = {
        "sd_merge_recipe": json.dumps(dict(recipe)),
        "sd_merge_models": json.dumps({digits: {"name": name} for digits, name in models.items()}),
    }
    leftovers = {name: stored for name, stored in contents.leftovers.items() if not name.startswith(AVERAGED)}
    kept = {
        name: text for name, text in contents.notes.items() if not name.startswith("modelspec.")
    }  # of the old model
    return replace(contents, texts=texts, notes=kept | notes, leftovers=leftovers)


def digits_of(path: Path) -> str:
    """A file's SHA-256, as A1111 identifies models; for a folder, ten digits of its UNet's."""
    return file_hash(path) if path.is_file() else weights_hash(path, "unet") or path.name


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast to the dtype of the file. UserError where values overflow it."""
    narrow = tensor.to(dtype)
    if not narrow.float().isfinite().all():  # float8 has no isfinite
        kind = str(dtype).removeprefix("torch.")
        raise UserError(f"{name} would hold numbers that {kind} cannot, or none at all; write it with --dtype float32")
    return narrow
