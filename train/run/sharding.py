"""One model sharded over several ranks (FSDP2): each holds 1/world of every weight, gradient and moment.

Full tuning keeps 16 bytes per parameter (fp32 weight, gradient, two moments): 128 GB for 8B, which few GPUs can hold.
Each layer of the language model is its own FSDP unit, gathered only while it runs; embedding, head and projector form
the root unit, gathered for a whole pass. A frozen tower is not sharded. A pass gathers each weight twice (forward and
backward) and reduce-scatters each gradient once.

The first rank composes the model; the others get its structure with parameters on the meta device, which take no
memory, and `shard` then gives them their part of each weight, one weight at a time. So only one rank ever holds the
whole model.

Invariant: gathers and reductions are collectives, so in every round of micro-batches each rank runs one pass, in which
every trained weight gets a gradient. A rank without samples runs `placeholder_batch`. A batch without images adds
`zero_for_unused` to its embedded words, so that there, too, the backward pass to the projector goes through every layer
and gathers its weights, even frozen ones.  Source: torch.distributed.fsdp.fully_shard (PyTorch's FSDP2).
"""

from __future__ import annotations

import copy
import dataclasses
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from train.config import Stage
from train.data.batches import Batch
from train.dist import Runtime
from train.model import attention
from train.model.compose import Composed

Result = TypeVar("Result")


def is_sharded(composed: Composed) -> bool:
    """Return whether `shard` has sharded this model."""
    return hasattr(composed.model, "run_gathered")


def compose_once(runtime: Runtime, compose: Callable[[], Composed]) -> Composed:
    """Compose in the first rank; return it there, and in the others the same with parameters on the meta device."""
    here: list[Composed] = []

    def skeleton() -> Composed:
        here.append(compose())
        weights = here[0].model.parameters()
        # deepcopy takes objects in its memo as already copied, so that no weight is copied.
        memo: dict[int, Any] = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in weights
        }
        return copy.deepcopy(here[0], memo)

    composed: Composed = runtime.first(skeleton)
    if here:
        return here[0]
    _note(composed.model)
    return composed


def _note(model: nn.Module) -> None:
    """Register with transformers, in a process that built no model, what this one needs.

    That is our attention, and which outputs its classes record, such as hidden states, which building a model sets up.
    """
    attention.register()
    from transformers import PreTrainedModel
    from transformers.utils import output_capturing

    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            output_capturing._CAN_RECORD_REGISTRY[module] = module._can_record_outputs


def shard(composed: Composed, stage: Stage, runtime: Runtime) -> dict[str, nn.Parameter]:
    """Shard a prepared model over the ranks; return the trained parameters, now DTensors, by name."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model = composed.model
    full = {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
    half = runtime.dtype == torch.bfloat16
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mesh": init_device_mesh(runtime.device.type, (runtime.world,)), "mp_policy": policy}
    for layer in model.model.language_model.layers:
        fully_shard(layer, **options)
    uncut = set() if stage.tune_tower else set(model.model.vision_tower.parameters())
    # Arguments of `run_gathered` are not cast: in bf16, token weights would keep only 8 bits.
    policy = dataclasses.replace(policy, cast_forward_inputs=False)
    fully_shard(model, ignored_params=uncut, **{**options, "mp_policy": policy})
    _hand_out(model, full, runtime)
    model.run_gathered = types.MethodType(lambda _model, function, *given: function(*given), model)
    register_fsdp_forward_method(model, "run_gathered")
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _hand_out(model: nn.Module, full: dict[str, Tensor], runtime: Runtime) -> None:
    """Give every rank its part of each weight; `full`: the first rank's whole weights, on the CPU. A collective."""
    device = runtime.device
    model._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))  # type: ignore[no-untyped-call]
    for name, parameter in model.named_parameters():
        if runtime.rank == 0:
            weight = full.pop(name).to(device)
        else:
            weight = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        with torch.no_grad():
            if isinstance(parameter, DTensor):
                part = distribute_tensor(weight, parameter.device_mesh, parameter.placements)
                parameter.to_local().copy_(part.to_local())
            else:
                dist.broadcast(weight, src=0)
                parameter.copy_(weight)


def run_gathered(composed: Composed, function: Callable[..., Result], *given: Any) -> Result:
    """Call a function; if the model is sharded, the root unit's weights are gathered meanwhile."""
    result: Result = composed.model.run_gathered(function, *given) if is_sharded(composed) else function(*given)
    return result


def placeholder_batch(device: torch.device) -> Batch:
    """Make a batch of one position whose loss gets weight 0, for a rank without samples in a round."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    return Batch(zero[None], zero[None], zero, zero, zero, None, [], [1])


def zero_for_unused(composed: Composed, batch: Batch) -> Tensor | float:
    """Return 0 computed from projector and tower, so that a batch without images gives them a gradient of 0."""
    if batch.images:
        return 0.0
    inner = composed.model.model
    parameters = [*inner.multi_modal_projector.parameters(), *inner.vision_tower.parameters()]
    return 0.0 * sum((p.sum() for p in parameters if p.requires_grad), start=torch.zeros(()))
