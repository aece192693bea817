"""Memory of forward passes on a processor, kept by the process from one to the next, for both programs.

glibc's malloc gives each large block back to the kernel as soon as it is free, and fetches pages anew for the next one,
which the kernel fills with zeros first. A network of convolutions spends a third of its time so. Told otherwise, malloc
takes blocks of any size from one heap that only grows: the process holds what it held at its busiest moment, no more.
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
    """Let all threads that begin from now on share one heap. Where one has begun before, later ones may share its."""
    _set({ARENA_MAX: 1})


def keep() -> bool:
    """Keep what is freed from now on, wherever `one_arena` was called in time; says whether it is.

    Does nothing on other systems than Linux with glibc, and where the environment says what malloc shall do.
    """
    return _set(KEEPING)


def give_back() -> None:
    """End what `keep` began, and give to the kernel what is free."""
    if _set(USUAL):
        _library().malloc_trim(0)


@contextmanager
def kept() -> Iterator[None]:
    """Keep what is freed meanwhile, and give it back at the end."""
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
