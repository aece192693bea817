"""S²: one tower looks at an image at several scales, and the features of all scales are joined along the channels.

For k = 1 ... K: the image is resized to k times the tower's size, cut into k x k tiles, and the tower sees each tile.
The k x k grids of features are put together in the layout of the tiles, [k side, k side, width], and averaged over
k x k neighbours, so that each scale gives [side, side, width]. Joined over scales: [side^2, K width].

Three scales of SigLIP-SO400M-384 give 729 places of 3 x 1,152 channels from an image of 1,152 px.
Cost: sum(k^2) runs of the tower per image, 14 for K = 3; the tower sees at most `TILES` tiles at once, so that its
memory does not grow with the number of images. With one scale this class only drops the first tokens of the tower,
class and registers, which the llava class cannot do.
Source: S² (arXiv 2403.13043), as Bunny v1.1 uses it (bicubic without antialiasing, area averaging, both in fp32).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from train.model.layer import features

TILES = 64  # as many as the images of a pass at one scale (micro_images)


class MultiscaleConfig(PreTrainedConfig):  # type: ignore[misc]
    """The configuration of the inner tower and how it is used; sizes and width are those of the whole image.

    feature_index: how many of the tower's blocks run; tokens_skipped: how many of its first tokens are not patches.
    """

    model_type = "multiscale_vision_model"
    base_config_key = "vision_config"
    sub_configs = {"tower_config": AutoConfig}

    tower_config: Any = None
    scales: int = 3
    feature_index: int = 0
    tokens_skipped: int = 0
    hidden_size: int = 0
    image_size: int = 0
    patch_size: int = 0
    num_hidden_layers: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        if isinstance(self.tower_config, dict):
            self.tower_config = AutoConfig.for_model(**self.tower_config)
        if self.tower_config is not None:
            tower = self.tower_config
            self.hidden_size = self.scales * tower.hidden_size
            self.image_size = self.scales * tower.image_size
            self.patch_size = self.scales * tower.patch_size  # pixels per place, in the image at its largest scale
            self.num_hidden_layers = tower.num_hidden_layers
        super().__post_init__(**kwargs)

    @property
    def num_tiles(self) -> int:
        """How many times the tower runs per image."""
        return sum(scale**2 for scale in range(1, self.scales + 1))


class MultiscaleModel(PreTrainedModel):  # type: ignore[misc]
    """The inner tower, with the interface of transformers' vision models; only one hidden state is computed."""

    config_class = MultiscaleConfig
    main_input_name = "pixel_values"
    _supports_sdpa = True

    def __init__(self, config: MultiscaleConfig) -> None:
        super().__init__(config)
        self.tower = AutoModel.from_config(config.tower_config)
        self.post_init()

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return the features [n, places, scales x width] of normalised images [n, 3, K size, K size].

        They are hidden_states[feature_index], as in the tower itself; the other hidden states are None.
        """
        index, layers, scales = self.config.feature_index, self.config.num_hidden_layers, self.config.scales
        if scales == 1:  # for any image size that the tower takes
            merged = features(self.tower, pixel_values, index, "full")[:, self.config.tokens_skipped :]
        else:
            several = [self._at_scale(pixel_values, scale) for scale in range(1, scales + 1)]
            merged = torch.cat(several, 1).flatten(2).transpose(1, 2)
        return BaseModelOutput(
            last_hidden_state=merged,
            hidden_states=tuple(merged if i == index else None for i in range(layers + 1)),
        )

    def _at_scale(self, pixels_nchw: Tensor, scale: int) -> Tensor:
        tower_size, dtype = self.config.tower_config.image_size, pixels_nchw.dtype
        image = functional.interpolate(pixels_nchw.float(), size=scale * tower_size, mode="bicubic").to(dtype)
        n, channels = image.shape[:2]
        # Tile (i, j) of image n is row n k^2 + i k + j.
        tiles = image.view(n, channels, scale, tower_size, scale, tower_size).permute(0, 2, 4, 1, 3, 5).flatten(0, 2)
        index, skipped = self.config.feature_index, self.config.tokens_skipped
        hidden = torch.cat([features(self.tower, part, index, "full") for part in torch.split(tiles, TILES)])
        hidden = hidden[:, skipped:]
        side = round(hidden.shape[1] ** 0.5)
        tiled = hidden.reshape(n, scale, scale, side, side, -1)
        whole = tiled.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, scale * side, scale * side)
        return functional.interpolate(whole.float(), size=side, mode="area").to(hidden.dtype)
