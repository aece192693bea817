"""One model over several processes (FSDP2): each holds a part of every weight, gradient and moment.

For full tuning of 7 to 8B models, whose fp32 masters and moments (16 bytes a parameter) no single GPU holds. Each block
of the language model is gathered when it runs; the rest (embedding, head, projector) is gathered for a whole pass. A
frozen tower stays whole in every process. All processes must run as many passes, and every weight must have a gradient
in each: hence `blank` batches and `untouched` weights.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from train.config import Stage
from train.data.batches import Batch
from train.dist import Place
from train.model.compose import Composed

Result = TypeVar("Result")


def is_sharded(composed: Composed) -> bool:
    """Say whether `shard` has cut this model."""
    return hasattr(composed.model, "inside")


def shard(composed: Composed, stage: Stage, place: Place) -> dict[str, nn.Parameter]:
    """Cut a prepared model among the processes and return what learns by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model = composed.model
    half = place.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mesh": init_device_mesh(place.device.type, (place.world,)), "mp_policy": policy}
    for layer in model.model.language_model.layers:
        fully_shard(layer, **options)
    whole = set() if stage.tune_tower else set(model.model.vision_tower.parameters())
    fully_shard(model, ignored_params=whole, **options)
    model.inside = types.MethodType(lambda _model, function, *given: function(*given), model)
    register_fsdp_forward_method(model, "inside")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def inside(composed: Composed, function: Callable[..., Result], *given: Any) -> Result:
    """Call a function; where the model is sharded, with the weights outside of its blocks gathered."""
    result: Result = composed.model.inside(function, *given) if is_sharded(composed) else function(*given)
    return result


def blank(device: torch.device) -> Batch:
    """Make a batch of one position that counts for nothing, for a process without work in a round."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return Batch(zero[None], zero[None], zero, zero, zero, None, [], [1])


def untouched(composed: Composed, batch: Batch) -> Tensor | float:
    """Return a zero that gives a gradient, of zero, to the weights that a batch without images leaves out."""
    if batch.images:
        return 0.0
    inner = composed.model.model
    parameters = [*inner.multi_modal_projector.parameters(), *inner.vision_tower.parameters()]
    return 0.0 * sum((p.sum() for p in parameters if p.requires_grad), start=torch.zeros(()))
