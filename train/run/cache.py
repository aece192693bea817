"""The frozen tower's features of every image, kept in CPU memory, for repeated epochs over few images.

A frozen tower gives the same features for an image in every epoch, so they are computed once before the first step.
Table: [images, tokens per image, width] in the run's dtype; 729 tokens of width 1,152 in bf16 are 1.7 MB per image.
Images are computed in chunks of a fixed size and in sample order, so that a resumed run repeats them bit for bit. Each
rank computes its share of the chunks. The ranks of one machine write into one table: an unlinked temporary file that
they all map, so that it is held once and disappears with them.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines import memory
from train.config import Stage
from train.data.batches import Collator, Images, Plan, load
from train.data.sources import check_bad
from train.dist import Runtime
from train.model.compose import Composed
from train.model.forward import tower_features

FEATURE_CHUNK = 64  # images whose features are computed together; fixed, so that resuming repeats them
log = logging.getLogger("train")


class FeatureCache:
    """The table of features, and where each sample's images are in it."""

    def __init__(
        self,
        composed: Composed,
        stage: Stage,
        plan: Plan,
        collator: Collator,
        runtime: Runtime,
        skipped: dict[int, str],
    ) -> None:
        """Compute the features of all images of the plan.  skipped: sample -> reason; broken images are added to it."""
        self.composed, self.runtime = composed, runtime
        # Not on a processor: if a second thread runs parallel operations too, OpenMP counts more threads than cores,
        # and then all of them sleep and are woken at each operation: steps took 1.17 times as long (libgomp).
        self._thread = ThreadPoolExecutor(1) if runtime.device.type == "cuda" else None
        self._coming: Iterator[list[int]] = iter(())
        self._ahead: tuple[list[int], Future[Tensor]] | None = None
        samples = [int(i) for i in plan.usable if plan.measured.images[i] and int(i) not in skipped]
        ends = np.cumsum(plan.measured.images[samples]) if samples else np.zeros(1, np.int64)
        self.at = {i: (int(end - plan.measured.images[i]), int(end)) for i, end in zip(samples, ends, strict=False)}
        width = composed.model.model.vision_tower.config.hidden_size
        self.table = _make_table((int(ends[-1]), composed.vision.tokens_per_image, width), runtime)
        _, local_rank, local_world = runtime.place
        own = chunks(samples, [self.at[i] for i in samples])[local_rank::local_world]
        loader = load(Images(collator), [i for chunk in own for i in chunk], stage.num_workers, False)
        broken: dict[int, str] = {}
        with memory.kept():
            for chunk in own:
                pixels = dict(zip(chunk, (next(loader) for _ in chunk), strict=True))
                broken |= {i: reason for i, (seen, reason) in pixels.items() if seen is None}
                self._compute({i: seen for i, (seen, _) in pixels.items() if seen is not None})
        for part in runtime.gather(broken):
            skipped |= part
            collator.skip |= part
        check_bad(collator.source, skipped, stage.max_bad_share)
        collator.decode = False

    def _compute(self, pixels: dict[int, Tensor]) -> None:
        """Fill the rows of some samples.  pixels: sample -> u8 [n, 3, h, w]."""
        if not pixels:
            return
        with self.runtime.autocast():
            out = tower_features(self.composed, torch.cat(list(pixels.values())).to(self.runtime.device))
        out = out.to(self.table.dtype).cpu()
        for index, part in zip(pixels, out.split([len(seen) for seen in pixels.values()]), strict=True):  # type: ignore[no-untyped-call]
            self.table[slice(*self.at[index])] = part

    def get(self, images: list[int]) -> Tensor:
        """Return [n, tokens, width] on the run's device.

        images: the sample index of each image; images of one sample are adjacent.
        """
        ahead = self._ahead
        if ahead is None or ahead[0] != images:
            return self._gather(images).to(self.runtime.device, non_blocking=True)
        self._gather_ahead()
        return ahead[1].result().to(self.runtime.device, non_blocking=True)

    def expect(self, coming: Iterable[list[int]]) -> None:
        """Announce what `get` will be asked for, in order: with a GPU, a thread gathers it one micro-batch ahead."""
        self._coming = iter(coming)
        self._gather_ahead()

    def _gather_ahead(self) -> None:
        images, self._ahead = next(self._coming, None), None
        if images is not None and self._thread is not None:
            self._ahead = images, self._thread.submit(self._gather, images)

    def _gather(self, images: list[int]) -> Tensor:
        """Collect the features of images, in pinned memory if they go to a GPU."""
        rows, seen = [], Counter[int]()
        for i in images:
            first, last = self.at[i]
            rows.append(first + seen[i] % (last - first))  # a sample may occur twice in a batch
            seen[i] += 1
        shape, pinned = (len(rows), *self.table.shape[1:]), self.runtime.device.type == "cuda"
        out = torch.empty(shape, dtype=self.table.dtype, pin_memory=pinned)
        return torch.index_select(self.table, 0, torch.tensor(rows), out=out)


def chunks(samples: Sequence[int], spans: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Split samples, whose images are at `spans`, into chunks of FEATURE_CHUNK images or a few more."""
    cut: list[list[int]] = []
    first = -FEATURE_CHUNK
    for index, (start, _) in zip(samples, spans, strict=True):
        if start - first >= FEATURE_CHUNK:
            cut.append([])
            first = start
        cut[-1].append(index)
    return cut


def _make_table(shape: tuple[int, ...], runtime: Runtime) -> Tensor:
    """Make an empty table, which the ranks of a machine share."""
    numel, itemsize = math.prod(shape), runtime.dtype.itemsize
    if runtime.world == 1 or numel == 0:
        return torch.empty(shape, dtype=runtime.dtype)

    def make(local: int, _ranks_here: int) -> dict[str, str]:
        if local:
            return {}
        handle, name = tempfile.mkstemp(prefix="train-features-")
        os.truncate(handle, numel * itemsize)
        os.close(handle)
        return {"table": name}

    name = runtime.share_here(make)["table"]
    table = torch.from_file(name, shared=True, size=numel, dtype=runtime.dtype).view(shape)
    runtime.barrier()
    if runtime.place[1] == 0:
        os.unlink(name)
    return table


def cache_features(
    composed: Composed, stage: Stage, plan: Plan, collator: Collator, runtime: Runtime, skipped: dict[int, str]
) -> FeatureCache | None:
    """Build the cache if it fits in the stage's `cache_features_mb` and the run takes at least one whole epoch."""
    if not stage.cache_features_mb or stage.tune_tower:
        return None
    tokens, width = composed.vision.tokens_per_image, composed.model.config.vision_config.hidden_size
    megabytes = int(plan.measured.images.sum()) * tokens * width * runtime.dtype.itemsize / 1e6
    if megabytes > stage.cache_features_mb:
        log.info("features are not cached: %.0f MB, cache_features_mb = %d", megabytes, stage.cache_features_mb)
    elif plan.num_samples >= len(plan.usable):
        cache = FeatureCache(composed, stage, plan, collator, runtime, skipped)
        log.info("features of %d images cached (%.0f MB)", len(cache.table), megabytes)
        return cache
    return None
