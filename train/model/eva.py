"""EVA02-CLIP's image tower, which transformers lacks: a vision transformer with the interface of its CLIP tower.

An image [n, 3, s, s] becomes (s / patch)^2 patches and a class token in front, [n, 1 + patches, width], which pass
through blocks of attention and MLP. What differs from CLIP's tower:

    attention   queries and keys are rotated by the patch's row and column (2-D rotary embedding); keys have no bias
    MLP         gated: fc2(norm(silu(gate x) * fc1 x))
    norms       one more before the last linear layer of attention and of the MLP

`hidden_states[i]` is the output of block i, before the last norm. Cost: as a ViT of the same size; angles are computed
again for each batch. Weights may have any of three sets of names: open_clip's and timm's
(`visual.trunk.blocks.0.mlp.fc1_g...`), the authors' (`visual.blocks.0.mlp.w1...`, EVA02_CLIP_L_336_psz14_s6B.pt), and
this class's own.
Sources: EVA-02 (arXiv 2303.11331), EVA-CLIP (arXiv 2303.15389); tested against timm's `eva02_large_patch14_clip_336`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

TIMM_NAME = "eva02_large_patch14_clip_336"
HEAD_WIDTH = 64
PREFIXES = ("visual.trunk.", "visual.", "module.visual.")
RULES = (
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm([12])\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.([qkv])_(?:proj\.)?(weight|bias)$", r"encoder.layers.\1.self_attn.\2_proj.\3"),
    (r"^blocks\.(\d+)\.attn\.(?:norm|inner_attn_ln)\.", r"encoder.layers.\1.self_attn.norm."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.out_proj."),
    (r"^blocks\.(\d+)\.mlp\.(?:fc1_g|w1)\.", r"encoder.layers.\1.mlp.gate."),
    (r"^blocks\.(\d+)\.mlp\.(?:fc1_x|w2)\.", r"encoder.layers.\1.mlp.fc1."),
    (r"^blocks\.(\d+)\.mlp\.(?:norm|ffn_ln)\.", r"encoder.layers.\1.mlp.norm."),
    (r"^blocks\.(\d+)\.mlp\.(?:fc2|w3)\.", r"encoder.layers.\1.mlp.fc2."),
)
UNUSED = re.compile(r"^head\.|(^|\.)rope\.")  # CLIP's projection, and angles that are computed


class EvaVisionConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes of the tower; the defaults are EVA02-CLIP-L-336."""

    model_type = "eva02_clip_vision_model"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 2730
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    trained_grid: int = 16  # patches per side in pretraining: angles span this many, however many there are
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02


class _Embeddings(nn.Module):
    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = nn.Conv2d(3, width, patch, patch)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.position_embedding = nn.Parameter(torch.zeros(1, (config.image_size // patch) ** 2 + 1, width))

    def forward(self, pixels_nchw: Tensor) -> Tensor:
        patches = self.patch_embedding(pixels_nchw).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(patches), -1, -1), patches], 1) + self.position_embedding


class _Attention(nn.Module):
    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x_nld: Tensor, angles_ld: Tensor) -> Tensor:
        shape = (*x_nld.shape[:2], self.heads, -1)
        q, k, v = (layer(x_nld).view(shape).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        mixed = functional.scaled_dot_product_attention(_rotate(q, angles_ld), _rotate(k, angles_ld), v)
        out: Tensor = self.out_proj(self.norm(mixed.transpose(1, 2).flatten(2)))
        return out


class _Mlp(nn.Module):
    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate, self.fc1 = nn.Linear(width, inner), nn.Linear(width, inner)
        self.norm = nn.LayerNorm(inner, config.layer_norm_eps)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x_nld: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(functional.silu(self.gate(x_nld)) * self.fc1(x_nld)))
        return out


class _Block(nn.Module):
    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = _Attention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = _Mlp(config)

    def forward(self, x_nld: Tensor, angles_ld: Tensor) -> Tensor:
        x_nld = x_nld + self.self_attn(self.layer_norm1(x_nld), angles_ld)
        out: Tensor = x_nld + self.mlp(self.layer_norm2(x_nld))
        return out


class EvaVisionModel(PreTrainedModel):  # type: ignore[misc]
    """The tower, with the interface of transformers' vision models."""

    config_class = EvaVisionConfig
    main_input_name = "pixel_values"
    _no_split_modules = ["_Block"]
    _supports_sdpa = True

    def __init__(self, config: EvaVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = _Embeddings(config)
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.ModuleList(_Block(config) for _ in range(config.num_hidden_layers))
        self.post_layernorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, _Embeddings):
            for parameter in (module.class_embedding, module.position_embedding):
                nn.init.normal_(parameter, std=self.config.initializer_range)

    def forward(self, pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        """Return all hidden states [n, 1 + patches, width], the class token first, and the last one normed."""
        hidden = self.embeddings(pixel_values)
        angles_ld = patch_angles(self.config, pixel_values.device)
        states = [hidden]
        for block in self.encoder.layers:
            states.append(block(states[-1], angles_ld))
        return BaseModelOutput(last_hidden_state=self.post_layernorm(states[-1]), hidden_states=tuple(states))


def patch_angles(config: EvaVisionConfig, device: torch.device) -> Tensor:
    """Return the rotation angles of each patch, f32 [patches, head width / 2]: by its row first, then by its column.

    Computed for each batch (a few thousand numbers), so that no buffer can be lost or cast.
    """
    side = config.image_size // config.patch_size
    bands = config.hidden_size // config.num_attention_heads // 4
    frequencies = 10_000 ** -(torch.arange(bands, device=device, dtype=torch.float32) / bands)
    places = torch.arange(side, device=device, dtype=torch.float32) / side * config.trained_grid
    line = places[:, None] * frequencies
    rows = line[:, None].expand(side, side, bands)
    return torch.cat([rows, rows.transpose(0, 1)], -1).flatten(0, 1)


def _rotate(x_nhld: Tensor, angles_ld: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels, except in the class token; in fp32, as bf16 angles are too coarse."""
    first, pairs = x_nhld[:, :, :1], x_nhld[:, :, 1:].float()
    cos, sin = angles_ld.cos(), angles_ld.sin()
    even, odd = pairs[..., ::2], pairs[..., 1::2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)
    return torch.cat([first, turned.to(x_nhld.dtype)], 2)


def our_name(theirs: str) -> str | None:
    """Translate a name below the tower's prefix; "" for what is not needed, None for what no rule knows."""
    if UNUSED.search(theirs):
        return ""
    for pattern, ours in RULES:
        name, found = re.subn(pattern, ours, theirs)
        if found:
            return name
    return None


def from_tensors(tensors: Iterable[tuple[str, Tensor]]) -> EvaVisionModel:
    """Build the tower whose sizes and weights a checkpoint gives; heads are 64 wide.

    Raises: ValueError naming what is missing or unknown.
    """
    state: dict[str, Tensor] = {}
    for theirs, tensor in tensors:
        prefix = next((p for p in PREFIXES if theirs.startswith(p)), "")
        name = our_name(theirs.removeprefix(prefix))
        if name is None and (prefix or theirs.startswith("blocks.")):
            raise ValueError(f"{theirs} is no tensor of {TIMM_NAME}")
        if name:
            state[name] = tensor.float()
    if "embeddings.position_embedding" not in state or "encoder.layers.0.mlp.gate.weight" not in state:
        raise ValueError(f"the checkpoint holds no {TIMM_NAME}")
    inner, width = state["encoder.layers.0.mlp.gate.weight"].shape
    patch = state["embeddings.patch_embedding.weight"].shape[-1]
    config = EvaVisionConfig(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layers.")),
        num_attention_heads=max(1, width // HEAD_WIDTH),
        image_size=round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5) * patch,
        patch_size=patch,
    )
    model = EvaVisionModel(config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise ValueError(f"tensors are missing or unknown: {', '.join([*missing, *unexpected][:3])}")
    return model
