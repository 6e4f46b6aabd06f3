"""Embeddings (textual inversion) that the server knows: files of one folder, each of them a word for prompts.

A word is used where a prompt or negative prompt has it, as in A1111. A request may also name those that it relies on,
by word or by file: then one that is not there, or does not fit the model, is an error and not a plain word.
"""

import re
from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from plainsd.adapters.embeddings import add_embedding, fitting, parsed_embedding
from plainsd.adapters.embeddings import embedding_content as read_content
from plainsd.errors import UserError, unknown
from plainsd.models.clip import TextEncoder
from plainsd.pictures.model import StableDiffusion
from plainsd.server.folders import attempted, changed_at, readable

LARGEST = 16 * 2**20  # bytes; what is larger is something else


class Word(NamedTuple):
    name: str  # the file's, or its place below the folder
    text: str  # what is written in prompts
    path: Path
    changed: int  # when, in nanoseconds

    def within(self, prompt: str) -> bool:
        """Whether the tokenizer will find it there: in any case, and a name of letters only as a whole word."""
        start, end = (r"\b" if sign.isalnum() else "" for sign in (self.text[0], self.text[-1]))
        return re.search(f"{start}{re.escape(self.text.lower())}{end}", prompt.lower()) is not None

    def tensors(self) -> dict[str, Tensor]:
        """By the file's names; none where the file is gone."""
        held, _ = attempted(content_of, self.path, self.changed)
        return held[1] if held else {}

    def vectors(self) -> list[Tensor]:
        """(N, D) for each text encoder, without their numbers."""
        return list(self.tensors().values())


class Words:
    """Those in the folder, looked for anew each time. Safetensors only."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}  # files that are passed over, and why; as of the last look

    def known(self) -> list[Word]:
        found: dict[str, Word] = {}
        unusable: dict[str, str] = {}
        for name, (path, (text, _)) in readable(content_of, self.folder, unusable).items():
            text = text or path.stem
            if text in found:
                unusable[name] = f"{text!r} is the word of {found[text].name!r} already; take one of them away"
            else:
                found[text] = Word(name, text, path, changed_at(path))
        self.unusable = unusable
        return list(found.values())

    def word(self, wanted: str) -> Word:
        """By its word, or by its file's name."""
        known = self.known()
        for word in known:
            if wanted in (word.text, word.name):
                return word
        if wanted in self.unusable:
            what = f"embeddings: {wanted!r} cannot be used: {self.unusable[wanted]}"
            raise UserError(what, field="embeddings", value=wanted)
        if self.folder is None:
            raise UserError(
                f"embeddings: there is none called {wanted!r}; start the server with --embeddings FOLDER",
                field="embeddings",
            )
        if not known:
            raise UserError(
                f"embeddings: there is none called {wanted!r}; put .safetensors files into the folder of --embeddings",
                field="embeddings",
            )
        raise UserError(
            f"embeddings: {unknown('embedding', wanted, [word.text for word in known])}", field="embeddings"
        )

    def fitting(self, bare: StableDiffusion) -> list[Word]:
        """Those made for this kind of model."""
        return [word for word in self.known() if problem(bare, word) is None]

    def used(self, bare: StableDiffusion, wanted: Sequence[str], prompt: str, negative: str) -> list[Word]:
        """What these prompts use. UserError where one that is wanted is not there, or does not fit the model."""
        texts = f"{prompt}\n{negative}"
        relied = [self.word(one) for one in wanted]
        for word in relied:
            if (why := problem(bare, word)) is not None:
                raise UserError(f"embeddings: {why}", field="embeddings")
        words = [
            word for word in self.known() if word.within(texts) and (word in relied or problem(bare, word) is None)
        ]
        taught(bare, words)
        return words


def content_of(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The word, where the file tells it, and vectors without numbers. UserError for what is no embedding."""
    if (size := path.stat().st_size) > LARGEST:
        raise UserError(f"{path} has {size} bytes, an embedding at most {LARGEST}; it is something else")
    name, found = parsed_embedding(read_content(path, shapes_only=True))
    if not found or not all(one.ndim in (1, 2) and one.numel() for one in found.values()):
        raise UserError(f"{path} has no vectors of an embedding; it is something else")
    text = path.stem if name is None else name
    if text.strip() != text or text == "" or not text.isprintable() or "," in text:  # a comma parts them
        raise UserError(f"{path} is for the word {text!r}, which cannot be written in a prompt; rename it")
    return name, {key: one.reshape(-1, one.shape[-1]) for key, one in found.items()}


def problem(bare: StableDiffusion, word: Word) -> str | None:
    """Why a model cannot learn this word; None where it can. Clients need not know where its file lies."""
    try:
        vectors = fitting(bare, word.path, word.tensors())
    except UserError as error:
        return str(error).replace(str(word.path), word.name)
    if any(word.text in tokenizer.vocabulary for tokenizer in bare.tokenizers):
        return f"{word.text!r} is a word of this model already; give the file of the embedding another name"
    room = min(encoder.config.positions for encoder in bare.text_encoders) - 2
    if (count := max(map(len, vectors))) > room:
        return f"{word.text!r} has {count} vectors, and this model reads at most {room} tokens; take a shorter one"
    return None


def taught(sd: StableDiffusion, words: Sequence[Word]) -> StableDiffusion:
    """The model with these words, and no others; the one given stays as it is. They share all but the tables of
    tokens."""
    if not words:
        return sd
    learned = replace(
        sd,
        tokenizers=[deepcopy(one) for one in sd.tokenizers],
        text_encoders=[with_own_table(one) for one in sd.text_encoders],
    )
    for word in words:
        try:
            add_embedding(learned, word.path, word.text)
        except UserError as error:
            raise UserError(
                f"embeddings: {str(error).replace(str(word.path), word.name)}", field="embeddings"
            ) from None
    return learned


def with_own_table(encoder: TextEncoder) -> TextEncoder:
    twin = copy(encoder)
    twin._modules = dict(encoder._modules)
    twin.token = copy(encoder.token)  # and its adapters, which they share
    twin.token._parameters = {"weight": nn.Parameter(encoder.token.weight.detach().clone(), requires_grad=False)}
    return twin
