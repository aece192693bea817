"""A linear layer and its LoRA as one function each way; results change by rounding only.

PEFT computes y = W x + b, then y + s B (A x): a product of two thin matrices, times s, plus y. Each is a pass over an
output-sized tensor, and the backward pass has as many, as the gradient of x comes in two parts that are added. Here the
products add to an existing tensor (`addmm`), s is applied to the thin result between A and B, and the gradients are

    h = s A x                     y = W x + b + B h
    dh = s B^T dy                 dx = W^T dy + A^T dh     dA = dh x^T     dB = dy h^T

so that of the ten passes over a layer's inputs and outputs besides its own products (seven and three), four are left.
For a layer of width 2,560 on an H100 the products of a million outputs take 15 us (4 x 2,560 operations each, at .69 of
the peak) and a pass .75 us: ten of them are a third of the whole.

This replaces plain layers with frozen weights and one adapter; DoRA, quantized layers, merged or disabled adapters stay
as PEFT has them. LoRA's own dropout comes before, as it does there.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn


class _Sum(torch.autograd.Function):
    """W x + b + s B A z, where z is x, or x after dropout."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, z: Tensor | None, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        """x, z: [..., d] or None for x; weight [o, d]; a [r, d]; b [o, r], all of one type.  Returns [..., o]."""
        x_nd = x.flatten(0, -2)
        z_nd = x_nd if z is None else z.flatten(0, -2)
        h_nr = (z_nd @ a.T).mul_(scale)
        y_no = nn.functional.linear(x_nd, weight, bias).addmm_(h_nr, b.T)
        ctx.save_for_backward(z_nd, h_nr, weight, a, b)
        ctx.scale, ctx.shape, ctx.own = scale, x.shape, z is None
        return y_no.view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients of x, z, a and b; weight and bias are frozen."""
        z_nd, h_nr, weight, a, b = ctx.saved_tensors
        dy_no = dy.flatten(0, -2)
        dh_nr = (dy_no @ b).mul_(ctx.scale)
        dx = dz = None
        if ctx.needs_input_grad[0]:
            dx = dy_no @ weight
            dx = (dx.addmm_(dh_nr, a) if ctx.own else dx).view(ctx.shape)
        if ctx.needs_input_grad[1]:
            dz = (dh_nr @ a).view(ctx.shape)
        return dx, dz, None, None, dh_nr.T @ z_nd, dy_no.T @ h_nr, None


class LoraLinear(Linear):  # type: ignore[misc]
    """PEFT's layer with its forward pass as one function."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map [..., d] to [..., o]."""
        base, names = self.base_layer, list(self.active_adapters)
        plain = not (args or kwargs or self.disable_adapters or self.merged or self.lora_variant)
        if not plain or len(names) != 1 or base.weight.requires_grad or not torch.is_floating_point(base.weight):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        device = x.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(kind)
        name, bias = names[0], base.bias
        dropout = self.lora_dropout[name]
        z = dropout(x) if isinstance(dropout, nn.Dropout) and dropout.p and dropout.training else None
        a, b = self.lora_A[name].weight.to(kind), self.lora_B[name].weight.to(kind)
        bias = None if bias is None else bias.to(kind)
        out: Tensor = _Sum.apply(x, z, base.weight.to(kind), bias, a, b, self.scaling[name])
        return out


def fuse_lora(model: Any) -> None:
    """Make each LoRA layer of a prepared model one function each way."""
    for module in model.modules():
        if type(module) is Linear and type(module.base_layer) is nn.Linear:
            module.__class__ = LoraLinear
