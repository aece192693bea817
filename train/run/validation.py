"""The loss of held-out samples during a run: the mean over their supervised tokens on all ranks, without dropout."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from train.data.batches import Batch, Collator, Passes, Plan
from train.dist import Runtime

BATCH = 64  # samples that are packed at a time
log = logging.getLogger("train")


@dataclass
class Validation:
    """Held-out samples as a plan of one epoch, with the collator that decodes them."""

    plan: Plan
    collator: Collator
    runtime: Runtime
    broken: dict[int, str] = field(default_factory=dict)  # sample -> why its pictures could not be read

    def loss(self, model: nn.Module, losses: Callable[[Batch], Tensor]) -> float:
        """Return the mean loss; a collective.  losses: f32 [s] of a batch's supervised positions, on the device."""
        runtime, stage = self.runtime, self.plan.stage
        modes = {module: module.training for module in model.modules()}
        model.eval()
        total, count = torch.zeros((), dtype=torch.float64, device=runtime.device), 0
        passes = Passes(self.plan, self.collator, runtime.rank, runtime.world)
        try:
            with torch.no_grad():
                for batches in passes.steps(0, self.plan.steps, stage.num_workers, runtime.device.type == "cuda"):
                    for batch in batches:
                        self._note(batch)
                        if len(batch.targets_s) or stage.shard:
                            total += losses(batch).double().sum()
                            count += len(batch.targets_s)
        finally:
            for module, training in modes.items():
                module.training = training
        total_sum, tokens = runtime.sum_over_ranks([float(total), float(count)])
        return total_sum / max(1.0, tokens)

    def _note(self, batch: Batch) -> None:
        new = {index: reason for index, reason in batch.skipped.items() if index not in self.broken}
        self.broken |= new
        for index, reason in new.items():
            log.warning("%s is left out of the validation (%s)", self.collator.source.name(index), reason)
