"""What autocast and PEFT would do in fp32 though bf16 comes in and bf16 is wanted; results change by rounding only.

Under autocast a layer norm turns its input and weights into fp32 and gives fp32, which the next linear layer turns into
bf16 again: 2 casts and 8 bytes an element where 2 are read and 2 written. The kernel itself sums in fp32 whatever comes
in, so that a norm on bf16 gives the same numbers, rounded once. PEFT turns the input of each LoRA into fp32, as its
weights are; dropout then works on that, and autocast turns it into bf16 again for the product. (Layers that lora.py
takes never do; DoRA's and quantized ones would.)

transformers writes an RMS norm as eight kernels, most of them on fp32, and their backward passes as more; torch has the
same function as one each way on a GPU (`_fused_rms_norm`), which sums in fp32 and rounds once, where Llama's class
rounds before its weights and behind them. Gemma's weights, stored less 1, are added up in fp32 as its class does, so
that its norm stands between two casts. A class is changed if it gives what torch's function gives, whatever its name
says; so norms of twice the rows, with gates or without weights stay what they are.

Not touched are layer norms that learn (their weights are fp32) and those of timm's networks. fp32 runs keep their layer
norms and LoRA; their RMS norms are torch's, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """A layer norm that stays in half precision where its input and its weights are."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise [..., d]; the result has the input's type where that is the weights' too."""
        if (
            self.weight is None
            or input.dtype not in (torch.bfloat16, torch.float16)
            or input.dtype != self.weight.dtype
        ):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)


class RMSNorm(nn.Module):
    """An RMS norm as torch has it, before a class that gives the same; runs where input and weights are of one type."""

    weight: Tensor
    added = 0.0  # to the weights

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., d]; the result has the input's type."""
        if x.dtype != self.weight.dtype:
            result: Tensor = super().forward(x)
            return result
        with torch.autocast(x.device.type, enabled=False):
            if not self.added:
                return nn.functional.rms_norm(x, self.weight.shape, self.weight, _epsilon(self))
            weight = self.weight.float() + self.added
            return nn.functional.rms_norm(x.float(), weight.shape, weight, _epsilon(self)).to(x.dtype)


def _epsilon(norm: Any) -> float:
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)


@cache
def _fused(kind: type, added: float) -> type:
    return type(kind.__name__, (RMSNorm, kind), {"added": added})


def _added(norm: Any) -> float | None:
    """Return what a norm adds to its weights; None if it is not RMS normalisation times its weights and no more."""
    weight = getattr(norm, "weight", None)
    if "RMSNorm" not in type(norm).__name__ or not isinstance(weight, Tensor) or weight.dim() != 1:
        return None
    draw = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(rows, len(weight), generator=draw) for rows in (3, 1))
    x *= torch.tensor([[1.0], [1e-3], [30.0]])  # among them a row no larger than its epsilon
    try:
        given = torch.func.functional_call(norm, {"weight": weights[0]}, (x,))
        for added in (0.0, 1.0):
            expected = nn.functional.rms_norm(x, weight.shape, weights[0] + added, _epsilon(norm))
            if given.shape == x.shape and torch.allclose(given, expected, rtol=1e-5, atol=1e-6):
                return added
    except (AttributeError, TypeError):  # no epsilon; more arguments
        pass
    return None


def stay_half(model: Any) -> None:
    """Let the norms of a prepared model, and the inputs of its LoRA, stay in bf16 where they are."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
        elif (added := _added(module)) is not None:
            kind: Any = type(module)
            module.__class__ = _fused(kind, added)
