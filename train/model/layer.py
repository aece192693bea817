"""Which layer of a tower is read, and its output."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from train.errors import UsageError


def feature_layer_index(layer: int, num_layers: int) -> int:
    """Return how many blocks run before `hidden_states[layer]`, at least one: the llava class takes 0 for "none".

    Raises: UsageError when there is no such layer.
    """
    index = layer if layer >= 0 else num_layers + 1 + layer
    if not 1 <= index <= num_layers:
        raise UsageError(
            f"model.feature_layer = {layer}: the tower has hidden states 1 to {num_layers}, or -{num_layers} to -1"
        )
    return index


def features(tower: Any, pixels_nchw: Tensor, index: int, strategy: str) -> Tensor:
    """Return [n, tokens, width]: the hidden states after `index` blocks, without the class token if "default"."""
    # Only that state is kept, not those of all blocks.
    states = tower(pixels_nchw, output_hidden_states=index or True, return_dict=True).hidden_states
    hidden = cast(Tensor, states[index])
    return hidden[:, 1:] if strategy == "default" else hidden
