"""Plain vision transformers under other names, converted to the transformers class that computes the same.

    open_clip's ViT                                      CLIPVisionModel
    timm's, with a class token and a norm before all     CLIPVisionModel
    timm's, without a class token                        SiglipVisionModel
    timm's, with a class token                           Dinov2Model, with a layer scale of 1 if timm's has none
    SigLIP 2 NaFlex, on its own square grid              SiglipVisionModel

Then an export needs no code of ours. Networks with register tokens, rotary positions, gates or other norms have no such
class and stay as they are. The pooling head is left out, as no feature layer comes after it. Cost: the weights once;
for timm's, also one image through both networks, whose features must agree.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from train.errors import UsageError
from train.folder import read_json
from train.model.published import loading

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC, BILINEAR = 3, 2  # PIL.Image.Resampling
OPENCLIP_PREFIX = "local-dir:"
ACTIVATIONS = {"GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh", "QuickGELU": "quick_gelu"}
HEADLESS, BEHIND = ("head.", "fc_norm.", "attn_pool."), ("post_layernorm.", "layernorm.")  # theirs, ours
NAMES = {  # ours for the four linear layers and the two norms of a block
    "siglip_vision_model": "encoder.layers.{}. layer_norm1 layer_norm2 self_attn.{}_proj self_attn.out_proj mlp.fc1 "
    "mlp.fc2",
    "dinov2": "encoder.layer.{}. norm1 norm2 attention.{}_proj attention.o_proj mlp.fc1 mlp.fc2",
}
NAMES["clip_vision_model"] = NAMES["siglip_vision_model"]


def native_config(trunk: Any, image_size: int) -> Any:
    """Return the configuration of the class that computes what a network of timm does, or None if there is none."""
    from timm.models.vision_transformer import VisionTransformer
    from transformers import CLIPVisionConfig, Dinov2Config, SiglipVisionConfig

    if type(trunk) is not VisionTransformer or not all(map(_is_plain, trunk.blocks)):
        return None
    block, classed = trunk.blocks[0], trunk.cls_token is not None
    early, scaled = isinstance(trunk.norm_pre, nn.LayerNorm), not isinstance(block.ls1, nn.Identity)
    patch = trunk.patch_embed.proj
    first = trunk.num_prefix_tokens == int(classed) and not (classed and trunk.no_embed_class)
    places = (image_size // patch.kernel_size[0]) ** 2 + int(classed)
    if not first or trunk.pos_embed is None or trunk.pos_embed.shape[1] != places:
        return None
    sizes: dict[str, Any] = {
        "hidden_size": trunk.embed_dim,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": image_size,
        "patch_size": patch.kernel_size[0],
        "hidden_act": ACTIVATIONS[type(block.mlp.act).__name__],
        "layer_norm_eps": block.norm1.eps,
    }
    inner = block.mlp.fc1.out_features
    if early and classed and not scaled and patch.bias is None:
        return CLIPVisionConfig(**sizes, intermediate_size=inner)
    if early or patch.bias is None:
        return None
    if not classed and not scaled:
        return SiglipVisionConfig(**sizes, intermediate_size=inner, vision_use_head=False)
    if classed and inner % trunk.embed_dim == 0:
        return Dinov2Config(**sizes, mlp_ratio=inner // trunk.embed_dim, use_mask_token=False)
    return None


def _is_plain(block: Any) -> bool:
    """Whether a block is attention and a two-layer MLP, each after a layer norm, and nothing else."""
    from timm.layers import Mlp
    from timm.models.vision_transformer import Block

    if type(block) is not Block or type(block.mlp) is not Mlp or type(block.mlp.act).__name__ not in ACTIVATIONS:
        return False
    attention, mlp = block.attn, block.mlp
    nothing = [attention.q_norm, attention.k_norm, attention.norm, mlp.norm]
    biased = [attention.qkv, attention.proj, mlp.fc1, mlp.fc2]
    return (
        isinstance(block.norm1, nn.LayerNorm)
        and getattr(attention, "gate", None) is None
        and attention.attn_dim == block.norm1.normalized_shape[0]
        and all(isinstance(part, nn.Identity) for part in nothing)
        and all(isinstance(part, nn.Linear) and part.bias is not None for part in biased)
    )


def convert(trunk: Any, config: Any, source: str) -> Any:
    """Convert a network of timm to the class of `native_config`.  Raises: UsageError if their features differ."""
    from transformers import AutoModel

    tower = AutoModel.from_config(config, dtype=torch.float32).eval()
    state = {name: tensor for name, tensor in trunk.state_dict().items() if not name.startswith(HEADLESS)}
    missing, unexpected = tower.load_state_dict(_timm_names(state, config), strict=False)
    assert not unexpected and all(name.startswith(BEHIND) for name in missing), (missing, unexpected)
    side = config.image_size
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = tower(pixels, output_hidden_states=True).hidden_states[-1]
        theirs = trunk.forward_intermediates(pixels, indices=[len(trunk.blocks) - 1], intermediates_only=True)[-1]
    theirs = theirs.flatten(2).transpose(1, 2)
    apart = float((ours[:, -theirs.shape[1] :] - theirs).abs().max() / theirs.abs().max())
    if not apart < 1e-4:
        kind = type(tower).__name__
        raise UsageError(f"model.tower {source!r}: as a {kind}, its features differ by {apart:.2g} of their size")
    return tower


def _timm_names(state: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    kind, out = config.model_type, {}
    where = {
        "clip_vision_model": ("patch_embedding", "position_embedding.weight", "pre_layrnorm", "post_layernorm"),
        "siglip_vision_model": ("patch_embedding", "position_embedding.weight", "", "post_layernorm"),
        "dinov2": ("patch_embeddings.projection", "position_embeddings", "", "layernorm"),
    }
    patch, position, before, behind = where[kind]
    width = config.hidden_size
    places = state["pos_embed"]
    out[f"embeddings.{position}"] = places if kind == "dinov2" else places[0]
    if kind == "clip_vision_model":
        out["embeddings.class_embedding"] = state["cls_token"].reshape(width)
    if kind == "dinov2":
        out["embeddings.cls_token"] = state["cls_token"]
    pairs = [(f"embeddings.{patch}", "patch_embed.proj"), (behind, "norm"), (before, "norm_pre")]
    for i in range(config.num_hidden_layers):
        prefix, norm1, norm2, mixes, leaves, fc1, fc2 = NAMES[kind].split()
        ours, theirs = prefix.format(i), f"blocks.{i}."
        pairs += [(ours + norm1, theirs + "norm1"), (ours + norm2, theirs + "norm2")]
        pairs += [
            (ours + leaves, theirs + "attn.proj"),
            (ours + fc1, theirs + "mlp.fc1"),
            (ours + fc2, theirs + "mlp.fc2"),
        ]
        for end in ("weight", "bias"):
            for part, tensor in zip("qkv", state[f"{theirs}attn.qkv.{end}"].chunk(3), strict=True):
                out[f"{ours}{mixes.format(part)}.{end}"] = tensor.contiguous()
        if kind == "dinov2":
            for n in "12":
                scale = state.get(f"{theirs}ls{n}.gamma")
                out[f"{ours}layer_scale{n}.lambda1"] = torch.ones(width) if scale is None else scale
    for ours, theirs in pairs:
        for end in ("weight", "bias"):
            if ours and f"{theirs}.{end}" in state:
                out[f"{ours}.{end}"] = state[f"{theirs}.{end}"]
    return out


def naflex_config(config: Any) -> Any:
    """Describe a SigLIP 2 NaFlex, which takes any shape, as the SigLIP that it equals on its own square grid."""
    from transformers import SiglipVisionConfig

    side = math.isqrt(config.num_patches)
    same = (
        "hidden_size intermediate_size num_hidden_layers num_attention_heads num_channels patch_size hidden_act "
        "layer_norm_eps attention_dropout"
    ).split()
    return SiglipVisionConfig(
        **{name: getattr(config, name) for name in same}, image_size=side * config.patch_size, vision_use_head=False
    )


def convert_naflex(tower: Any, config: Any) -> Any:
    """Convert such a tower to SigLIP's class: its linear patch embedding (row, column, channel) is a convolution."""
    from transformers import SiglipVisionModel

    out = SiglipVisionModel(config)
    state = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith("head.")}
    name, patch = "embeddings.patch_embedding.weight", config.patch_size
    state[name] = state[name].view(-1, patch, patch, config.num_channels).permute(0, 3, 1, 2).contiguous()
    out.load_state_dict(state)
    return out.eval()


def metaclip_config(config: Any) -> Any:
    """Describe MetaCLIP 2's tower as CLIP's, the same network under another name."""
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(**{name: value for name, value in config.to_dict().items() if name != "model_type"})


def convert_metaclip(tower: Any, config: Any) -> Any:
    """Convert such a tower to CLIP's class."""
    from transformers import CLIPVisionModel

    out = CLIPVisionModel(config)
    out.load_state_dict(tower.state_dict())
    return out.eval()


def load_openclip(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Convert the image tower of an open_clip folder to a CLIPVisionModel with the same pooled output.

    Raises: UsageError, also for a tower that has or does more than that class, since its features would differ.
    """
    from safetensors.torch import load_file

    config_file, weights_file = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UsageError(f"model.tower {OPENCLIP_PREFIX}{folder}: {file.name} is missing in that folder")
    document = read_json(config_file)
    with loading(str(folder), "model.tower"):
        model_cfg, preprocess_cfg = document.get("model_cfg", document), document.get("preprocess_cfg", {})
        state = {
            key.removeprefix("visual."): value.float()
            for key, value in load_file(weights_file).items()
            if key.startswith("visual.")
        }
        tower = _from_openclip(model_cfg, state, folder)
        interpolation = {"bilinear": BILINEAR}.get(preprocess_cfg.get("interpolation", "bicubic"), BICUBIC)
        preprocess = {
            "image_mean": preprocess_cfg.get("mean", CLIP_MEAN),
            "image_std": preprocess_cfg.get("std", CLIP_STD),
            "resample": interpolation,
            "squash": preprocess_cfg.get("resize_mode") == "squash",
        }
    return tower, preprocess


def _from_openclip(model_cfg: dict[str, Any], state: dict[str, Tensor], folder: Path) -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    cfg = model_cfg["vision_cfg"]
    width, layers, size = cfg.get("width", 768), cfg.get("layers", 12), cfg.get("image_size", 224)
    if cfg.get("timm_model_name") or not isinstance(layers, int) or "ln_pre.weight" not in state:
        raise UsageError(f"model.tower {OPENCLIP_PREFIX}{folder}: only a plain ViT of open_clip can be converted")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=layers,
        num_attention_heads=width // cfg.get("head_width", 64),
        image_size=size[0] if isinstance(size, list) and size == size[:1] * 2 else size,
        patch_size=cfg.get("patch_size", 16),
        projection_dim=model_cfg.get("embed_dim", 512),
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        layer_norm_eps=1e-5,
    )
    config.architectures = ["CLIPVisionModel"]
    tower = CLIPVisionModel(config)
    names = _openclip_names(state, layers)  # what is left in `state` are tensors that the class has no place for
    odd = [key for key in ("act_kwargs", "norm_kwargs", "scaled_cosine_attn") if cfg.get(key)]
    if odd := sorted([*odd, *state.keys() - {"proj"}]):
        raise UsageError(
            f"model.tower {OPENCLIP_PREFIX}{folder}: only a plain ViT of open_clip can be converted; it has "
            f"{odd[0]!r}" + f" and {len(odd) - 1} more" * (len(odd) > 1)
        )
    tower.load_state_dict(names)
    return tower


def _openclip_names(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """Take a tower's tensors out of `state`, under CLIP's names."""
    out = {
        "embeddings.class_embedding": state.pop("class_embedding"),
        "embeddings.patch_embedding.weight": state.pop("conv1.weight"),
        "embeddings.position_embedding.weight": state.pop("positional_embedding"),
    }
    pairs: list[tuple[str, str]] = [("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")]
    for i in range(num_layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        pairs += [(ours + "layer_norm1", theirs + "ln_1"), (ours + "layer_norm2", theirs + "ln_2")]
        pairs += [(ours + "mlp.fc1", theirs + "mlp.c_fc"), (ours + "mlp.fc2", theirs + "mlp.c_proj")]
        pairs += [(ours + "self_attn.out_proj", theirs + "attn.out_proj")]
        for kind in ("weight", "bias"):
            parts = state.pop(f"{theirs}attn.in_proj_{kind}").chunk(3)
            for part, tensor in zip("qkv", parts, strict=True):
                out[f"{ours}self_attn.{part}_proj.{kind}"] = tensor.contiguous()
    for ours, theirs in pairs:
        for kind in ("weight", "bias"):
            out[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
    return out
