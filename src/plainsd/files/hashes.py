"""Hashes that identify weights in a picture's infotext, in A1111's forms, which model sites look pictures up by.

The hash of a model or an autoencoder is the first ten digits of its file's SHA-256, that of an embedding the first
twelve. That of a LoRA is the first twelve digits of the SHA-256 of the bytes after the safetensors header, which
kohya's trainer stores in the header as `sshs_model_hash`: it does not change with the metadata. A1111 has no hash for a
model folder; here it is that of the UNet's file, or of the digests of its shards.

A file of 4 GB takes two seconds. Hashes of large files are cached in the user's cache folder, by path, size and time.
"""

import functools
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from plainsd.disk import cache_folder, read_json, written_whole
from plainsd.errors import DiskError, UserError
from plainsd.files.hub import find
from plainsd.listing import hidden, suffix_of

LARGE = 2**26  # bytes; smaller files are hashed every time
MAX_CACHED_HASHES = 500  # hashes of large files
HASHED_SUFFIXES = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
Hashes = tuple[tuple[str, str], ...]  # ("model", "6ce0161689"), ("vae", ...), ("lora:name", ...), ("embed:word", ...)


def hashes(
    model: Path | None,
    vae: Path | None = None,
    loras: Iterable[tuple[str, Path]] = (),
    words: Iterable[tuple[str, Path]] = (),
) -> Hashes:
    """The hashes of all weights used for a picture; `vae` if it is not the model's own. Weights without a file have
    none."""
    found = [("model", weights_hash(model, "unet")), ("vae", weights_hash(vae, "vae"))]
    found += [(f"lora:{name}", file_hash(weights_of(path)[0], tensors_only=True)[:12]) for name, path in loras]
    found += [(f"embed:{word}", file_hash(weights_of(path)[0])[:12]) for word, path in words]
    return tuple((name, value) for name, value in found if value)


def weights_hash(path: Path | None, part: str) -> str | None:
    """Ten digits for a file, or for a folder with the weights of a model or of one part; a Hub id is looked up in the
    cache."""
    if path is None:
        return None
    path = find(path, local=True)
    digests = [file_hash(file) for file in weights_of(path / part if (path / part).is_dir() else path)]
    whole = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return whole[:10] if digests else None


def weights_of(path: Path) -> list[Path]:
    """The file itself, or those in the folder."""
    return (
        [path]
        if path.is_file()
        else [file for file in sorted(path.iterdir()) if suffix_of(file) in HASHED_SUFFIXES and not hidden(file.name)]
    )


def file_hash(path: Path, *, tensors_only: bool = False) -> str:
    """SHA-256 in hexadecimal digits; with `tensors_only`, of a safetensors file without its header."""
    stat = path.stat()
    return _file_hash(
        path.resolve(), stat.st_size, stat.st_mtime_ns, tensors_only and suffix_of(path) == ".safetensors"
    )


@functools.cache
def _file_hash(path: Path, size: int, time: int, tensors_only: bool) -> str:
    kept, key = cache_folder() / "hashes.json", f"{path} {size} {time} {tensors_only}"
    known = _known(kept) if size >= LARGE else {}
    if key in known:
        return known[key]
    with path.open("rb") as file:
        if tensors_only:
            file.seek(8 + int.from_bytes(file.read(8), "little"))
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if size >= LARGE:
        _keep(kept, dict([*_known(kept).items(), (key, digest)][-MAX_CACHED_HASHES:]))
    return digest


def legacy_hash(path: Path) -> str:
    """The eight digits by which A1111 names ControlNets, and named models before 2023: of 64 kB a megabyte in."""
    with weights_of(path)[0].open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _known(kept: Path) -> dict[str, str]:
    try:
        return read_json(kept)
    except (UserError, OSError):  # no cache yet, or a damaged one
        return {}


def _keep(kept: Path, known: dict[str, str]) -> None:
    try:
        with written_whole(kept) as unfinished:
            unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
    except DiskError:  # disk full or read-only: the next process hashes again
        pass
