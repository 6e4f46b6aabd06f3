"""Embeddings (textual inversion): the files of one folder, each with a trigger word.

An embedding is used if its word occurs in the prompt or negative prompt, as in A1111. A request may also list the
embeddings that it needs, by word or file name: one that is missing or does not fit the model is then an error.
"""

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from plainsd.adapters.embeddings import add_embedding, fitting, names_in, not_read, occurs_in, parsed_embedding
from plainsd.adapters.embeddings import embedding_content as read_content
from plainsd.errors import UserError, unknown
from plainsd.models.clip import TextEncoder
from plainsd.pictures.model import StableDiffusion
from plainsd.server.folders import changed_at, read_cached, readable_files

MAX_FILE_BYTES = 16 * 2**20  # bytes


class Embedding(NamedTuple):
    name: str  # of the file, or its path below the folder
    text: str  # the trigger word
    path: Path
    changed: int  # when, in nanoseconds

    def within(self, prompt: str) -> bool:
        """Whether the tokenizer finds it in the prompt."""
        return occurs_in(self.text, prompt)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name; empty if the file no longer exists."""
        held, _ = read_cached(content_of, self.path, self.changed)
        return held[1] if held else {}

    def vectors(self) -> list[Tensor]:
        """(N, D) for each text encoder, shapes only."""
        return list(self.tensors().values())


class Embeddings:
    """The embeddings of a folder, scanned at each access. Safetensors only."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.unusable: dict[str, str] = {}  # files that were skipped, and why, as of the last scan

    def known(self) -> list[Embedding]:
        found: dict[str, Embedding] = {}
        unusable: dict[str, str] = {}
        for name, (path, (text, _)) in readable_files(content_of, self.folder, unusable).items():
            text = text or path.stem
            if text in found:
                unusable[name] = f"{text!r} is already the word of {found[text].name!r}; remove one of them"
            else:
                found[text] = Embedding(name, text, path, changed_at(path))
        self.unusable = unusable
        return list(found.values())

    def get(self, wanted: str) -> Embedding:
        """By its word or, where none has that word, by its file name."""
        known = self.known()
        called = [*((one.text, one) for one in known), *((one.name, one) for one in known)]
        for same in (str, str.lower):  # A1111's texts have the case of the file's name
            for name, embedding in called:
                if same(wanted) == same(name):
                    return embedding
        if wanted in self.unusable:
            what = f"embeddings: {wanted!r} cannot be used: {self.unusable[wanted]}"
            raise UserError(what, field="embeddings", value=wanted)
        if self.folder is None:
            raise UserError(
                f"embeddings: there is no embedding {wanted!r}; start the server with --embeddings FOLDER",
                field="embeddings",
            )
        if not known:
            raise UserError(
                f"embeddings: there is no embedding {wanted!r}; put .safetensors files into the folder of --embeddings",
                field="embeddings",
            )
        raise UserError(
            f"embeddings: {unknown('embedding', wanted, [embedding.text for embedding in known])}", field="embeddings"
        )

    def fitting(self, bare: StableDiffusion) -> list[Embedding]:
        """Those that fit this model."""
        return [embedding for embedding in self.known() if incompatibility(bare, embedding) is None]

    def used(self, bare: StableDiffusion, wanted: Sequence[str], prompts: str) -> list[Embedding]:
        """Those used by these prompts. UserError if a required one is missing or does not fit the model."""
        requested = [self.get(one) for one in wanted]
        for embedding in requested:
            if (why := incompatibility(bare, embedding)) is not None:
                raise UserError(f"embeddings: {why}", field="embeddings")
        embeddings = [
            embedding
            for embedding in self.known()
            if embedding.within(prompts) and (embedding in requested or incompatibility(bare, embedding) is None)
        ]
        with_embeddings(bare, embeddings)
        return embeddings


def content_of(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The word, if the file has it, and the shapes of its vectors. UserError if it is not an embedding."""
    if (size := path.stat().st_size) > MAX_FILE_BYTES:
        raise UserError(f"{path} has {size} bytes, an embedding at most {MAX_FILE_BYTES}; it is not an embedding")
    name, found = parsed_embedding(content := read_content(path, shapes_only=True))
    if not found:
        raise not_read(path, names_in(content))
    if not all(one.ndim in (1, 2) and one.numel() for one in found.values()):
        raise UserError(f"{path} has no vectors of an embedding; it is not an embedding")
    text = path.stem if name is None else name
    if text.strip() != text or text == "" or not text.isprintable() or "," in text:  # a comma parts them
        raise UserError(f"{path} is for the word {text!r}, which cannot be written in a prompt; rename it")
    return name, {key: one.reshape(-1, one.shape[-1]) for key, one in found.items()}


def incompatibility(bare: StableDiffusion, embedding: Embedding) -> str | None:
    """Why a model cannot use this embedding, or None. The message does not reveal the path of its file."""
    try:
        vectors = fitting(bare, embedding.path, embedding.tensors())
    except UserError as error:
        return str(error).replace(str(embedding.path), embedding.name)
    if any(embedding.text in tokenizer.vocabulary for tokenizer in bare.tokenizers):
        return f"{embedding.text!r} is a word of this model already; give the file of the embedding another name"
    room = min(encoder.config.positions for encoder in bare.text_encoders) - 2
    if (count := max(map(len, vectors))) > room:
        return f"{embedding.text!r} has {count} vectors, and this model reads at most {room} tokens; take a shorter one"
    return None


def with_embeddings(sd: StableDiffusion, embeddings: Sequence[Embedding]) -> StableDiffusion:
    """A copy of the model with just these embeddings; all but the token tables is shared."""
    if not embeddings:
        return sd
    learned = with_own_words(sd)
    for embedding in embeddings:
        try:
            add_embedding(learned, embedding.path, embedding.text)
        except UserError as error:
            raise UserError(
                f"embeddings: {str(error).replace(str(embedding.path), embedding.name)}", field="embeddings"
            ) from None
    return learned


def with_own_words(sd: StableDiffusion) -> StableDiffusion:
    """A copy that can learn words for itself: it has its own tokenizers and token tables, and shares the rest."""
    return replace(
        sd,
        tokenizers=[deepcopy(one) for one in sd.tokenizers],
        text_encoders=[with_own_table(one) for one in sd.text_encoders],
    )


def with_own_table(encoder: TextEncoder) -> TextEncoder:
    twin = copy(encoder)
    twin._modules = dict(encoder._modules)
    twin.token = copy(encoder.token)
    twin.token._modules = dict(encoder.token._modules)  # its adapters: those that it has now are shared
    twin.token._parameters = {"weight": nn.Parameter(encoder.token.weight.detach().clone(), requires_grad=False)}
    return twin
