"""Compiles kernels.cpp and loads it.

That takes some three seconds with the machine's C++ compiler ($CXX or c++), on first use. The result is kept in the
user's cache folder (XDG_CACHE_HOME or ~/.cache, in plainsd/) for later processes, under a name for all that it depends
on, and with a hash at its end, since one that was cut off would end whatever process loads it. Where that folder cannot
be written, it lasts as long as the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from plainsd.disk import cache_folder, written_whole
from plainsd.errors import DiskError

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
HASH = hashlib.sha256


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, compiled and loaded. Errors: Unavailable, with the compiler's first error."""
    source, compiler = source_code(), compiler_command()
    path = kept_file(source, compiler)
    try:
        made = _from_cache(path) or _compiled(compiler, source, path)
    except OSError as error:
        raise Unavailable(str(error)) from None
    return typed(made)


def typed(made: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions' arguments; those that need memory raise torch.OutOfMemoryError."""
    kind, number, place, real = ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_double
    for name, arguments in {
        "attend": [kind, kind, *6 * [place], *5 * [number], real, number],
        "attend_back": [*3 * [place], *5 * [number], real, number],
        "pack": [kind, *2 * [place], *2 * [number]],
        "linear": [kind, *5 * [place], *3 * [number], kind, number],
        "layer_norm": [kind, *4 * [place], *2 * [number], real, number],
        "norm_silu": [kind, *6 * [place], *4 * [number], real, kind, number],
        "norm_silu_back": [kind, *8 * [place], *4 * [number], kind, number],
        "geglu": [kind, *3 * [place], *3 * [number]],
    }.items():
        getattr(made, name).argtypes, getattr(made, name).restype = arguments, None
    for name in ("attend", "attend_back", "norm_silu", "norm_silu_back"):
        getattr(made, name).restype, getattr(made, name).errcheck = kind, _check_memory
    return made


def _check_memory(status: int, *_: Any) -> None:
    if status:
        raise torch.OutOfMemoryError("out of memory in a kernel; try less at once")


def is_compiled() -> bool:
    """Whether `library` need not compile. Errors: Unavailable if there is no compiler."""
    return library.cache_info().currsize > 0 or is_sealed(kept_file(source_code(), compiler_command()))


def source_code() -> bytes:
    return files("plainsd.speed").joinpath("kernels.cpp").read_bytes()


def kept_file(source: bytes, compiler: tuple[str, ...]) -> Path:
    """Where the compiled file is, or will be."""
    return cache_folder() / f"kernels-{_build_key(source, compiler)}.so"


def compiler_command() -> tuple[str, ...]:
    """Its path and flags: $CXX may be `ccache g++`. Errors: Unavailable if there is none."""
    try:
        name, *flags = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    except ValueError as error:
        raise Unavailable(f"CXX={os.environ['CXX']} is no command ({error})") from None
    if (path := shutil.which(name)) is None:
        raise Unavailable(f"no C++ compiler ({name}) is installed")
    return path, *flags


def sealed(compiled: bytes) -> bytes:
    """With a hash at its end, which loading passes over."""
    return compiled + HASH(compiled).digest()


def is_sealed(path: Path) -> bool:
    """Whether a `sealed` file is there, as it was written."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return sealed(content[: -HASH().digest_size]) == content


def _from_cache(path: Path) -> ctypes.CDLL | None:
    """The file in the cache folder, loaded. None where there is none, or a damaged one."""
    if is_sealed(path):
        with suppress(OSError):  # the folder's file system runs no code
            return ctypes.CDLL(str(path))
    return None


def _compiled(compiler: tuple[str, ...], source: bytes, path: Path) -> ctypes.CDLL:
    """Compiled, kept at `path`, and loaded from there. Where it cannot be kept, with a warning, it is loaded from a
    private folder that is gone then. Processes that compile at once each put a whole file there."""
    with tempfile.TemporaryDirectory(prefix="plainsd-") as folder:
        compiled = Path(folder) / "kernels.so"
        _compile(compiler, source, compiled)
        try:
            with written_whole(path) as draft:
                draft.write_bytes(sealed(compiled.read_bytes()))
            return ctypes.CDLL(str(path))
        except (OSError, DiskError) as error:
            made, why = ctypes.CDLL(str(compiled)), error.reason if isinstance(error, DiskError) else error
    warnings.warn(
        f"the kernels in kernels.cpp are compiled anew by each process, since {path.parent} cannot keep them ({why}); "
        "point XDG_CACHE_HOME to a folder that can",
        stacklevel=2,
    )
    return made


def _build_key(source: bytes, compiler: tuple[str, ...]) -> str:
    """A hash of all that the compiled file depends on: machines with other processors may share a home folder. PyTorch
    counts for its OpenMP, which the file uses."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu = torch.backends.cpu.get_cpu_capability()
    flags = map(os.fsencode, (*compiler[1:], *FLAGS))
    parts = [source, _version(compiler), cpu.encode(), torch.__version__.encode(), *flags]
    return HASH(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _version(compiler: tuple[str, ...]) -> bytes:
    return _run([*compiler, "--version"]).stdout


def _compile(compiler: tuple[str, ...], source: bytes, path: Path) -> None:
    done = _run([*compiler, *FLAGS, "-x", "c++", "-", "-o", str(path)], source)
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        complaint = next((line for line in said if "error" in line), f"exit {done.returncode}")
        raise Unavailable(f"{compiler[0]}: {complaint}")


def _run(command: list[str], source: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(command, input=source, capture_output=True)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be started ({error.strerror})") from None
