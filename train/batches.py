"""Which samples go into which step, row and process, and the tensors that come of it.

A step takes the next `batch_size` samples of the seeded epoch order. They are packed into rows (first-fit decreasing)
or lie one to a row, and rows are grouped into micro-batches of at most `micro_tokens` positions. The loss is normalised
over the step, so this arrangement, like the number of processes, changes speed and not the result. The plan is a pure
function of lengths, seed and step number: resuming at step n needs no cursor but n.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.config import Stage
from train.data import Measured, Source, decode_image, encode
from train.prompts import Encoder, Rejected

Rows = list[list[int]]  # sample indices, row by row


def pack(lengths: Sequence[int], capacity: int) -> Rows:
    """First-fit decreasing: return rows of positions into `lengths`, each summing to at most `capacity`.

    Deterministic: ties go by position. A length above the capacity has a row of its own.
    """
    rows: Rows = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        row = next((r for r, free in enumerate(room) if free >= length), None)
        if row is None:
            rows.append([])
            room.append(capacity)
            row = len(rows) - 1
        rows[row].append(position)
        room[row] -= length
    return rows


def group(rows: Rows, row_lengths: Sequence[int], micro_tokens: int, world: int) -> list[Rows]:
    """Group rows of similar length into micro-batches of at most `micro_tokens`, a multiple of `world` in number."""
    groups: list[Rows] = []
    longest = 0
    for r in sorted(range(len(rows)), key=lambda r: (-row_lengths[r], r)):
        if groups and (len(groups[-1]) + 1) * longest <= micro_tokens:
            groups[-1].append(rows[r])
        else:
            groups.append([rows[r]])
            longest = row_lengths[r]
    while len(groups) % world:
        big = max(range(len(groups)), key=lambda g: (len(groups[g]), -g))
        half = len(groups[big]) // 2
        tail = groups[big][half:] if half else []
        groups[big] = groups[big][:half] if half else groups[big]
        groups.insert(big + 1, tail)
    return groups


class Plan:
    """The samples of every step."""

    def __init__(self, measured: Measured, stage: Stage, max_length: int) -> None:
        self.measured, self.stage = measured, stage
        self.usable = measured.usable
        self.row_tokens = max(stage.row_tokens or max_length, int(measured.lengths.max(initial=1)))
        self.num_samples = round(stage.epochs * len(self.usable))
        self.steps = stage.steps or -(-self.num_samples // stage.batch_size)
        if stage.steps:
            self.num_samples = stage.steps * stage.batch_size
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def samples(self, step: int) -> list[int]:
        """Return the sample indices of a step, across epoch ends."""
        n = len(self.usable)
        first, last = step * self.stage.batch_size, min((step + 1) * self.stage.batch_size, self.num_samples)
        return [int(self._order(at // n)[at % n]) for at in range(first, last)]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._epochs:
            self._epochs = {e: order for e, order in self._epochs.items() if e == epoch - 1}
            rng = np.random.default_rng([self.stage.seed, epoch])
            self._epochs[epoch] = self.usable[rng.permutation(len(self.usable))]
        return self._epochs[epoch]

    def micro_batches(self, step: int, world: int) -> list[Rows]:
        """Return the step's micro-batches; process r of `world` takes each world-th from the r-th on."""
        samples = self.samples(step)
        lengths = [int(self.measured.lengths[i]) for i in samples]
        packed = pack(lengths, self.row_tokens) if self.stage.packing else [[i] for i in range(len(samples))]
        rows = [[samples[i] for i in row] for row in packed]
        return group(rows, [sum(lengths[i] for i in row) for row in packed], self.stage.micro_tokens, world)


@dataclass
class Batch:
    """One micro-batch. b rows of l positions, s supervised positions, n images in order of appearance."""

    ids_bl: Tensor  # i64
    positions_bl: Tensor  # i64, from 0 in each document
    supervised_s: Tensor  # i64 into the flattened b*l: the position that predicts
    targets_s: Tensor  # i64: what it should predict
    owners_s: Tensor  # i64: the sample index of each target
    pixels_nchw: Tensor | None  # u8; None without images, or where features are cached
    images: list[int]  # the sample index of each image
    num_tokens: int  # without padding
    num_squares: int  # sum of the documents' squared lengths, which attention costs
    skipped: dict[int, str] = field(default_factory=dict)

    def to(self, device: torch.device) -> Batch:
        """Move the tensors."""
        for name in ("ids_bl", "positions_bl", "supervised_s", "targets_s"):
            setattr(self, name, getattr(self, name).to(device, non_blocking=True))
        if self.pixels_nchw is not None:
            self.pixels_nchw = self.pixels_nchw.to(device, non_blocking=True)
        return self


class Collator:
    """Read, decode, encode and arrange samples; lives in worker processes."""

    def __init__(self, source: Source, encoder: Encoder, image_processor: Any, max_length: int) -> None:
        self.source, self.encoder, self.max_length = source, encoder, max_length
        self.image_processor = image_processor
        self.decode = True  # false: features are cached, pixels are not needed
        self.skip: dict[int, str] = {}  # samples whose pixels are known to be bad

    def pixels(self, locations: Sequence[Any]) -> list[Tensor]:
        """Decode and resize images to u8 [3, h, w], by the very code of the exported processor.  Raises: Rejected."""
        images = [decode_image(self.source.image_bytes(location)) for location in locations]
        if not images:
            return []
        out = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return [torch.from_numpy(np.ascontiguousarray(image)) for image in out]

    def __call__(self, rows: Rows) -> Batch:
        """Build a micro-batch; a sample whose pixels are broken is left out and named."""
        ids: list[list[NDArray[Any]]] = []
        pixels: list[Tensor] = []
        images: list[int] = []
        skipped: dict[int, str] = {}
        documents: list[tuple[int, int, NDArray[Any], int]] = []  # row, start, labels, sample
        for row in rows:
            parts: list[NDArray[Any]] = []
            start = 0
            for index in row:
                try:
                    if index in self.skip:
                        raise Rejected(self.skip[index])
                    record, encoded = encode(self.source, self.encoder, index, self.max_length)
                    if self.decode:
                        pixels += self.pixels(record.images)
                except Rejected as reason:
                    skipped[index] = str(reason)
                    continue
                images += [index] * len(record.images)
                documents.append((len(ids), start, encoded.labels, index))
                parts.append(encoded.ids)
                start += len(encoded.ids)
            if parts:
                ids.append(parts)
        return _arrange(ids, documents, torch.stack(pixels) if pixels else None, images, skipped)


def _arrange(
    ids: list[list[NDArray[Any]]],
    documents: list[tuple[int, int, NDArray[Any], int]],
    pixels: Tensor | None,
    images: list[int],
    skipped: dict[int, str],
) -> Batch:
    width = max((sum(map(len, parts)) for parts in ids), default=0)
    ids_bl = np.zeros((len(ids), width), np.int64)
    positions_bl = np.zeros((len(ids), width), np.int64)
    for r, parts in enumerate(ids):
        at = 0
        for part in parts:
            ids_bl[r, at : at + len(part)] = part
            positions_bl[r, at : at + len(part)] = np.arange(len(part))
            at += len(part)
        # Padding behind a single document goes on counting: without a second document no mask need be built.
        positions_bl[r, at:] = np.arange(width - at) + (at if len(parts) == 1 else 0)
    where, targets, owners = [], [], []
    for r, start, labels, index in documents:
        learnt = np.flatnonzero(labels[1:] >= 0)
        where.append(r * width + start + learnt)
        targets.append(labels[1:][learnt])
        owners.append(np.full(len(learnt), index))
    empty = [np.zeros(0, np.int64)]
    return Batch(
        ids_bl=torch.from_numpy(ids_bl),
        positions_bl=torch.from_numpy(positions_bl),
        supervised_s=torch.from_numpy(np.concatenate(where or empty).astype(np.int64)),
        targets_s=torch.from_numpy(np.concatenate(targets or empty).astype(np.int64)),
        owners_s=torch.from_numpy(np.concatenate(owners or empty).astype(np.int64)),
        pixels_nchw=pixels,
        images=images,
        num_tokens=sum(len(part) for parts in ids for part in parts),
        num_squares=sum(len(part) ** 2 for parts in ids for part in parts),
        skipped=skipped,
    )


class Steps(torch.utils.data.Dataset[list[Batch]]):
    """Step number -> this process's micro-batches of the step."""

    def __init__(self, plan: Plan, collator: Collator, rank: int, world: int) -> None:
        self.plan, self.collator, self.rank, self.world = plan, collator, rank, world

    def __getitem__(self, step: int) -> list[Batch]:
        groups = self.plan.micro_batches(step, self.world)
        return [self.collator(rows) for rows in groups[self.rank :: self.world]]


class Images(torch.utils.data.Dataset[tuple[Tensor | None, str]]):
    """Sample index -> its pixels u8 [n, 3, h, w], or None and the reason."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return torch.stack(self.collator.pixels(self.collator.source.record(index).images)), ""
        except Rejected as reason:
            return None, str(reason)


def load(dataset: Any, order: Sequence[int], workers: int, pin: bool) -> Any:
    """Iterate a dataset in order, decoding ahead in worker processes; the order does not depend on their number."""
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupts,
    )


def _ignore_interrupts(_worker: int) -> None:
    """Leave Ctrl-C to the training process, which saves first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
