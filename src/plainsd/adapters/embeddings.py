"""Textual inversion: a new word for prompts, one or more learned vectors for a frozen model.

Gal et al. 2022 (arXiv:2208.01618). Files come in two dialects:

    A1111       .safetensors with `emb_params`, .pt with `string_to_param`; the word is the file's name
    diffusers   one tensor under the word itself, such as `<cat>`, in .safetensors or .bin

For SDXL both hold the vectors of its two text encoders, as `clip_l` and `clip_g`, and the word is the file's name.
Files written here also store the word itself, under WORD. (A1111's .pt has a `name` next to the vectors; A1111 still
uses the file's name, diffusers that one.) A LoRA file may contain words too, as `bundle_emb.<word>.` and the names
above.

Shape letters: N vectors of one word, D width of a text encoder.
"""

from __future__ import annotations

import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plainsd.adapters.names import BUNDLE
from plainsd.disk import written_whole
from plainsd.errors import WITH_NAMES, UserError, shortened, unknown
from plainsd.files.detect import EMBEDDING, seems
from plainsd.files.pickles import unpickled
from plainsd.files.tensorfile import TensorFile, open_safetensors, stored, write_safetensors
from plainsd.listing import suffix_of
from plainsd.models.clip import TextEncoder
from plainsd.models.variants import encoder_names
from plainsd.pictures.model import StableDiffusion

DIALECTS = ("a1111", "diffusers")
PICKLE_SUFFIXES = (".pt", ".bin")
EMBEDDING_FILES = ("learned_embeds.safetensors", "learned_embeds.bin")
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
WORD_KEY = "plainsd.word"  # in a safetensors file's metadata, or next to the vectors in a pickle
NO_WORDS = ("emb_params", "emp_params", "*", "clip_h")  # keys of a lone tensor; emp_params is OneTrainer's
OUTPUTS = re.compile(r"(clip_[lgh]|em[bp]_params)_out")  # OneTrainer's, in place of what an encoder makes of the word
ONLY = "only"  # the key of a file's vectors where it has those of one text encoder
FAMILIES = {(768,): "SD 1.x", (1024,): "SD 2.x", (768, 1280): "SDXL", (1280,): "SDXL's refiner"}  # by all widths


# --- words of a model ------------------------------------------------------------------------------------------------


def add_embedding(sd: StableDiffusion, path: str | Path, token: str | None = None) -> str:
    """Adds a file's word to a model, renamed if `token` is given; returns the word to write in prompts."""
    path = in_folder(Path(path))
    name, found = read_vectors(path)
    token = token or name or path.stem
    vectors = fitting(sd, path, found)
    add_word(sd, token, vectors)
    return token


def add_word(sd: StableDiffusion, token: str, vectors: Sequence[Tensor]) -> list[int]:
    """A new word with these vectors, (N, D) for each text encoder; returns the ids of its N tokens."""
    check_word(sd, token, vectors)
    for tokenizer, encoder, rows in zip(sd.tokenizers, sd.text_encoders, vectors, strict=True):
        ids = tokenizer.add(token, len(rows))
        write_rows(encoder, ids, rows)
    return ids


def check_word(sd: StableDiffusion, token: str, vectors: Sequence[Tensor]) -> None:
    """A UserError where `add_word` cannot add this word."""
    counts = {len(rows) for rows in vectors}
    room = min(encoder.config.positions for encoder in sd.text_encoders) - 2
    if len(counts) != 1 or not 1 <= min(counts) <= room:
        raise UserError(
            f"{token!r} has {' and '.join(map(str, sorted(counts)))} vectors; each text encoder needs "
            f"equally many, from 1 to {room}"
        )
    for tokenizer, encoder in zip(sd.tokenizers, sd.text_encoders, strict=True):
        if len(tokenizer) > len(encoder.token.weight):
            raise UserError(
                f"the tokenizer knows {len(tokenizer)} tokens and the text encoder "
                f"{len(encoder.token.weight)}; they belong to different models"
            )
    for tokenizer, rows in zip(sd.tokenizers, vectors, strict=True):
        tokenizer.new_names(token, len(rows))


@torch.no_grad()
def write_rows(encoder: TextEncoder, ids: Sequence[int], rows: Tensor) -> None:
    """Writes rows of the encoder's token table, extending it if needed."""
    table = encoder.token.weight
    if missing := max(0, ids[-1] + 1 - len(table)):
        longer = torch.cat([table, table.new_zeros(missing, table.shape[1])])
        encoder.token.weight, encoder.token.num_embeddings = nn.Parameter(longer, table.requires_grad), len(longer)
        encoder.config = replace(encoder.config, vocab=len(longer))
    encoder.token.weight[list(ids)] = rows.to(table)


def vectors_of(sd: StableDiffusion, token: str) -> list[Tensor]:
    """A learned word's vectors, (N, D) for each text encoder."""
    found = []
    for tokenizer, encoder in zip(sd.tokenizers, sd.text_encoders, strict=True):
        units = tokenizer.units(token)
        if len(units) != 1 or min(units[0]) < len(tokenizer.vocabulary):
            raise UserError(f"{token!r} is not a learned word of this model; add it, or train it, first")
        found.append(encoder.token.weight[units[0]].detach().clone())
    return found


def occurs_in(word: str, prompt: str) -> bool:
    """Whether a tokenizer that has learned the word finds it in the prompt: in any case, and one that begins and ends
    with letters or digits only as a whole word, see `Tokenizer.add` (tokenizers 0.23, `AddedVocabulary`)."""
    whole = word[:1].isalnum() and word[-1:].isalnum()
    word, prompt = (re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower() for text in (word, prompt))
    places = re.finditer(re.escape(word), prompt) if word else ()
    return any(not (whole and (_of_word(prompt, at.start() - 1) or _of_word(prompt, at.end()))) for at in places)


def _of_word(text: str, place: int) -> bool:
    """Whether there is a letter, a mark on one, a digit or a low line."""
    return 0 <= place < len(text) and unicodedata.category(text[place]) in OF_WORDS


OF_WORDS = {"Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Nd", "Nl", "Pc"}  # categories of signs


# --- words that come with a LoRA -------------------------------------------------------------------------------------

BUNDLED = re.compile(r"bundle_emb\.(.+)\.(clip_l|clip_g|emb_params|string_to_param\.\*)")


def bundled(sd: StableDiffusion, file: TensorFile, *, partial: bool = False) -> dict[str, list[Tensor]]:
    """The words in a LoRA file, with (N, D) vectors for each text encoder. UserError where they are for another kind of
    model, and for unsupported vectors; with `partial` these are ignored, with a warning."""
    words: dict[str, dict[str, Tensor]] = {}
    names = [name for name in file.tensors if name.startswith(BUNDLE)]
    if unsupported := [name for name in names if not BUNDLED.fullmatch(name)]:
        what = f"{file.path} brings words along in a way that is not supported, {quoted(unsupported)}"
        if not partial:
            raise UserError(
                f"{what}; known are {BUNDLE}<word>.clip_l, .clip_g, .emb_params and .string_to_param.*; to use the "
                "rest of it, accept that (--lora-partial)",
                most=WITH_NAMES,
            )
        warnings.warn(f"{what}: they are ignored", stacklevel=3)
    for name in names:
        if match := BUNDLED.fullmatch(name):
            word, key = match.groups()
            words.setdefault(word, {})[key if key in XL_KEYS.values() else ONLY] = file.tensors[name].read()
    vectors = {word: usable(file.path, found) for word, found in words.items()}
    if sd.unet.config.vector is None:  # one text encoder, whatever the file calls it
        vectors = {word: {ONLY: next(iter(found.values()))} for word, found in vectors.items() if len(found) == 1}
    return {word: fitting(sd, file.path, vectors.get(word, found)) for word, found in words.items()}


def learn(sd: StableDiffusion, words: Mapping[str, Sequence[Tensor]]) -> None:
    """Adds words. A known one with the same number of vectors is overwritten."""
    for word, vectors in words.items():
        known = [tokenizer.units(word) for tokenizer in sd.tokenizers]
        if all(len(units) == 1 and min(units[0]) >= len(tokenizer.vocabulary) and len(units[0]) == len(rows)
               for units, tokenizer, rows in zip(known, sd.tokenizers, vectors, strict=True)):  # fmt: skip
            for encoder, units, rows in zip(sd.text_encoders, known, vectors, strict=True):
                write_rows(encoder, units[0], rows)
        else:
            add_word(sd, word, vectors)


def quoted(names: Sequence[str]) -> str:
    return ", ".join(repr(shortened(name, 90)) for name in names[:5]) + (", ..." if len(names) > 5 else "")


# --- reading ---------------------------------------------------------------------------------------------------------


class Parameters:
    """Stands in for torch.nn.ParameterDict in a pickle, and keeps its tensors."""

    tensors: object = None

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.tensors = state["_parameters"]


def in_folder(path: Path) -> Path:
    if path.is_dir():
        inside = [path / name for name in EMBEDDING_FILES if (path / name).is_file()]
        if not inside:
            raise UserError(f"{path} is a folder without {EMBEDDING_FILES[0]}; give the embedding's own file")
        return inside[0]
    return path


def read_vectors(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    """The word, if the file has it, and the vectors: under ONLY, or under clip_l and clip_g."""
    content = embedding_content(path)
    name, found = parsed_embedding(content)
    if not found:
        raise not_read(path, names_in(content))
    return name, usable(path, found)


def names_in(content: object) -> list[str]:
    return [str(name) for name in content if name != WORD_KEY] if isinstance(content, dict) else []


def not_read(path: Path, names: Sequence[str]) -> UserError:
    """The error for a file of these names."""
    if outputs := [name for name in names if OUTPUTS.fullmatch(name)]:
        what = f"vectors for the outputs of text encoders, which are not supported, {quoted(outputs)}"
        remedy = "take another embedding, or train it without OneTrainer's output embedding"
        return UserError(f"{path} holds {what}; {remedy}", most=WITH_NAMES)
    if (what := seems(names)) == EMBEDDING:
        known = "string_to_param with one word, emb_params, clip_l and clip_g, or one tensor under the word"
        return UserError(f"{path} holds {what} in a form that is not supported, {quoted(names)}; known are {known}",
                         most=WITH_NAMES)  # fmt: skip
    return UserError(f"{path} holds no textual-inversion embedding: it seems to be {what}")


def usable(path: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vectors as (N, D)."""
    for vectors in found.values():
        whole = vectors.ndim in (1, 2) and vectors.shape[-1] > 0 and vectors.is_floating_point()
        if not whole or not vectors.float().isfinite().all():
            raise UserError(
                f"{path} holds no usable vectors: shape {list(vectors.shape)}, {vectors.dtype}, or values "
                "that are not finite; download it again"
            )
    return {key: vectors.detach().reshape(-1, vectors.shape[-1]) for key, vectors in found.items()}


def embedding_content(path: Path, *, shapes_only: bool = False) -> object:
    """A file's tensors by name. `shapes_only`: do not read the values of a safetensors file."""
    if suffix_of(path) in PICKLE_SUFFIXES:
        return pickled(path)
    file = open_safetensors(path)
    read = (lambda one: torch.empty(one.shape, device="meta")) if shapes_only else (lambda one: one.read())
    word = {WORD_KEY: file.metadata[WORD_KEY]} if WORD_KEY in file.metadata else {}
    return {name: read(tensor) for name, tensor in file.tensors.items()} | word


def pickled(path: Path) -> object:
    return unpickled(path, [(Parameters, "torch.nn.modules.container.ParameterDict")])


def embedding_in(path: Path) -> tuple[str, str] | None:
    """A summary of an embedding file, by names and shapes: its word, and `3 vectors of 768 numbers, SD 1.x`. None for
    other files."""
    if suffix_of(path) not in (*PICKLE_SUFFIXES, ".safetensors"):
        return None
    content = embedding_content(path, shapes_only=True)
    if not isinstance(content, dict) or (WORD_KEY not in content and seems(map(str, content)) != EMBEDDING):
        return None
    word, tensors = parsed_embedding(content)
    found = [vectors for _, vectors in sorted(tensors.items(), reverse=True)]  # clip_l first
    if not found or not all(vectors.ndim for vectors in found):
        return None
    widths, counts = tuple(v.shape[-1] for v in found), {v.shape[0] if v.ndim > 1 else 1 for v in found}
    family = f", {FAMILIES[widths]}" if widths in FAMILIES else ""
    vectors = f"{' and '.join(map(str, counts))} vectors of {' and '.join(map(str, widths))} numbers{family}"
    other = content.get("name")
    calls = f"; diffusers calls it {other}" if isinstance(other, str) and other != path.stem else ""
    return word or f"{path.stem}, after the file, as in A1111{calls}", vectors


def parsed_embedding(content: object) -> tuple[str | None, dict[str, Tensor]]:
    """The vectors by text encoder; empty for an unknown form."""
    if isinstance(content, Tensor):
        return None, {ONLY: content}
    if not isinstance(content, dict):
        return None, {}
    word = content.get(WORD_KEY)
    word = word if isinstance(word, str) and word.isprintable() and word.strip() else None
    table = content.get("string_to_param")
    if table is not None:
        table = table.tensors if isinstance(table, Parameters) else table
        found = list(table.values()) if isinstance(table, dict) else []
        return word, {ONLY: found[0]} if len(found) == 1 and isinstance(found[0], Tensor) else {}
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and tensors.keys() <= set(XL_KEYS.values()):
        return word, tensors
    if len(tensors) != 1 or any(map(OUTPUTS.fullmatch, tensors)):
        return None, {}
    ((key, vectors),) = tensors.items()
    return word or (None if key in NO_WORDS else key), {ONLY: vectors}


def fitting(sd: StableDiffusion, path: Path, found: Mapping[str, Tensor]) -> list[Tensor]:
    """The vectors for each of the model's text encoders. UserError where the file is for another kind of model."""
    names, xl = encoder_names(sd.variant), sd.unet.config.vector is not None
    if len(names) == len(found) == 1:  # whatever the file calls the encoder
        found = {ONLY: next(iter(found.values()))}
    keys = [XL_KEYS[name] if xl and ONLY not in found else ONLY for name in names]
    wanted = tuple(encoder.config.width for encoder in sd.text_encoders)
    has = {key: vectors.shape[1] for key, vectors in sorted(found.items(), reverse=True)}  # clip_l first
    if tuple(has.get(key) for key in keys) != wanted or len(set(keys)) < len(keys):
        widths = tuple(has.values())
        family = f" for {FAMILIES[widths]}" if widths in FAMILIES else ""
        raise UserError(
            f"{path} holds vectors of {' and '.join(map(str, widths))} numbers{family}, and this model "
            f"({sd.variant.name}) needs {' and '.join(map(str, wanted))}; take an embedding made for it"
        )
    return [found[key] for key in keys]


# --- writing ---------------------------------------------------------------------------------------------------------


def save_embedding(sd: StableDiffusion, token: str, path: str | Path, dialect: str = "a1111") -> None:
    """Writes a learned word: .safetensors in both dialects, or .pt for A1111 and .bin for diffusers. A1111, and both
    with SDXL, name it after the file; plainsd keeps the word, but in SDXL's .pt. The file is written whole or
    not at all."""
    if dialect not in DIALECTS:
        raise unknown("embedding dialect", dialect, DIALECTS)
    path, pickled = Path(path), {"a1111": ".pt", "diffusers": ".bin"}[dialect]
    if suffix_of(path) not in (".safetensors", pickled):
        raise UserError(
            f"{path}: an embedding in the dialect {dialect!r} is written as .safetensors or {pickled}; "
            "give it that ending"
        )
    vectors = [rows.cpu() for rows in vectors_of(sd, token)]
    xl = sd.unet.config.vector is not None
    own = token if dialect == "diffusers" else "emb_params"
    keys = [XL_KEYS[name] for name in encoder_names(sd.variant)] if xl else [own]
    table = dict(zip(keys, vectors, strict=True))
    if "emb_params" in table and suffix_of(path) == ".pt":
        content: dict[str, Any] = {
            "string_to_token": {"*": 265},
            "string_to_param": {"*": vectors[0]},
            "name": token,
            WORD_KEY: token,
        }
        content |= {"step": 0, "sd_checkpoint": None, "sd_checkpoint_name": None}
    else:  # diffusers takes the key of a lone entry as the word, and A1111 every entry of SDXL's for a tensor
        content = table | {WORD_KEY: token} if xl and suffix_of(path) == ".bin" else table
    with written_whole(path) as draft:
        if suffix_of(path) == ".safetensors":
            write_safetensors(draft, {key: stored(rows) for key, rows in table.items()}, {WORD_KEY: token})
        else:
            with open(draft, "wb") as file:  # torch would wrap an error of the disk in its own
                torch.save(content, file)
