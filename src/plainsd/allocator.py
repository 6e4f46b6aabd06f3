"""What a process does with memory that it frees: keeps it for the next allocation, or gives it back to the system.

glibc maps each block of 32 MB and more anew (smaller ones too, until the first is freed), and unmaps it when it is
freed. The feature maps of a decode are such blocks, and the system zeroes all their pages each time: a page fault for
every 4 kB, a quarter to a half of a decode's time (docs/speed.md). `keep_freed_memory` has all blocks made in the heap,
which stays with the process; `release_freed_memory` gives what is free there back. See mallopt(3), malloc_trim(3).
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

VARIABLE = "PLAINSD_KEEP_MEMORY"  # 0 leaves the allocator as it is
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # malloc.h
KEEPING = (
    (M_MMAP_MAX, 0),  # no block is mapped by itself
    (M_TRIM_THRESHOLD, -1),  # the heap never shrinks by itself
    # One heap for all threads. Heaps of other threads consist of pieces of 64 MB: larger blocks would be mapped all the
    # same, and empty pieces are unmapped whatever the threshold is.
    (M_ARENA_MAX, 1),
)


def keep_freed_memory() -> bool:
    """Keeps freed memory in this process from now on, if nothing speaks against it (`why_not_kept`). For programs, once
    and before they start threads or import torch; the heaps of threads that exist stay as they are."""
    if why_not_kept():
        return False
    library = glibc()
    assert library is not None  # why_not_kept has asked
    return all(library.mallopt(option, value) for option, value in KEEPING)


def why_not_kept() -> str | None:
    """Why freed memory is not to be kept, or None."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE} is 0"
    if own := next((name for name in os.environ if name.startswith("MALLOC_")), None):
        return f"{own} is set"
    if "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""):
        return "GLIBC_TUNABLES is set"
    return None if glibc() else "malloc is not glibc's"


def release_freed_memory() -> bool:
    """Gives all whole free pages of the heap back to the system; whether there were any. Nothing without glibc."""
    library = glibc()
    return library is not None and bool(library.malloc_trim(0))


@functools.cache
def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc (not musl, macOS's or Windows's) and no other malloc is in its place, such as
    jemalloc or tcmalloc by LD_PRELOAD."""
    if sys.platform != "linux":
        return None
    try:
        library, process = ctypes.CDLL("libc.so.6"), ctypes.CDLL(None)
        library.gnu_get_libc_version, library.mallopt, library.malloc_trim  # noqa: B018  # AttributeError elsewhere
        places = [ctypes.cast(found.malloc, ctypes.c_void_p).value for found in (library, process)]
    except (OSError, AttributeError):
        return None
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library if places[0] == places[1] else None
