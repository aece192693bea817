"""Recurrent layers in packed rows: each document starts from an empty state.

Hybrid language models (LFM2, Falcon-H1, Qwen3.5) mix attention with layers that carry a state along the row: a causal
convolution over the last few positions, a gated recurrence, a state space. Such a layer uses no mask: in a packed row
it would carry one document's state into the next. Here it runs once for each document, and its outputs are joined
again: out = [f(x_1), ..., f(x_n)] for a row [x_1, ..., x_n], exact on every device, with n calls per layer.

Such a layer is recognised by its convolution (`nn.Conv1d`): all recurrent layers of transformers have one. The
documents come as a keyword argument, which decoders pass on to their layers, so that a recomputing backward pass has
them, too. A family that does not pass it on fails the comparison in verify.py and is trained without packing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from train.model.attention import Documents


def isolate_documents(language_model: Any) -> None:
    """Make the recurrent layers of a language model, if it has any, run one document at a time in packed rows."""
    found = [m for m in language_model.modules() if any(isinstance(child, nn.Conv1d) for child in m.children())]
    for module in found:
        module.forward = partial(_each_alone, module, module.forward)
    language_model.has_recurrent_layers = bool(found)


def for_recurrent(language_model: Any, documents: Documents | None) -> dict[str, Documents]:
    """Return the further arguments that tell a language model's recurrent layers the documents of a packed row."""
    needed = documents is not None and getattr(language_model, "has_recurrent_layers", False)
    return {"documents": documents} if needed and documents is not None else {}


def _each_alone(
    layer: nn.Module,
    run: Callable[..., Tensor],
    *args: Any,
    documents: Documents | None = None,
    **options: Any,
) -> Tensor:
    """Call `run`, the forward pass of a layer, on each document of hidden states [1, l, d], given first or by name.

    The layer itself, but not its submodules, is put into eval mode: in training mode, Mamba's layers give the weight of
    their last projection to a fused kernel, if that is installed, which would ignore a LoRA on that projection.
    """
    training, layer.training = layer.training, False
    try:
        return _run(run, args, documents, options)
    finally:
        layer.training = training


def _run(
    run: Callable[..., Tensor], args: tuple[Any, ...], documents: Documents | None, options: dict[str, Any]
) -> Tensor:
    if documents is None:
        return run(*args, **options)
    hidden_bld, rest = (args[0], args[1:]) if args else (options.pop("hidden_states"), ())
    lengths = [b - a for a, b in pairwise(documents.edges)]
    return torch.cat([run(part, *rest, **options) for part in hidden_bld.split(lengths, dim=1)], dim=1)
