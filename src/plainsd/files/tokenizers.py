"""A model's tokenizers, as the texts of their files; CLIP's where a single file has none."""

from __future__ import annotations

import warnings
from functools import lru_cache
from pathlib import Path

from plainsd.files.stored import Contents
from plainsd.models.clip import TextConfig
from plainsd.models.variants import Variant, encoder_names
from plainsd.text.tokenizer import CLIP, Tokenizer, find_vocabulary


def tokenizer_names(variant: Variant) -> list[str]:
    return [name.replace("text_encoder", "tokenizer") for name in encoder_names(variant)]


def tokenizers(contents: Contents, path: Path) -> list[Tokenizer]:
    """One for each text encoder: the model's own; for a single file, from a vocabulary next to it, or CLIP's."""
    if any(name.startswith("tokenizer") for name in contents.texts):
        return read_tokenizers(contents.texts, contents.variant, path)
    vocabulary = find_vocabulary(path)
    stand_in = "CLIP's own" if vocabulary == CLIP else f"{vocabulary}, which is beside it,"
    warnings.warn(f"{path} has no tokenizer: {stand_in} stands in", stacklevel=2)
    return [stand_in_for(text, vocabulary) for text in contents.variant.text]


def stand_in_for(text: TextConfig, vocabulary: Path = CLIP) -> Tokenizer:
    """OpenAI's text encoder was trained with end tokens behind a text, OpenCLIP's with `!`, whose id is 0."""
    return Tokenizer.from_vocabulary(vocabulary, pad="<|endoftext|>" if text.activation == "quick_gelu" else "!")


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


def is_stand_in(tokenizer: Tokenizer, text: TextConfig) -> bool:
    """Whether it reads every text as the one that stands in for it, so that a single file needs no tokenizer."""
    other = known_stand_in(text.activation)
    numbers = [(one.start, one.end, one.pad, one.max_length, len(one)) for one in (tokenizer, other)]
    if numbers[0] != numbers[1]:
        return False
    return tokenizer.merges == other.merges and tokenizer.vocabulary == other.vocabulary


@lru_cache
def known_stand_in(activation: str) -> Tokenizer:
    return stand_in_for(TextConfig(activation=activation))
