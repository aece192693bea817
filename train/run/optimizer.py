"""AdamW and its learning-rate schedule: a linear rise, then a cosine to zero, or a plateau and a linear fall."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from train.config import Stage
from train.run.checkpoint import PROJECTOR


def schedule(step: int, steps: int, stage: Stage) -> float:
    """Return the factor on the learning rate of a step, counted from 0: a linear rise, then a fall to zero.

    cosine: 0.5 (1 + cos(pi t)) for t from 0 to 1 after the rise.  wsd (warm-up, stable, decay): 1, then a straight
    line over the last `decay` of the steps (MiniCPM, arXiv:2404.06395).
    """
    rise = math.ceil(stage.warmup * steps)
    if step < rise:
        return (step + 1) / rise
    if stage.schedule == "wsd":
        return min(1.0, (steps - step) / max(1, math.ceil(stage.decay * steps)))
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(stage: Stage, trainable: Mapping[str, nn.Parameter], *, fused: bool = False) -> torch.optim.AdamW:
    """Build AdamW with `projector_lr` for the projector (and tower), and weight decay on matrices only.

    fused: one kernel for many parameters, which reads and writes each number once; results differ by rounding only.
    """
    groups = []
    for in_projector in (True, False):
        for matrix in (True, False):
            near = (PROJECTOR, "model.vision_tower.")
            parameters = [
                p for n, p in trainable.items() if n.startswith(near) == in_projector and (p.ndim >= 2) == matrix
            ]
            lr = (stage.projector_lr or stage.lr) if in_projector else stage.lr
            decay = stage.weight_decay if matrix else 0.0
            if parameters:
                groups.append({"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=stage.betas, fused=fused)
