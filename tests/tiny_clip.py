"""Tiny open_clip models with random weights, as folders in open_clip's layout."""

import json
from pathlib import Path

VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
SIGLIP_LOOK = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
KINDS = {
    "clip": {},
    "siglip": {
        "model": {"custom_text": True, "init_logit_bias": -10},
        "text": {"context_length": 16, "no_causal_mask": True, "pool_type": "last", "proj_bias": True},
        "look": SIGLIP_LOOK,
    },
    "custom": {"model": {"custom_text": True}, "look": {"resize_mode": "longest"}},
    "coca": {
        "model": {
            "custom_text": True,
            "multimodal_cfg": {
                "context_length": 76,
                "vocab_size": 49408,
                "width": 32,
                "heads": 2,
                "layers": 1,
            },
        },
        "text": {"context_length": 76, "embed_cls": True, "output_tokens": True},
        "vision": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 16, "output_tokens": True},
    },
}


def config_of(kind):
    """Write a kind's open_clip config."""
    other = KINDS[kind]
    vision, text = {**VISION, **other.get("vision", {})}, {**TEXT, **other.get("text", {})}
    model = {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text, **other.get("model", {})}
    return {"model_cfg": model, "preprocess_cfg": other.get("look", {})}


def write(folder, kind="clip", seed=0, config=None):
    """Write a model folder, of a kind or with a config of one's own; returns its `local-dir:` name."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config or config_of(kind)))
    torch.manual_seed(seed)
    model = open_clip.create_model(f"local-dir:{folder}", pretrained_text=False)
    state = {name: value.contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, str(folder / "open_clip_model.safetensors"))
    return f"local-dir:{folder}"
