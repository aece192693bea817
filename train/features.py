"""The frozen tower's features of every image in memory, for repeated passes over few images."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from train.batches import Images, load
from train.data import check_bad
from train.model import tower_features

if TYPE_CHECKING:
    from train.loop import Training

FEATURE_CHUNK = 64  # images whose features are computed together; fixed, so that resuming repeats them
log = logging.getLogger("train")


class FeatureCache:
    """The frozen tower's features of every image, computed once, in sample order and in chunks of fixed size."""

    def __init__(self, training: Training) -> None:
        plan, vision = training.plan, training.composed.vision
        tower = training.composed.model.model.vision_tower
        samples = [int(i) for i in plan.usable if plan.measured.images[i] and int(i) not in training.skipped]
        total = int(plan.measured.images[samples].sum()) if samples else 0
        shape = (total, vision.tokens_per_image, tower.config.hidden_size)
        self.table = torch.empty(shape, dtype=training.place.dtype)
        self.at: dict[int, tuple[int, int]] = {}
        filled, pending = 0, []
        loader = load(Images(training.collator), samples, training.stage.workers, False)
        for index, (pixels, reason) in zip(samples, loader, strict=True):
            if pixels is None:
                training.skipped[index] = training.collator.skip[index] = reason
                continue
            self.at[index] = (filled, filled + len(pixels))
            filled += len(pixels)
            pending.append(pixels)
            if sum(map(len, pending)) >= FEATURE_CHUNK:
                self._flush(training, pending, filled)
                pending = []
        if pending:
            self._flush(training, pending, filled)
        check_bad(training.collator.source, training.skipped, training.stage.max_bad_share)
        training.collator.decode = False

    def _flush(self, training: Training, pending: list[Tensor], end: int) -> None:
        pixels = torch.cat(pending).to(training.place.device)
        with training.place.autocast():
            out = tower_features(training.composed, pixels)
        self.table[end - len(pixels) : end] = out.to(self.table.dtype).cpu()

    def get(self, images: list[int]) -> Tensor:
        """Return [n, tokens, width] for images given by sample, one entry an image, those of a sample side by side."""
        rows, seen = [], Counter[int]()
        for i in images:
            first, last = self.at[i]
            rows.append(first + seen[i] % (last - first))  # a sample may stand twice in a batch
            seen[i] += 1
        return self.table[rows]


def cache_features(training: Training) -> None:
    """Keep the tower's features in memory where the stage allows it, they fit, and each is used at least once."""
    stage, plan = training.stage, training.plan
    if not stage.cache_features_mb or stage.tune_tower:
        return
    tokens, width = training.composed.vision.tokens_per_image, training.composed.model.config.vision_config.hidden_size
    megabytes = int(plan.measured.images.sum()) * tokens * width * training.place.dtype.itemsize / 1e6
    if megabytes > stage.cache_features_mb:
        log.info("features are not cached: %.0f MB, cache_features_mb = %d", megabytes, stage.cache_features_mb)
    elif plan.num_samples >= len(plan.usable):
        training.features = FeatureCache(training)
        log.info("features of %d images cached (%.0f MB)", len(training.features.table), megabytes)
