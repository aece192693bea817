"""The frozen tower's features of every image, kept in CPU memory, for repeated epochs over few images.

A frozen tower gives the same features for an image in every epoch, so they are computed once before the first step.
Table: [images, tokens an image, width] in the run's dtype; 729 tokens of width 1,152 in bf16 are 1.7 MB an image.
Images are computed in chunks of a fixed size and in sample order, so that a resumed run repeats them bit for bit.
"""

from __future__ import annotations

import logging
from collections import Counter

import torch
from torch import Tensor

from train.config import Stage
from train.data.batches import Collator, Images, Plan, load
from train.data.sources import check_bad
from train.dist import Runtime
from train.model.compose import Composed
from train.model.forward import tower_features

FEATURE_CHUNK = 64  # images whose features are computed together; fixed, so that resuming repeats them
log = logging.getLogger("train")


class FeatureCache:
    """The table of features and where each sample's images stand in it."""

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
        samples = [int(i) for i in plan.usable if plan.measured.images[i] and int(i) not in skipped]
        total = int(plan.measured.images[samples].sum()) if samples else 0
        width = composed.model.model.vision_tower.config.hidden_size
        self.table = torch.empty((total, composed.vision.tokens_per_image, width), dtype=runtime.dtype)
        self.at: dict[int, tuple[int, int]] = {}
        filled, pending = 0, []
        loader = load(Images(collator), samples, stage.workers, False)
        for index, (pixels, reason) in zip(samples, loader, strict=True):
            if pixels is None:
                skipped[index] = collator.skip[index] = reason
                continue
            self.at[index] = (filled, filled + len(pixels))
            filled += len(pixels)
            pending.append(pixels)
            if sum(map(len, pending)) >= FEATURE_CHUNK:
                self._flush(pending, filled)
                pending = []
        if pending:
            self._flush(pending, filled)
        check_bad(collator.source, skipped, stage.max_bad_share)
        collator.decode = False

    def _flush(self, pending: list[Tensor], end: int) -> None:
        pixels = torch.cat(pending).to(self.runtime.device)
        with self.runtime.autocast():
            out = tower_features(self.composed, pixels)
        self.table[end - len(pixels) : end] = out.to(self.table.dtype).cpu()

    def get(self, images: list[int]) -> Tensor:
        """Return [n, tokens, width].  images: the sample index of each image; those of a sample stand side by side."""
        rows, seen = [], Counter[int]()
        for i in images:
            first, last = self.at[i]
            rows.append(first + seen[i] % (last - first))  # a sample may stand twice in a batch
            seen[i] += 1
        return self.table[rows]


def cache_features(
    composed: Composed, stage: Stage, plan: Plan, collator: Collator, runtime: Runtime, skipped: dict[int, str]
) -> FeatureCache | None:
    """Build the cache if it fits in the stage's `cache_features_mb` and the run makes a whole epoch or more."""
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
