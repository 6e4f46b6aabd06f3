"""Files that are whole or absent, whatever happens while they are written; texts and JSON read with one clear error."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from plainsd.errors import UserError


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, to be written; at the end it becomes `path` in one step, or it vanishes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Waits until a file's bytes are on the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_text_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; a model's folder needs this file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged: it is not text; fetch it again") from error


def cache_folder() -> Path:
    """The user's own, for what can always be made again. It may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "plainsd"


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(read_text_file(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is damaged: it is not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a table of settings; fetch it again")
    return content


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `target` when all went well, and vanishes if not."""
    ours = ("model_index.json", "config.json")  # a model's folder, or a part's, may be replaced
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not any((target / name).is_file() for name in ours):
        raise UserError(f"{target} exists and is no folder of a model; choose another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}; choose another place") from error
    old = draft.with_name(draft.name + ".old")
    try:
        yield draft
        for path in draft.rglob("*"):
            if path.is_file():
                flush(path)
        draft.chmod(0o755)
        if target.exists():
            os.replace(target, old)
        os.replace(draft, target)
    except BaseException as error:
        if old.exists():
            os.replace(old, target)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {target}: {error.strerror}; nothing was kept") from error
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
