"""torch.compile of one layer at a time (`model.compile = "layers"`): of the language model, and the tower's blocks.

Layers of one kind share their compiled code, so that each kind is compiled once, for any number of layers, tokens and
images. Compiling fuses the small kernels of a layer (norms, activations, rotations, sums, LoRA's scaling) into a few
that read and write each number once; matrix products stay as they are.

A layer is compiled as two pieces around its attention, which stays outside: `attend` reads the lengths of the documents
on the host, and they differ in every row. Hooks on a layer itself stay outside, too. torch.compile does follow those
within the last layer, whose modules skip_unlabelled.py narrows, so that this layer is a kind of its own. Results change
by rounding; LoRA's dropout draws other masks from the same seeds.
"""

from __future__ import annotations

from typing import Any

import torch

from train.errors import UsageError
from train.model import attention
from train.model.compose import Composed
from train.model.tower import blocks_of

BACKEND = "inductor"


def compile_layers(composed: Composed, device: torch.device) -> int:
    """Compile the layers of a prepared model when they first run; return how many there are.

    Raises: UsageError if the device has no compiler, or if the language model cannot be compiled for arbitrary rows.
    """
    language_model = composed.model.model.language_model
    kind = composed.model.config.text_config.model_type
    if getattr(language_model, "has_recurrent_layers", False):
        raise UsageError(f'model.compile = "layers": {kind} has recurrent layers, which run a document at a time')
    _try_compiler(device)
    from transformers import AttentionInterface

    outside = torch.compiler.disable(attention.attend)  # type: ignore[no-untyped-call]
    AttentionInterface.register(attention.NAME, outside)
    layers = [*language_model.layers, *blocks_of(composed.model.model.vision_tower)]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, backend=BACKEND)
    return len(layers)


def _try_compiler(device: torch.device) -> None:
    def probe(x: Any) -> Any:
        return x.sin() + x

    try:
        torch.compile(probe, backend=BACKEND)(torch.ones(3, device=device))
    except Exception as error:  # of many types: torch's, its compilers' and the system's
        why = " ".join(str(error).split("\n")[:2]).strip()
        needed = "triton" if device.type == "cuda" else "a C++ compiler (g++)"
        raise UsageError(
            f'model.compile = "layers" needs {needed}, and torch cannot compile with it here ({why}); install it, or '
            'type --set model.compile=""'
        ) from None
