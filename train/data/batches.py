"""The samples of each step, packed into micro-batches, and the tensors built from them.

A step takes the next `batch_size` samples of the epoch's seeded order. They are packed into micro-batches of at most
`micro_tokens` tokens and `micro_images` images: one row of documents side by side, without padding. This is bin packing
with two capacities; first-fit decreasing takes the longest sample first, each into the first bin with room. With one
capacity it needs at most 11/9 of the fewest bins + 6/9 (Dósa 2007); it takes O(n bins) time for n = `batch_size`
samples. Then the capacity is lowered as far as possible without adding bins, so that ranks have equal work.

Without packing, samples of similar length share a micro-batch of padded rows. A sample of more than `far` tokens shares
no micro-batch with shorter ones: longrope (Phi-3.5, Phi-4) uses other rotary angles for a whole pass once one document
in it is that long.

Invariant: the loss is normalised over the whole step, so packing and the number of ranks change speed but not the
result. The plan is a pure function of lengths, seed and step number: to resume at step n, only n is needed.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from train.config import Stage
from train.data import message_tree
from train.data.encoder import Encoded, Encoder
from train.data.prompts import Rejected
from train.data.sources import Measured, Source, decode_image, encode
from train.errors import TrainError

MAX_FILES = 1 << 16
PREFETCH = 4  # items that each worker decodes ahead
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
Groups = list[list[int]]
Rows = list[list[int]]  # sample indices, row by row
Document = tuple[int, int, Encoded, int]  # row, start, content, sample index


def pack(lengths: Sequence[int], images: Sequence[int], capacity: int, most_images: int) -> Groups:
    """Pack by first-fit decreasing: return groups of positions into `lengths`, each within both capacities.

    lengths, images: number of tokens and of images per sample.  capacity, most_images: limits of one group.
    Ties in length go by position. A sample that alone exceeds a capacity gets its own group.
    """
    groups: Groups = []
    room: list[tuple[int, int]] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length, shown = lengths[position], images[position]
        at = next((g for g, (tokens, more) in enumerate(room) if tokens >= length and more >= shown), len(groups))
        if at == len(groups):
            groups.append([])
            room.append((capacity, most_images))
        groups[at].append(position)
        room[at] = room[at][0] - length, room[at][1] - shown
    return groups


def pack_evenly(lengths: Sequence[int], images: Sequence[int], stage: Stage, world: int) -> Groups:
    """Pack into as few micro-batches as `pack` needs, rounded up to a multiple of `world`, and of similar size.

    The capacity starts at the mean load and grows by 2 % until first-fit decreasing needs no more groups than that;
    equal groups keep every rank busy for the same time.
    """
    packed = pack(lengths, images, stage.micro_tokens, stage.micro_images)
    num = -(-len(packed) // world) * world
    share = -(-sum(lengths) // max(1, num))
    while share < stage.micro_tokens:
        even = pack(lengths, images, share, stage.micro_images)
        if len(even) <= num:
            packed = even
            break
        share += 1 + share // 50
    return split_for_ranks(packed, world)


def group_by_length(lengths: Sequence[int], images: Sequence[int], stage: Stage, world: int) -> Groups:
    """Group samples of similar length; rows * longest length <= `micro_tokens`, images <= `micro_images`."""
    groups: Groups = []
    longest = shown = 0
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = groups and (len(groups[-1]) + 1) * longest <= stage.micro_tokens
        if fits and shown + images[position] <= stage.micro_images:
            groups[-1].append(position)
            shown += images[position]
        else:
            groups.append([position])
            longest, shown = lengths[position], images[position]
    return split_for_ranks(groups, world)


def split_for_ranks(groups: Groups, world: int) -> Groups:
    """Halve the group with most samples until the number of groups is a multiple of `world`; some may end up empty."""
    groups = list(groups)
    while len(groups) % world:
        big = max(range(len(groups)), key=lambda g: (len(groups[g]), -g))
        half = -(-len(groups[big]) // 2)
        groups[big : big + 1] = [groups[big][:half], groups[big][half:]]
    return groups


class Plan:
    """Which samples each step takes, and how they are packed."""

    def __init__(self, measured: Measured, stage: Stage, far: int = 0) -> None:
        """far: a sample of more tokens than this shares no micro-batch with shorter ones; 0: any may share one."""
        self.measured, self.stage, self.far = measured, stage, far
        self.usable = measured.usable
        self.num_samples = max(1, round(stage.epochs * len(self.usable)))
        self.steps = stage.steps or -(-self.num_samples // stage.batch_size)
        if stage.steps:
            self.num_samples = stage.steps * stage.batch_size
        self._epochs: dict[int, NDArray[np.int64]] = {}

    def samples(self, step: int) -> list[int]:
        """Return the sample indices of a step, counted from 0; a step may span two epochs."""
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
        """Return the step's micro-batches, a multiple of `world`; rank r takes those at r, r + world, r + 2 world, …"""
        samples = self.samples(step)
        if not self.far:
            return self._group(samples, world)
        near, beyond = ([i for i in samples if (self.measured.lengths[i] > self.far) == far] for far in (False, True))
        return self._group(near, world) + self._group(beyond, world)

    def _group(self, samples: list[int], world: int) -> list[Rows]:
        stage = self.stage
        lengths = [int(self.measured.lengths[i]) for i in samples]
        images = [int(self.measured.images[i]) for i in samples]
        if stage.packing:
            groups = pack_evenly(lengths, images, stage, world)
            return [[[samples[i] for i in group]] if group else [] for group in groups]
        return [[[samples[i]] for i in group] for group in group_by_length(lengths, images, stage, world)]


@dataclass
class Batch:
    """One micro-batch. b rows of l positions, s supervised positions, n images in order of appearance.

    Either one row of documents side by side, or one document per row, padded on the right.
    """

    ids_bl: Tensor  # i64
    positions_bl: Tensor  # i64, from 0 in each document; in each branch of a tree, from the end of its trunk
    supervised_s: Tensor  # i64 into the flattened b*l: the position that predicts
    targets_s: Tensor  # i64: what it should predict
    owners_s: Tensor  # i64: the sample index of each target
    pixels_nchw: Tensor | None  # u8; None without images, or where features are cached
    images: list[int]  # the sample index of each image
    lengths: list[int]  # of the documents, row by row
    skipped: dict[int, str] = field(default_factory=dict)
    shown_p: Tensor | None = None  # i64 into the flattened b*l: the positions of image tokens
    trees: list[tuple[int, ...]] = field(default_factory=list)  # lengths of trunk and branches, by document; (): none

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def num_squares(self) -> int:
        """The sum of the documents' squared lengths, which attention costs; a tree's branches cost less."""
        return sum(map(message_tree.squares, self.lengths, self.trees or [()] * len(self.lengths)))

    @property
    def documents(self) -> list[int]:
        """The lengths of the documents in the one row; none where there are several rows, of one document each."""
        return self.lengths if len(self.ids_bl) == 1 else []

    def to(self, device: torch.device) -> Batch:
        """Move the tensors to a device, except `owners_s`, which only the CPU reads."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """Copy the tensors to pinned memory; the DataLoader calls this."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        names = ("ids_bl", "positions_bl", "supervised_s", "targets_s", "pixels_nchw", "shown_p")
        changed: dict[str, Any] = {n: change(tensor) for n in names if (tensor := getattr(self, n)) is not None}
        return replace(self, **changed)


class Collator:
    """Build micro-batches from sample indices: read, decode, encode, lay out; runs in the loader's workers."""

    def __init__(self, source: Source, encoder: Encoder, image_processor: Any, max_length: int) -> None:
        self.source, self.encoder, self.max_length = source, encoder, max_length
        self.image_processor = image_processor
        self.decode = True  # false: features are cached, pixels are not needed
        self.skip: dict[int, str] = {}  # samples whose pixels are known to be bad

    def pixels(self, locations: Sequence[Any]) -> list[Tensor]:
        """Decode and resize images to u8 [3, h, w], with the code of the exported processor.  Raises: Rejected."""
        images = [decode_image(self.source.image_bytes(location)) for location in locations]
        if not images:
            return []
        out = self.image_processor(images, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return [torch.from_numpy(np.ascontiguousarray(image)) for image in out]

    def __call__(self, rows: Rows) -> Batch:
        """Build a micro-batch; a sample with broken pixels is left out and listed in `skipped`."""
        ids: list[list[NDArray[Any]]] = []
        pixels: list[Tensor] = []
        images: list[int] = []
        skipped: dict[int, str] = {}
        documents: list[Document] = []
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
                documents.append((len(ids), start, encoded, index))
                parts.append(encoded.ids)
                start += len(encoded.ids)
            if parts:
                ids.append(parts)
        batch = _arrange(ids, documents, torch.stack(pixels) if pixels else None, images, skipped)
        shown_p = np.flatnonzero(batch.ids_bl.numpy() == self.encoder.image_id)
        return replace(batch, shown_p=torch.from_numpy(shown_p))


def _arrange(
    ids: list[list[NDArray[Any]]],
    documents: list[Document],
    pixels: Tensor | None,
    images: list[int],
    skipped: dict[int, str],
) -> Batch:
    width = max((sum(map(len, parts)) for parts in ids), default=0)
    ids_bl = np.zeros((len(ids), width), np.int64)
    positions_bl = np.tile(np.arange(width), (len(ids), 1))
    for r, parts in enumerate(ids):
        row = np.concatenate(parts)
        ids_bl[r, : len(row)] = row
    where, targets, owners = [], [], []
    for r, start, one, index in documents:
        stop = start + len(one.ids)
        positions_bl[r, start:stop] = message_tree.positions(len(one.ids), one.tree)
        learnt = np.flatnonzero(one.labels[1:] >= 0)
        where.append(r * width + start + learnt)
        targets.append(one.labels[1:][learnt])
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
        lengths=[len(part) for parts in ids for part in parts],
        trees=[one.tree for _, _, one, _ in documents],
        skipped=skipped,
    )


class Passes(torch.utils.data.Dataset[Batch]):
    """(step, n) -> the n-th micro-batch of this process in that step; small items, so that workers share a step."""

    def __init__(self, plan: Plan, collator: Collator, rank: int, world: int) -> None:
        self.plan, self.collator, self.rank, self.world = plan, collator, rank, world
        self._groups: tuple[int, list[Rows]] = (-1, [])

    def __getitem__(self, at: tuple[int, int]) -> Batch:
        step, number = at
        return self.collator(self._own(step)[number])

    def _own(self, step: int) -> list[Rows]:
        if self._groups[0] != step:
            self._groups = (step, self.plan.micro_batches(step, self.world)[self.rank :: self.world])
        return self._groups[1]

    def steps(self, start: int, stop: int, workers: int, pin: bool) -> Iterator[list[Batch]]:
        """Yield the micro-batches of each step, decoded ahead."""
        sizes = deque[int]()

        def order() -> Iterator[tuple[int, int]]:
            for step in range(start, stop):
                sizes.append(len(self._own(step)))
                yield from ((step, number) for number in range(sizes[-1]))

        batches = load(self, order(), workers, pin)
        for _ in range(start, stop):
            first = next(batches)  # asking for it fills in the size of its step
            yield [first, *(next(batches) for _ in range(sizes.popleft() - 1))]


def shared_memory_advice(plan: Plan, workers: int, world: int, image_bytes: int, free: int) -> str:
    """Return a warning if the passes that `workers` decode ahead may not fit into shared memory, else "".

    image_bytes: size of a decoded image.  free: free bytes in /dev/shm.
    """
    passes = [rows for step in range(min(8, plan.steps)) for rows in plan.micro_batches(step, world)]
    images = [sum(int(plan.measured.images[index]) for row in rows for index in row) for rows in passes]
    needed = workers * (PREFETCH + 1) * max(images, default=0) * image_bytes
    if needed <= free:
        return ""
    return (
        f"{workers} workers may hold {needed / 1e9:.1f} GB of decoded images in /dev/shm, which has "
        f"{free / 1e9:.1f} GB free; give the container more (docker run --shm-size), or lower workers or micro_images"
    )


class Images(torch.utils.data.Dataset[tuple[Tensor | None, str]]):
    """Sample index -> its pixels u8 [n, 3, h, w], or None and the reason."""

    def __init__(self, collator: Collator) -> None:
        self.collator = collator

    def __getitem__(self, index: int) -> tuple[Tensor | None, str]:
        try:
            return torch.stack(self.collator.pixels(self.collator.source.record(index).images)), ""
        except Rejected as reason:
            return None, str(reason)


def load(dataset: Any, order: Iterable[Any], workers: int, pin: bool) -> Any:
    """Iterate a dataset in order, decoding ahead in worker processes; the order does not depend on their number."""
    if workers:
        _refuse_without_semaphores()
        # Each tensor in transit holds an open file, so the usual limit of 1,024 is soon reached.
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_FILES)), hard))
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        multiprocessing_context="fork" if workers else None,
        pin_memory=pin,
        worker_init_fn=_ignore_signals,
    )
    # A worker inherits the blocked signals, so that none can end it before it ignores them.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        return iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _refuse_without_semaphores() -> None:
    """Raise TrainError if worker processes cannot be reached; a half-built loader would end in a traceback."""
    try:
        torch.multiprocessing.get_context("fork").Lock()
    except OSError as error:
        needs = "decoding workers need a writable /dev/shm with free space"
        raise TrainError(f"{needs}: {error}; set workers = 0 to decode without them") from None


def _ignore_signals(_worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which go to the whole process group, to the training process, which saves first.

    SIGTERM stays blocked and a thread receives it: it is obeyed only from the training process, which ends its workers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
