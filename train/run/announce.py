"""What a stage logs before its first step: what it reads, and what it trains."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from train.data.batches import Plan
from train.data.sources import Measured
from train.model.compose import Composed

log = logging.getLogger("train")


def announce(measured: Measured, plan: Plan, trainable: dict[str, Any], composed: Composed, stage_name: str) -> None:
    """Log samples, tokens and weights.  measured: all samples; plan: those that are trained on."""
    usable = plan.usable
    counts = Counter(measured.reasons.values())
    trees = f", {measured.num_trees} message trees" if measured.num_trees else ""
    log.info(
        "%d samples (%d with an image%s, %d cut at max_length, %d skipped%s), %d tokens, %d supervised",
        *(len(usable), int((measured.images[usable] > 0).sum()), trees, measured.num_truncated, len(measured.reasons)),
        *("".join(f"; {reason}: {count}" for reason, count in sorted(counts.items())), int(measured.lengths.sum())),
        int(measured.supervised.sum()),
    )
    if measured.num_thinking or measured.num_shortened:
        told = "%d samples end with an answer that thinks first; in %d the chat template leaves out earlier thinking"
        log.info(told, measured.num_thinking, measured.num_shortened)
    positions = getattr(composed.model.config.text_config, "max_position_embeddings", None)
    if positions and (longer := int((measured.lengths > positions).sum())):
        told = "%d samples are longer than the language model's %d positions; --set model.max_length=%d cuts them"
        log.warning(told, longer, positions, positions)
    learning = sum(p.numel() for p in trainable.values())
    everything = sum(p.numel() for p in composed.model.parameters())
    log.info("%s trains %s of %s parameters in %d steps", stage_name, f"{learning:,}", f"{everything:,}", plan.steps)
