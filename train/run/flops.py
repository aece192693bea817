"""The useful floating-point operations of a step, for the model FLOPs utilisation (MFU).

    MFU = operations / (seconds of the step * peak operations a second of one device * number of devices)

A product of [m, k] and [k, n] counts 2 m k n. Each operation that the mathematics needs counts once; recomputed
activations, recomputed logits and padding do not count. A linear layer with P weights costs 2 P per token forward, 2 P
for the gradient of its input and 2 P for that of its weights; in a mixture, P counts the experts that a token uses.
With T tokens, T_sup supervised ones, L layers of width d, V words:

    language model   4 P T if frozen (forward, gradient of inputs), 6 P T if trained; LoRA adds 6 P_lora T; weights of
                     the last layer that only labelled positions need (skip_unlabelled.py) count T_sup, not T
    its attention    6 L d T^2 per document: forward and backward, causal
    logits           4 d V T_sup, 6 if the head is trained
    projector        6 P T_image
    tower            2 P T_tower + 4 L d T_tower^2 per image (per tile with S²), three times that if it is trained,
                     0 with cached features

Counting costs nothing on the device: only lengths and shapes are read.
Source: PaLM (arXiv:2204.02311), appendix B, extended to frozen layers and LoRA.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from train.config import Stage
from train.data.batches import Batch, Rows
from train.data.sources import Measured
from train.model.compose import Composed
from train.model.skip_unlabelled import last_parts
from train.model.tower import HEADS

CHOSEN = ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts")  # keys, by family: number of experts per token
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0}  # dense bf16, from NVIDIA's data sheets (SXM)


@dataclass(frozen=True)
class Cost:
    """Floating-point operations per unit of each cause: token, image, supervised position, …"""

    token: float
    square: float  # attention, per unit of the sum of squared document lengths
    target: float  # the head and the end of the last layer, per supervised position
    image: float  # the projector, per image
    tower: float  # the tower, per image

    @classmethod
    def of(cls, composed: Composed, stage: Stage) -> Self:
        """Count the operations of a model that is prepared for a stage."""
        config, tower = composed.model.config.text_config, composed.model.config.vision_config
        inner, vision = composed.model.model, composed.vision
        learns = 6 if stage.tune == "full" else 4
        heads = config.num_attention_heads
        width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
        one = getattr(tower, "tower_config", tower)  # the tower of each tile, if there are several scales
        first = int(vision.has_class_token) + getattr(tower, "tokens_skipped", 0)
        seen = (vision.image_size // vision.patch_size) ** 2 + first
        blocks = composed.feature_index
        forward = 2 * _weights(inner.vision_tower, without=HEADS) * seen + 4 * blocks * one.hidden_size * seen**2
        forward = (getattr(one, "flops", 0) or forward) * getattr(tower, "num_tiles", 1)  # of timm's: counted by torch

        def words(module: nn.Module) -> float:
            read = _weights(module, without=("lora_",)) + _experts(module, config)
            return learns * read + 6.0 * _weights(module, only="lora_")

        late = sum(map(words, last_parts(inner.language_model)))
        return cls(
            token=words(inner.language_model) - late,
            square=6.0 * config.num_hidden_layers * width,
            target=learns * config.hidden_size * config.vocab_size + late,
            image=6.0 * _weights(inner.multi_modal_projector) * vision.tokens_per_image,
            tower=float(forward * (3 if stage.tune_tower else 1)),
        )

    def flops(self, batch: Batch, *, cached: bool) -> float:
        """Return the operations of a micro-batch, from its counts alone, so that it does not wait for the device."""
        words = self.token * batch.num_tokens + self.square * batch.num_squares + self.target * len(batch.targets_s)
        return words + (self.image + (0.0 if cached else self.tower)) * len(batch.images)

    def parts(self, measured: Measured, passes: Iterable[Rows], *, padded: bool) -> dict[str, float]:
        """Sum the operations of passes over samples, by part; padded: all as long as the longest, logits everywhere."""
        sums = np.zeros(4)
        for rows in passes:
            samples = [sample for row in rows for sample in row]
            lengths = measured.lengths[samples].astype(np.int64)
            if padded:
                lengths = np.full(len(samples), lengths.max(initial=0))
            targets = lengths.sum() if padded else measured.supervised[samples].sum()
            sums += lengths.sum(), (lengths**2).sum(), targets, measured.images[samples].sum()
        tokens, squares, targets, images = map(float, sums)
        parts = {"language model": self.token * tokens + self.square * squares, "vocabulary": self.target * targets}
        return {**parts, "projector": self.image * images, "tower": self.tower * images}


def published(composed: Composed, stage: Stage) -> Cost:
    """Count a step of the published scripts: one more forward pass of the language model, logits at all positions."""
    cost, config, lm = Cost.of(composed, stage), composed.model.config.text_config, composed.model.model.language_model
    head = (6.0 if stage.tune == "full" else 4.0) * config.hidden_size * config.vocab_size
    token = cost.token + (cost.target - head) + 2.0 * (_weights(lm) + _experts(lm, config))
    return replace(cost, token=token, square=cost.square * 8 / 6, target=head)


def _weights(module: Any, *, only: str = "", without: tuple[str, ...] = ()) -> int:
    return sum(
        part.in_features * part.out_features if isinstance(part, nn.Linear) else part.weight.numel()
        for name, part in module.named_modules(prefix="vision_tower")
        if isinstance(part, (nn.Linear, nn.Conv2d)) and only in name and not any(word in name for word in without)
    )


def _experts(module: nn.Module, config: Any) -> float:
    """Return the weights of a mixture's experts that one token passes through: tensors of [experts, in, out]."""
    chosen, tensors = mixture(module, config)
    return float(sum(chosen * p.numel() / len(p) for p in tensors))


def mixture(module: nn.Module, config: Any) -> tuple[int, list[nn.Parameter]]:
    """Return how many experts a token uses, and the tensors [experts, in, out] of all; none if not a mixture."""
    chosen = next((k for name in CHOSEN if (k := getattr(config, name, None))), 1)
    parts = (part for part in module.modules() if not isinstance(part, nn.Conv1d))
    return chosen, [p for part in parts for p in part.parameters(recurse=False) if p.dim() == 3]


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float) -> float | None:
    """Return one device's peak operations per second: as given, else of a known GPU in bf16, else None."""
    if given_tflops:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    if any(other in name for other in ("PCIe", "NVL", "MIG")):  # slower than SXM boards of that name, or a part of one
        return None
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)
