"""Decode the rows of a shard in other processes, batch after batch, ahead of the model.

A decoded image of 224 pixels takes 150 kB, so a GPU that embeds 2,500 a second would need 380 MB/s through pipes, each
byte copied five times on the way. Instead, pixels go through a board of shared memory: the process that asks lends a
slot with each part of a batch, and the one that decodes writes there; everything else about the rows comes through its
pipe. A board serves one shard and is freed with the last process that holds it, even if processes are killed; it has no
name that could be left behind, and takes no space in /dev/shm, of which containers have little. On systems without such
memory (other than Linux), pixels go through the pipe. (One process on a busy machine: 1.8 to 3 times the rows a second,
at 40 % of the time in the asking process.)
"""

import dataclasses
import itertools
import mmap
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from curate import engine
from curate.embed import reader
from curate.storage import tar
from curate.storage.ranges import map_ahead

PART_ROWS = 32  # rows that a decoding process takes at a time


class Board(NamedTuple):
    """Where to find shared memory, its inode as identity, and its shape: slots, rows, height, width, channels."""

    place: str
    inode: int
    shape: tuple[int, ...]


class _Memory:
    """A board that this process has made; `view` u8 in its shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        size = int(np.prod(shape))
        self.file = os.memfd_create("pixels")
        try:
            os.posix_fallocate(self.file, 0, size)  # a lack of memory raises here, instead of a signal later
            self.view = np.frombuffer(mmap.mmap(self.file, size), np.uint8).reshape(shape)
        except BaseException:
            os.close(self.file)
            raise
        self.board = Board(f"/proc/{os.getpid()}/fd/{self.file}", os.fstat(self.file).st_ino, shape)

    def close(self) -> None:
        os.close(self.file)


class Decoders:
    """Processes that read samples into rows for one model."""

    def __init__(self, count: int, make: Callable[[], reader.Reader], size: tuple[int, int], batch_size: int) -> None:
        """make: makes the reader of a process. size: height and width of its pixels. batch_size: rows of a batch."""
        self.pool = engine.helpers(count, _start, (make,))
        self.size = size
        self.per_batch = -(-batch_size // PART_ROWS)
        self.ahead = 2 * count + self.per_batch

    def __call__(self, path: str, batches: Sequence[Sequence[tar.Sample]]) -> Iterator[reader.Rows]:
        """Decode batches of samples of the tar at a path, in order; in small parts, so that the first comes soon."""
        parts = [[batch[at : at + PART_ROWS] for at in range(0, len(batch), PART_ROWS)] for batch in batches]
        count = sum(map(len, parts))
        # Slots in use at a time: the parts on their way, and those of the batch being put together.
        memory = self._memory(min(count, self.ahead + self.per_batch)) if count else None
        slots = itertools.cycle(range(memory.board.shape[0] if memory else 1))
        asked = (
            (part, memory and memory.board, slot) for batch in parts for part, slot in zip(batch, slots, strict=False)
        )
        try:
            read = map_ahead(self.pool, partial(_decode, path), asked, self.ahead)
            for batch in parts:
                here = list(itertools.islice(read, len(batch)))
                yield reader.join([_lent(rows, memory) for rows in here])
        finally:
            if memory is not None:
                memory.close()

    def _memory(self, slots: int) -> _Memory | None:
        if not hasattr(os, "memfd_create"):
            return None
        try:
            return _Memory((slots, PART_ROWS, *self.size, 3))
        except OSError:  # no room for it: pipes do
            return None

    def close(self) -> None:
        """End the processes at once."""
        self.pool.shutdown(cancel_futures=True)


class _Lent(NamedTuple):
    """Rows whose pixels lie in a slot of the board: so many of its rows."""

    rows: reader.Rows
    slot: int
    used: int


def _lent(found: "reader.Rows | _Lent", memory: _Memory | None) -> reader.Rows:
    if isinstance(found, reader.Rows):
        return found
    assert memory is not None
    return dataclasses.replace(found.rows, pixels=memory.view[found.slot, : found.used])


_reader: reader.Reader | None = None
_held: tuple[Board, np.ndarray] | None = None  # the board that this process wrote to last


def _start(make: Callable[[], reader.Reader]) -> None:
    global _reader
    _reader = make()
    if "torch" in sys.modules:  # which may resize: there is a process for every core already
        sys.modules["torch"].set_num_threads(1)


def _decode(path: str, asked: tuple[Sequence[tar.Sample], Board | None, int]) -> "reader.Rows | _Lent":
    """Read samples; if a board is lent, leave their pixels there."""
    assert _reader is not None
    samples, board, slot = asked
    rows = _reader(path, samples)
    if board is None:
        return rows
    pixels = rows.pixels
    _open(board)[slot, : len(pixels)] = pixels
    return _Lent(dataclasses.replace(rows, pixels=pixels[:0]), slot, len(pixels))


def _open(board: Board) -> np.ndarray:
    """Open a board, unless it is the last one.  Raises: OSError if it is gone, as when its shard was given up."""
    global _held
    if _held is None or _held[0] != board:
        file = os.open(board.place, os.O_RDWR)
        try:
            if os.fstat(file).st_ino != board.inode:
                raise FileNotFoundError(board.place)
            view: Any = np.frombuffer(mmap.mmap(file, 0), np.uint8).reshape(board.shape)
        finally:
            os.close(file)
        _held = board, view
    return _held[1]
