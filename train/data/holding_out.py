"""A share of the samples held out for validation, by picture: no picture is in both training and validation.

A picture is identified by its size in bytes and its first 8 KB, whatever its name and however many samples use it; a
re-encoded copy counts as another picture. A sample of text alone is identified by its conversation. Samples that share
a picture, also through a third sample, stay together: they are the connected components of samples and pictures
(union-find, near O(samples)). Components are visited in an order drawn from `seed` and their content alone, and each
that still fits is taken until the share is full, so the order of rows does not matter. The ranks share the reading.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from train.data.measuring import SPAN, spare_workers, spread
from train.data.prompts import Rejected
from train.data.sources import Measured, Source
from train.dist import Runtime
from train.errors import UsageError

HEAD = 8192  # bytes of a picture that are read


class Pictures(torch.utils.data.Dataset[list[list[int]]]):
    """Span number -> for each sample of the span its pictures, as 64-bit numbers."""

    def __init__(self, source: Source) -> None:
        self.source = source

    def __len__(self) -> int:
        return -(-len(self.source) // SPAN)

    def __getitem__(self, number: int) -> list[list[int]]:
        first = number * SPAN
        return [self._of(index) for index in range(first, min(first + SPAN, len(self.source)))]

    def _of(self, index: int) -> list[int]:
        try:
            record = self.source.record(index)
            if record.images:
                return [_number(self._head(location)) for location in record.images]
        except Rejected:
            return []
        return [_number(json.dumps(record.conversations, sort_keys=True).encode())]

    def _head(self, location: Any) -> bytes:
        if isinstance(location, bytes):
            return len(location).to_bytes(8) + location[:HEAD]
        if isinstance(location, tuple):
            path, offset, size = location
            return int(size).to_bytes(8) + self.source.files.read(path, offset, min(size, HEAD))
        try:
            size = os.stat(location).st_size
        except OSError:
            raise Rejected("unreadable") from None
        return size.to_bytes(8) + self.source.files.read(location, 0, min(size, HEAD))


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest())


def hold_out(
    source: Source, measured: Measured, share: float, seed: int, runtime: Runtime
) -> tuple[Measured, Measured]:
    """Split the usable samples: return those to train on and those held out, the same in every rank.

    share: of the samples, at most this is held out.  Raises: UsageError if every group of samples is larger than that.
    """
    parts = spread(Pictures(source), spare_workers(), runtime)
    pictures, usable = [own for part in parts for own in part], measured.usable
    held = held_of({int(index): pictures[int(index)] for index in usable}, share, seed)
    if not len(held):
        raise UsageError(
            f"--val {share:g} holds out none of {len(usable):,} samples; give a larger share or a data set"
        )
    return only(measured, np.setdiff1d(usable, held)), only(measured, held)


def only(measured: Measured, indices: NDArray[np.int64]) -> Measured:
    """Return a copy in which the lengths and labels of all other samples are 0."""
    kept = np.isin(np.arange(len(measured.lengths)), indices)
    columns = {name: getattr(measured, name) * kept for name in ("lengths", "supervised", "images")}
    return dataclasses.replace(measured, **columns)


def held_of(pictures: dict[int, list[int]], share: float, seed: int) -> NDArray[np.int64]:
    """Choose the samples to hold out.  pictures: sample -> its pictures' numbers."""
    parent = {index: index for index in pictures}

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = index = parent[parent[index]]
        return index

    first: dict[int, int] = {}
    for index, own in pictures.items():
        for picture in own:
            parent[root(index)] = root(first.setdefault(picture, index))
    groups = defaultdict[int, list[int]](list)
    for index in pictures:
        groups[root(index)].append(index)

    def drawn(group: list[int]) -> bytes:
        content = min((picture for index in group for picture in pictures[index]), default=0)
        return hashlib.blake2b(f"{seed} {content}".encode(), digest_size=16).digest()

    room, held = int(share * len(pictures)), list[int]()
    for group in sorted(groups.values(), key=drawn):
        if len(group) <= room - len(held):
            held += group
    return np.array(sorted(held), np.int64)
