"""What autocast and PEFT would do in fp32 though bf16 comes in and bf16 is wanted; results change by rounding only.

Under autocast a layer norm turns its input and weights into fp32 and gives fp32, which the next linear layer turns into
bf16 again: 2 casts and 8 bytes an element where 2 are read and 2 written. The kernel itself sums in fp32 whatever comes
in, so that a norm on bf16 gives the same numbers, rounded once. PEFT turns the input of each LoRA into fp32, as its
weights are; dropout then works on that, and autocast turns it into bf16 again for the product.

Not touched are norms that learn (their weights are fp32), those of timm's networks, and fp32 runs.
"""

from __future__ import annotations

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


def stay_half(model: Any) -> None:
    """Let the layer norms of a prepared model, and the inputs of its LoRA, stay in bf16 where they are."""
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.__class__ = LayerNorm
        elif hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
