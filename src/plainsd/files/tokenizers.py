"""A model's tokenizers, as the texts of their files; CLIP's where a single file has none."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path

from plainsd.files.stored import Contents
from plainsd.models.variants import Variant, encoder_names
from plainsd.text.tokenizer import CLIP, Tokenizer, find_vocabulary

CLIP_MERGES = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"  # SHA-256 of CLIP's, one a line


def tokenizer_names(variant: Variant) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in encoder_names(variant)]


def tokenizers(contents: Contents, path: Path) -> list[Tokenizer]:
    """One for each text encoder: the model's own; for a single file, from a vocabulary next to it, or CLIP's."""
    if any(name.startswith("tokenizer") for name in contents.texts):
        return read_tokenizers(contents.texts, contents.variant, path)
    vocabulary = find_vocabulary(path)
    stand_in = "CLIP's own" if vocabulary == CLIP else f"{vocabulary}, which is beside it,"
    warnings.warn(f"{path} has no tokenizer: {stand_in} stands in", stacklevel=2)
    pads = ["<|endoftext|>" if text.activation == "quick_gelu" else "!" for text in contents.variant.text]
    return [Tokenizer.from_vocabulary(vocabulary, pad=pad) for pad in pads]


def read_tokenizers(texts: dict[str, str], variant: Variant, where: str | Path = "the model") -> list[Tokenizer]:
    """From their files' texts, by paths in a model folder."""
    found = []
    for name in tokenizer_names(variant):
        own = {path.removeprefix(f"{name}/"): text for path, text in texts.items() if path.startswith(f"{name}/")}
        found.append(Tokenizer.from_texts(own, f"{where}: {name}"))
    return found


def tokenizer_texts(tokenizers: list[Tokenizer], variant: Variant) -> dict[str, str]:
    """The inverse: their files' texts, by paths in a model folder."""
    named = zip(tokenizer_names(variant), tokenizers, strict=True)
    return {f"{name}/{path}": text for name, one in named for path, text in sorted(one.to_texts().items())}


def is_clip(tokenizer: Tokenizer) -> bool:
    """Whether its tokens are exactly CLIP's, so that a single file needs no vocabulary."""
    merges = "\n".join(" ".join(pair) for pair in tokenizer.merges)
    return len(tokenizer) == 49_408 and hashlib.sha256(merges.encode()).hexdigest() == CLIP_MERGES
