"""Keep in bf16 what autocast and PEFT would needlessly compute in fp32; results change by rounding only.

Under autocast a layer norm casts its input and weights to fp32 and returns fp32, which the next linear layer casts back
to bf16: 2 casts and 8 bytes per element, where 2 read and 2 written would do. The kernel sums in fp32 for any input
type, so that a norm on bf16 gives the same numbers, rounded once. PEFT casts the input of each LoRA to fp32, the type
of its weights; dropout then works on that, and autocast casts it back to bf16 for the product. (Layers that lora.py
handles avoid this; DoRA's and quantized ones would not.)

transformers writes an RMS norm as eight kernels, most of them on fp32, and more for the backward pass; torch has the
same function as one kernel each way on a GPU (`_fused_rms_norm`), which sums in fp32 and rounds once, where Llama's
class rounds before and after its weights. Gemma's weights are stored minus 1, and the 1 is added in fp32, as in its
class, so that its norm still needs two casts. A class is replaced if it computes what torch's function does, whatever
its name; so norms over two sets of rows, with gates or without weights stay as they are.

Not touched are trained layer norms (their weights are fp32) and those of timm's networks. fp32 runs keep their layer
norms and LoRA; their RMS norms become torch's, too.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class LayerNorm(nn.LayerNorm):
    """A layer norm that stays in half precision if its input and its weights have it."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Normalise [..., d]; the result has the input's type if the weights have the same."""
        if (
            self.weight is None
            or input.dtype not in (torch.bfloat16, torch.float16)
            or input.dtype != self.weight.dtype
        ):
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input)


class RMSNorm(nn.Module):
    """torch's RMS norm in place of a class that computes the same; used if input and weights have one type."""

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
    """Return what a norm adds to its weights; None if it is not exactly RMS normalisation times its weights."""
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
    """Keep the norms of a prepared model, and the inputs of its LoRA, in bf16 if they are in bf16."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
        elif (added := _added(module)) is not None:
            kind: Any = type(module)
            module.__class__ = _fused(kind, added)
