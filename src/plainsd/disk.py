"""Atomic writes: files are whole or absent. Texts and JSON are read with one clear error.

What is being written has the name of `draft_name`. A process that is killed leaves its drafts; the next one that writes
into the same folder removes them, see `sweep_drafts`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import chain, count
from pathlib import Path
from typing import Any

from plainsd.errors import DiskError, UserError
from plainsd.json_reader import LONGEST_JSON, BadJSON, parsed_json


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` to write to; at the end it atomically replaces `path`, or on an error is deleted.

    Parent folders are created. DiskError if the disk refuses any of this; then `path` is unchanged.
    """
    path = Path(os.path.realpath(path)) if path.is_symlink() else path  # the link stays
    with draft_of(path) as draft:
        yield draft
        flush(draft)
        os.replace(draft, path)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`; a file still there at the end is deleted."""
    draft = draft_name(path)
    sweep_drafts(path.parent)
    try:
        with refusals(path, draft):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
    finally:
        with suppress(OSError):
            draft.unlink()


# --- what killed processes leave

DRAFT = re.compile(r"\.(.+)\.plainsd-([0-9a-f]{8})-(\d{1,9})\.(?:part|old)")  # a name that nobody else gives
FORGOTTEN = 86_400  # seconds after which a draft of another machine counts as abandoned
swept: set[tuple[int, Path]] = set()  # (process, folder): each looks into a folder once, before its first draft there
sweeping = threading.Lock()


def draft_name(path: Path, end: str = "part") -> Path:
    """`.NAME.plainsd-MACHINE-PROCESS.part`."""
    return path.with_name(f".{path.name}.plainsd-{machine_tag()}-{os.getpid()}.{end}")


@cache
def machine_tag() -> str:
    """Eight hexadecimal digits of this machine, or container: where its process numbers mean something."""
    space = str(os.stat("/proc/self/ns/pid").st_ino) if os.path.exists("/proc/self/ns/pid") else ""
    with suppress(OSError):  # hosts may share a name
        space = f"{space} {Path('/etc/machine-id').read_text('utf-8')}"
    return hashlib.sha256(f"{socket.gethostname()} {space}".encode()).hexdigest()[:8]


def sweep_drafts(folder: Path) -> None:
    """Removes the drafts of killed processes; and where one was killed between two renames, gives the old folder its
    name back. Drafts of a process that lives stay, and so do another machine's unless they have lain for a day."""
    here = os.getpid(), Path(os.path.realpath(folder))  # by a link it is no other folder
    with sweeping:  # so that another thread's first draft comes after it
        if here in swept:
            return
        swept.add(here)
        for draft in left_in(folder, os.getpid()):
            with suppress(OSError):
                if not put_back(draft):
                    shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink()


def recover(target: Path) -> None:
    """Gives a folder its name back that a killed `whole_folder` had taken away; nothing otherwise."""
    if not target.exists():
        for old in left_in(target.parent):
            if DRAFT.sub(r"\1", old.name) == target.name:
                put_back(old)


def put_back(draft: Path) -> bool:
    """Whether a draft is a folder that had the name before, and has it again."""
    name = draft.with_name(DRAFT.sub(r"\1", draft.name))
    if draft.suffix != ".old" or name.exists():
        return False
    with suppress(OSError):
        os.replace(draft, name)
    return name.exists()


def left_in(folder: Path, dead: int | None = None) -> list[Path]:
    """The drafts in a folder whose processes have ended; `dead` counts as ended."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        return [Path(one.path) for one in entries if (m := DRAFT.fullmatch(one.name)) and not is_owned(m, one, dead)]
    except OSError:
        return []


def is_owned(match: re.Match[str], entry: os.DirEntry, dead: int | None) -> bool:
    """Whether a draft may be some living process's."""
    of, process = match[2], int(match[3])
    if of != machine_tag():
        return time.time() - entry.stat(follow_symlinks=False).st_mtime < FORGOTTEN
    if process == dead:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


# --- files


def under_free_name(draft: Path, path: Path) -> Path:
    """Renames a written file to the first free name of `x.png`, `x-2.png`, `x-3.png`, ...; returns it.

    A hard link fails if the name is taken, so that two programs writing at once both keep their files.
    """
    flush(draft)
    for name in chain([path], (path.with_stem(f"{path.stem}-{n}") for n in count(2))):
        try:
            os.link(draft, name)
        except FileExistsError:
            continue
        except OSError:  # a file system without hard links
            if name.exists():
                continue
            os.replace(draft, name)
        break
    return name


@contextmanager
def refusals(path: Path, draft: Path) -> Iterator[None]:
    """Turns an OSError about writing `path` into a DiskError. Errors about other files that are read meanwhile, or
    about the pipe of a progress bar, pass unchanged."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        at = Path(error.filename or draft)
        if error.errno is None or not (at.is_relative_to(draft) or at == path or at in path.parents):
            raise
        raise DiskError(path, error.strerror or str(error)) from error


def flush(path: Path) -> None:
    """Syncs a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Syncs a folder's entries, so that they survive a power loss."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text_file(path: Path, remedy: str = "download it again") -> str:
    try:
        size = path.stat().st_size
        if size > 4 * LONGEST_JSON:
            raise UserError(f"{path} has {size} bytes, and at most {4 * LONGEST_JSON} are read; {remedy}")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a model's folder needs this file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text; {remedy}") from error


def cache_folder() -> Path:
    """The user's cache folder. It may not exist yet; of a user without a home it is one that cannot be made."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"
    except RuntimeError:  # into a folder for all users anyone could put kernels
        return Path(os.devnull) / "plainsd"


def first_time(message: str) -> bool:
    """Whether this user has not had this message on this machine before; a file in the cache folder keeps that. Always
    True where the folder cannot be written."""
    told = f"{socket.gethostname()}\n{message}\n"
    path = cache_folder() / f"told-{hashlib.sha256(told.encode()).hexdigest()[:16]}.txt"
    try:
        if path.exists():
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(told, encoding="utf-8")
    except OSError:
        pass
    return True


def read_json(path: Path, remedy: str = "download it again") -> dict[str, Any]:
    """The table in a JSON file. UserError, which ends with the remedy, for anything else."""
    text = read_text_file(path, remedy)
    try:
        content = parsed_json(text)
    except BadJSON as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a table of settings; {remedy}")
    return content


def read_cache(path: Path | None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The table in a cache file of ours, of any size; empty where there is none. One that cannot be read is empty too,
    which `say` is told: it is made again."""
    if path is None or not path.is_file():
        return {}
    try:
        content = parsed_json(path.read_text("utf-8"), longest=sys.maxsize, most=sys.maxsize)
        if isinstance(content, dict):
            return content
    except (OSError, ValueError):
        pass
    say(f"{path} cannot be read; it is made again")
    return {}


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder to write into, which replaces `target` on success, and is deleted on an error. What lies in a
    model's folder and is no part of one, such as notes, is kept.

    UserError where `target` is not the folder of a model or a part; DiskError if the disk refuses any of this; then
    `target` is unchanged.
    """
    target = Path(os.path.realpath(target)) if target.is_symlink() else target  # the link stays
    sweep_drafts(target.parent)
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and kind_of(target) is None:
        raise UserError(f"{target} exists and is not a model folder; choose another place")
    draft, old = draft_name(target), draft_name(target, "old")
    try:
        with refusals(target, draft):
            draft.mkdir(parents=True)
            yield draft
            if not empty and len({*(kind := (kind_of(target), kind_of(draft)))} - {None}) > 1:
                raise UserError(f"{target} is the folder of {kind[0]}, and not of {kind[1]}; choose another place")
            for path in draft.rglob("*"):
                if path.is_file():
                    flush(path)
            for path in target.iterdir() if target.exists() else ():
                if not OF_MODELS.fullmatch(path.name) and not (draft / path.name).exists():
                    linked_copy(path, draft / path.name)
            if not (target.exists() and exchanged(draft, target)):
                if target.exists():
                    os.replace(target, old)  # a kill here leaves no folder of that name: see `recover`
                os.replace(draft, target)
    except BaseException:
        if old.exists():
            os.replace(old, target)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


OF_MODELS = re.compile(  # names in folders of models and parts
    r"unet|vae|scheduler|safety_checker|feature_extractor|(text_encoder|tokenizer)(_\d)?"
    r"|(model_index|config|preview|(tokenizer|preprocessor|added_tokens|special_tokens|vocab|merges)\w*)\.(json|txt)"
    r"|(diffusion_pytorch_|pytorch_)?model(-\d+-of-\d+)?(\.(fp16|bf16|fp32|ema|non_ema))?(-\d+-of-\d+)?"
    r"\.(safetensors|bin)(\.index(\.\w+)?\.json)?|leftovers\.safetensors"
)
WHOLE_MODEL = "a whole model"


def kind_of(folder: Path) -> str | None:
    """What lies there in diffusers' or transformers' layout: WHOLE_MODEL, or the class of a part. None for something
    else: other programs have a config.json too."""
    for name, marks in (("model_index.json", ("_class_name", "unet")), ("config.json", ("_class_name",))):
        try:
            content = parsed_json((folder / name).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(content, dict) and any(mark in content for mark in marks):
            return str(content["_class_name"]) if name == "config.json" else WHOLE_MODEL
    return None


def linked_copy(path: Path, copy: Path) -> None:
    """The same file or folder under another name, without its bytes where the disk can."""

    def same(source: str, target: str) -> None:
        try:
            os.link(source, target, follow_symlinks=False)
        except OSError:
            shutil.copy2(source, target, follow_symlinks=False)

    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, copy, symlinks=True, copy_function=same)
    else:
        same(str(path), str(copy))


def exchanged(a: Path, b: Path) -> bool:
    """Exchanges two folders' names in one step, as Linux and macOS can on most file systems; False where not."""
    libc = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(a), os.fsencode(b)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        return libc.renameat2(AT_FDCWD, names[0], AT_FDCWD, names[1], RENAME_EXCHANGE) == 0
    if sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        return libc.renamex_np(*names, RENAME_SWAP) == 0
    return False


AT_FDCWD, RENAME_EXCHANGE, RENAME_SWAP = -100, 2, 2  # of fcntl.h, linux/fs.h and macOS's stdio.h
