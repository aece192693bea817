"""QLoRA (arXiv:2305.14314): the frozen language model's linear layers in 4 bits, NormalFloat with quantised constants.

The adapter, the projector and the head are not quantised, and the export merges the adapter into the original weights:
what this saves is memory in training, about 1.5 bytes per parameter. The package bitsandbytes does the arithmetic, on a
GPU or (slowly) on the CPU; it packs each layer when the model moves to its device.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from train.errors import UsageError

WHOLE = ("fp8", "mxfp4")  # forms of published weights that transformers can dequantise


def whole_weights(config: Any, source: str) -> None:
    """Have a published model's quantised weights dequantised as they are read.

    Otherwise a GPU would get layers that no adapter can be merged into. transformers can dequantise two forms.
    Raises: UsageError for any other.
    """
    found = getattr(config, "quantization_config", None)
    if not found:
        return
    values = dict(found if isinstance(found, dict) else found.to_dict())
    if values.get("quant_method") not in WHOLE:
        raise UsageError(
            f"model.lm {source!r} is quantised ({values.get('quant_method')}), but trained weights are merged into "
            "whole ones: name the model that it was made from, which finetune.quantize = 'nf4' keeps in 4 bits"
        )
    config.quantization_config = {**values, "dequantize": True}


def quantize(model: Any) -> None:
    """Replace each linear layer of the language model.  Raises: UsageError if bitsandbytes is not installed."""
    try:
        import bitsandbytes as bnb
    except ImportError:
        raise UsageError("quantize = 'nf4' needs bitsandbytes; type: pip install 'data-curate[qlora]'") from None
    body = model.model.language_model
    for name, layer in list(body.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        small = bnb.nn.Linear4bit(
            *(layer.in_features, layer.out_features, layer.bias is not None),
            compute_dtype=layer.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=small)
        small.bias = layer.bias
        parent, _, leaf = name.rpartition(".")
        setattr(body.get_submodule(parent), leaf, small)
    model.is_loaded_in_4bit = True  # tells PEFT how to adapt the layers
