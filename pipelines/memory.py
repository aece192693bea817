"""Keep the memory of forward passes on a processor in the process from one pass to the next, for both programs.

glibc's malloc returns each large block to the kernel as soon as it is free, and fetches new pages for the next one,
which the kernel first fills with zeros. A network of convolutions spends a third of its time on this. With other
settings, malloc takes blocks of any size from one heap that only grows: the process keeps the memory of its peak, but
no more.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -3, -4, -8  # mallopt's names for them, from malloc.h
# Other threads' arenas cannot hold a block of 64 MiB, which is then mapped after all: so one arena for all.
KEEPING = {ARENA_MAX: 1, MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1}
USUAL = {MMAP_MAX: 1 << 16, TRIM_THRESHOLD: 1 << 26, MMAP_THRESHOLD: 1 << 25}  # what malloc grows them to


def one_arena() -> None:
    """Let all threads started from now on share one heap. If one was started before, later ones may share its heap."""
    _set({ARENA_MAX: 1})


def keep() -> bool:
    """Keep memory that is freed from now on, if `one_arena` was called in time; returns whether it is kept.

    Does nothing on systems other than Linux with glibc, or if the environment sets malloc's parameters.
    """
    return _set(KEEPING)


def give_back() -> None:
    """Undo `keep`, and return free memory to the kernel."""
    if _set(USUAL):
        _library().malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Keep memory that is freed in the body, and return it to the kernel at the end."""
    keep()
    try:
        yield
    finally:
        give_back()


def _library() -> Any:
    return ctypes.CDLL(None)


def _set(values: dict[int, int]) -> bool:
    told = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if told or sys.platform != "linux" or not hasattr(_library(), "gnu_get_libc_version"):
        return False
    return all([_library().mallopt(name, value) for name, value in values.items()])
