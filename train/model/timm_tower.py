"""A network of timm as a tower: an image becomes a grid of places, each a token, whatever kind of network it is.

Vision transformers, convolutional networks and mixed ones all have `forward_intermediates`: maps [n, c, side, side],
one per block or stage, without class and register tokens. `model.feature_layer` picks one, read row by row as
[n, side^2, c]; `model.grid` averages it to fewer places first. After the last stage some networks have one more
convolution before pooling (EfficientNet, MobileCLIP): then `feature_layer = -1` reads its output. What comes after the
map is not built.

Cost: that of the network; one map is kept. Weights have timm's own names, prefixed with `trunk.`.
Source of the interface: timm (pytorch-image-models), `forward_intermediates` and `prune_intermediate_layers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput


class TimmVisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Which network of timm, with which arguments, and which of its maps is read; sizes in pixels.

    feature_index: the map that is read, from 1; whole: with the convolution after the last stage.
    places: per side, to average the map to; 0: keep its own.
    flops: multiplications and additions for one image, each counted.
    """

    model_type = "timm_vision_model"
    base_config_key = "vision_config"

    architecture: str = ""
    model_args: dict[str, Any] | None = None
    feature_index: int = 0
    whole: bool = False
    places: int = 0
    hidden_size: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_hidden_layers: int = 0
    flops: int = 0
    initializer_range: float = 0.02


class TimmVisionModel(PreTrainedModel):  # type: ignore[misc]
    """The network, with the interface of transformers' vision models; all hidden states but one are None."""

    config_class = TimmVisionConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: TimmVisionConfig) -> None:
        super().__init__(config)
        self.trunk = cut(create(config.architecture, config.model_args or {}), config.feature_index, config.whole)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        # Buffers that no file holds; a network built on the meta device has none of their values.
        fill: Any = getattr(module, "init_non_persistent_buffers", None)
        if fill is not None:
            fill()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return the map [n, places, channels] of normalised images [n, 3, size, size], as one of the hidden states.

        The other hidden states, one for each other map, are None.
        """
        index = self.config.feature_index
        # Convolutional networks run a quarter faster with channels last.
        pixels = pixel_values.contiguous(memory_format=torch.channels_last)
        seen = grid(self.trunk, pixels, index, self.config.whole)
        if self.config.places:
            seen = nn.functional.adaptive_avg_pool2d(seen, self.config.places)
        tokens = seen.flatten(2).transpose(1, 2)
        states = tuple(tokens if i == index else None for i in range(self.config.num_hidden_layers + 1))
        return BaseModelOutput(last_hidden_state=tokens, hidden_states=states)


def create(architecture: str, arguments: dict[str, Any]) -> Any:
    """Build a network of timm with drawn weights.  Raises: whatever timm raises for an unknown name or argument."""
    import timm

    return timm.create_model(architecture, **arguments).eval()


def cut(trunk: Any, index: int, whole: bool) -> Any:
    """Drop from a network what is not needed for its map `index`; return it."""
    if whole:
        trunk.reset_classifier(0)
    else:
        trunk.prune_intermediate_layers([index - 1], prune_norm=True, prune_head=True)
    return trunk


def grid(trunk: Any, pixels_nchw: Tensor, index: int, whole: bool) -> Tensor:
    """Return the map `index` of images as [n, c, side, side]."""
    if whole:
        out: Tensor = trunk.forward_features(pixels_nchw)
        return out.permute(0, 3, 1, 2) if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else out
    maps = trunk.forward_intermediates(pixels_nchw, indices=[index - 1], intermediates_only=True)
    only: Tensor = maps[-1]
    return only
