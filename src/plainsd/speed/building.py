"""Compiles kernels.cpp and loads it.

That takes some three seconds with the machine's C++ compiler ($CXX or c++), on first use. The result is kept in the
user's cache folder (XDG_CACHE_HOME or ~/.cache, in plainsd/) for later processes, under a name for all that it depends
on; where that folder cannot be written, it lasts as long as the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
import warnings
from importlib.resources import files
from pathlib import Path

import torch

from plainsd.disk import cache_folder, written_whole

FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp")


class Unavailable(Exception):
    """Why there are no kernels on this machine."""


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cpp, compiled and loaded. Errors: Unavailable, with the compiler's first error."""
    source, compiler = source_code(), compiler_path()
    try:
        kept = _from_cache(kept_file(source, compiler), source, compiler)
        made = kept or _loaded_for_now(source, compiler)
    except OSError as error:
        raise Unavailable(str(error)) from None
    return typed(made)


def typed(made: ctypes.CDLL) -> ctypes.CDLL:
    """With the types of its functions' arguments."""
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
    return made


def is_compiled() -> bool:
    """Whether `library` need not compile. Errors: Unavailable if there is no compiler."""
    return library.cache_info().currsize > 0 or kept_file(source_code(), compiler_path()).exists()


def source_code() -> bytes:
    return files("plainsd.speed").joinpath("kernels.cpp").read_bytes()


def kept_file(source: bytes, compiler: str) -> Path:
    """Where the compiled file is, or will be."""
    return cache_folder() / f"kernels-{_build_key(source, compiler)}.so"


def compiler_path() -> str:
    """Errors: Unavailable if there is none."""
    name = os.environ.get("CXX", "c++")
    if (path := shutil.which(name)) is None:
        raise Unavailable(f"no C++ compiler ({name}) is installed")
    return path


def _from_cache(path: Path, source: bytes, compiler: str) -> ctypes.CDLL | None:
    """The file in the cache folder, loaded; compiled first where there is none, or a damaged one. None, with a warning,
    where the folder cannot be written. Processes that compile at once each put a whole file there."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass  # there is none, or a damaged one
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        room = tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}-", ignore_cleanup_errors=True)
    except OSError as error:
        warnings.warn(
            f"the kernels in kernels.cpp are compiled anew by each process, since {path.parent} cannot be written "
            f"({error.strerror}); point XDG_CACHE_HOME to a folder that can",
            stacklevel=2,
        )
        return None
    with room as folder:
        compiled = Path(folder) / "kernels.so"
        _compile(compiler, source, compiled)
        with written_whole(path) as draft:
            shutil.copyfile(compiled, draft)
    return ctypes.CDLL(str(path))


def _loaded_for_now(source: bytes, compiler: str) -> ctypes.CDLL:
    """From a private folder that is gone once it is loaded."""
    with tempfile.TemporaryDirectory(prefix="plainsd-") as folder:
        _compile(compiler, source, Path(folder) / "kernels.so")
        return ctypes.CDLL(str(Path(folder) / "kernels.so"))


def _build_key(source: bytes, compiler: str) -> str:
    """A hash of all that the compiled file depends on: machines with other processors may share a home folder. PyTorch
    counts for its OpenMP, which the file uses."""
    try:
        cpu = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        cpu = torch.backends.cpu.get_cpu_capability()
    parts = [source, _version(compiler), cpu.encode(), torch.__version__.encode(), *map(str.encode, FLAGS)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


@functools.cache
def _version(compiler: str) -> bytes:
    return subprocess.run([compiler, "--version"], capture_output=True).stdout


def _compile(compiler: str, source: bytes, path: Path) -> None:
    done = subprocess.run([compiler, *FLAGS, "-x", "c++", "-", "-o", path], input=source, capture_output=True)
    if done.returncode:
        said = done.stderr.decode(errors="replace").splitlines()
        complaint = next((line for line in said if "error" in line), f"exit {done.returncode}")
        raise Unavailable(f"{compiler}: {complaint}")
