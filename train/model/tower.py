"""The vision tower: loaded, and described by what the rest must know of it (sizes, tokens an image, colours).

A tower is a `CLIPVisionModel`, `SiglipVisionModel` or `Dinov2Model` of transformers or the EVA02-CLIP of eva.py, from a
hub id, a local folder, a folder with only a config.json (fresh weights), or an open_clip `local-dir:FOLDER` whose plain
ViT is converted. With `scales` above 1 it looks at several sizes of the image (multiscale.py).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import Model
from train.errors import CheckpointError, UsageError
from train.folder import read_json
from train.model.layer import feature_layer_index
from train.model.own import register_own_classes
from train.model.published import cannot_load, locate, read_config, read_preprocess, shipped
from train.model.weights import read_tensors

OPENCLIP_PREFIX = "local-dir:"
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BICUBIC, BILINEAR = 3, 2  # PIL.Image.Resampling
HEADS = ("post_layernorm", ".layernorm.", ".head.")  # behind every feature layer
EVA, MULTISCALE = "eva02_clip_vision_model", "multiscale_vision_model"
COLOURS = {  # what each kind of tower was trained on, where no preprocessor_config.json says so
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": ((0.5,) * 3, (0.5,) * 3),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    EVA: (CLIP_MEAN, CLIP_STD),
}
# The files that EVA02-CLIP is published in: open_clip's, timm's, the authors'.
EVA_AUTHORS = "EVA02_CLIP_L_336_psz14_s6B.pt"
EVA_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", EVA_AUTHORS)
log = logging.getLogger("train")


@dataclass(frozen=True)
class Vision:
    """What the rest must know of a tower. Sizes in pixels; `strategy` as in LlavaConfig."""

    image_size: int
    patch_size: int
    has_class_token: bool
    strategy: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    short_side: int  # 0: both sides straight to image_size, else the short side to this and a centre crop
    pad: bool

    @property
    def tokens_per_image(self) -> int:
        """How many positions of the language model one image fills."""
        first = self.has_class_token and self.strategy == "full"
        return (self.image_size // self.patch_size) ** 2 + int(first)


def load_tower(options: Model, dtype: torch.dtype) -> tuple[Any, Vision]:
    """Load the tower in `dtype` on the CPU, and describe it.  Raises: UsageError."""
    config, preprocess, load = _find(options)
    whole, vision = _adapt(config, preprocess, options)
    if options.shrink or options.tower_weights == "fresh":
        tower = _fresh(whole, options.seed)
    elif whole is config:
        tower = load()
    else:
        tower = _fresh(whole, options.seed)
        tower.tower = load()
    return tower.to(dtype).eval(), vision


def describe_tower(options: Model) -> tuple[Any, Vision]:
    """Return a tower's configuration and description; weights are only read where they come with it.

    Raises: UsageError.
    """
    config, preprocess, _ = _find(options)
    return _adapt(config, preprocess, options)


def _find(options: Model) -> tuple[Any, dict[str, Any], Callable[[], Any]]:
    """Return the published configuration, how images are prepared, and what loads the weights."""
    source = options.tower.removeprefix(OPENCLIP_PREFIX)
    files = _eva_files(source)
    if files:
        tower = _read_eva(files, source)
        return tower.config, read_preprocess(source), lambda: tower
    if options.tower.startswith(OPENCLIP_PREFIX):
        tower, preprocess = _load_openclip(Path(source))
        return tower.config, preprocess, lambda: tower
    facts = shipped(source)
    described = bool(options.shrink) or options.tower_weights == "fresh"
    eva = facts is not None and read_config(str(facts), "model.tower").model_type == EVA
    config = read_config(source, "model.tower", described=described or eva)
    config = getattr(config, "vision_config", config)
    if config.model_type not in COLOURS:
        raise UsageError(f"model.tower {source!r} is a {config.model_type!r}; expected {', '.join(COLOURS)}")
    preprocess = read_preprocess(source, described=described or eva)
    if not preprocess:
        log.info("%s has no preprocessor_config.json: images are prepared as its model type usually is", source)
    return config, preprocess, lambda: _download_eva(source) if eva else _pretrained(source, config)


def _adapt(config: Any, preprocess: dict[str, Any], options: Model) -> tuple[Any, Vision]:
    """Shrink a tower where that is asked for, put it behind several scales where that is; describe what results."""
    if options.shrink:
        config, preprocess = _shrunk(config), {**preprocess, "size": None, "crop_size": None}
    vision = _describe(config, preprocess, options)
    if options.scales == 1:
        return config, vision
    if config.model_type == "dinov2" or vision.image_size != config.image_size:
        raise UsageError(f"model.scales = {options.scales} needs a tower that sees images of one size: SigLIP or CLIP")
    from train.model.multiscale import MultiscaleConfig

    register_own_classes()
    whole = MultiscaleConfig(
        tower_config=config,
        scales=options.scales,
        feature_index=feature_layer_index(options.feature_layer, config.num_hidden_layers),
        tokens_skipped=int(vision.has_class_token),
    )
    return whole, dataclasses.replace(
        vision,
        image_size=whole.image_size,
        patch_size=whole.patch_size,
        short_side=vision.short_side * options.scales,
        has_class_token=False,
        strategy="full",
    )


def trim(tower: Any, layer: int) -> None:
    """Drop the blocks and heads behind the feature layer: they would run for nothing and can have no gradient."""
    blocks = tower.encoder.layers if hasattr(tower.encoder, "layers") else tower.encoder.layer
    keep = feature_layer_index(layer, len(blocks))
    del blocks[keep:]
    tower = getattr(tower, "tower", tower)
    if hasattr(tower, "use_head"):
        tower.use_head = False


def make_image_processor(vision: Vision) -> Any:
    """Build the image processor that is used in training and written by the export."""
    from transformers import LlavaImageProcessorPil

    square = {"height": vision.image_size, "width": vision.image_size}
    return LlavaImageProcessorPil(
        do_pad=vision.pad,
        size={"shortest_edge": vision.short_side} if vision.short_side else square,
        do_center_crop=bool(vision.short_side),
        crop_size=square,  # also where nothing is cropped: LlavaProcessor counts image tokens with it
        resample=vision.resample,
        image_mean=list(vision.mean),
        image_std=list(vision.std),
    )


def _pretrained(source: str, config: Any) -> Any:
    from transformers import AutoModel

    kind = AutoModel._model_mapping[type(config)]
    try:
        return kind.from_pretrained(**locate(source), config=config, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise UsageError(cannot_load(source, "model.tower", error)) from None


def _fresh(config: Any, seed: int) -> Any:
    from transformers import AutoModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModel.from_config(config, dtype=torch.float32)


def _shrunk(config: Any) -> Any:
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    values = {**config.to_dict(), **small, "image_size": 2 * config.patch_size}
    if "intermediate_size" in values:
        values["intermediate_size"] = 64
    for name in ("out_features", "out_indices", "stage_names"):  # of the backbone interface; they name each layer
        values.pop(name, None)
    return type(config).from_dict(values)


def _describe(config: Any, preprocess: dict[str, Any], options: Model) -> Vision:
    siglip = config.model_type == "siglip_vision_model"
    mean, std = COLOURS[config.model_type]
    size, crop = preprocess.get("size") or {}, preprocess.get("crop_size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    crop = crop if isinstance(crop, int) else crop.get("height", 0)
    image_size = crop if crop and preprocess.get("do_center_crop", True) else size.get("height", config.image_size)
    direct = siglip or options.image == "pad" or "height" in size or preprocess.get("squash", False)
    strategy = options.feature_strategy
    if strategy == "auto":
        strategy = "full" if siglip else "default"
    if siglip and strategy == "default":
        raise UsageError('model.feature_strategy = "default" would drop a patch: SigLIP has no class token; use "full"')
    return Vision(
        image_size=image_size,
        patch_size=config.patch_size,
        has_class_token=not siglip,
        strategy=strategy,
        mean=tuple(preprocess.get("image_mean") or mean),
        std=tuple(preprocess.get("image_std") or std),
        resample=int(preprocess.get("resample", BICUBIC)),
        short_side=0 if direct else size.get("shortest_edge", image_size),
        pad=options.image == "pad",
    )


def _eva_files(source: str) -> list[Path]:
    """Return the local files that hold an EVA02-CLIP: one named by itself, or that of a folder which says so."""
    from train.model.eva import TIMM_NAME

    path = Path(source)
    if path.is_file():
        return [path]
    files = [path / name for name in EVA_FILES if (path / name).is_file()]
    for name in ("open_clip_config.json", "config.json"):
        if files and (path / name).is_file():
            said = read_json(path / name)
            named = f'"{TIMM_NAME}"' in json.dumps([said.get("architecture"), said.get("model_cfg", said)])
            return files[:1] if named else []
    return files if [file.name for file in files] == [EVA_AUTHORS] else []


def _read_eva(files: list[Path], source: str) -> Any:
    from train.model.eva import from_tensors

    try:
        return from_tensors(read_tensors(files))
    except (ValueError, CheckpointError) as error:
        raise UsageError(cannot_load(source, "model.tower", error)) from None


def _download_eva(source: str) -> Any:
    from transformers.utils.hub import cached_file

    where = locate(source)
    repository = where.pop("pretrained_model_name_or_path")
    for name in EVA_FILES:
        try:
            file = cached_file(repository, name, _raise_exceptions_for_missing_entries=False, **where)
        except OSError as error:
            raise UsageError(cannot_load(source, "model.tower", error)) from None
        if file:
            return _read_eva([Path(file)], source)
    raise UsageError(
        f"model.tower {source!r}: neither hub nor cache has one of {', '.join(EVA_FILES)}; give a local folder"
    )


def _load_openclip(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Convert the image tower of an open_clip folder to a CLIPVisionModel with the same pooled output."""
    from safetensors.torch import load_file
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config_file, weights_file = folder / "open_clip_config.json", folder / "open_clip_model.safetensors"
    for file in (config_file, weights_file):
        if not file.is_file():
            raise UsageError(f"model.tower {OPENCLIP_PREFIX}{folder}: {file.name} is missing in that folder")
    document = read_json(config_file)
    model_cfg, preprocess_cfg = document.get("model_cfg", document), document.get("preprocess_cfg", {})
    cfg = model_cfg["vision_cfg"]
    state = {
        key.removeprefix("visual."): value.float()
        for key, value in load_file(weights_file).items()
        if key.startswith("visual.")
    }
    width, layers = cfg.get("width", 768), cfg.get("layers", 12)
    if cfg.get("timm_model_name") or not isinstance(layers, int) or "ln_pre.weight" not in state:
        raise UsageError(f"model.tower {OPENCLIP_PREFIX}{folder}: only a plain ViT of open_clip can be converted")
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=int(width * cfg.get("mlp_ratio", 4.0)),
        num_hidden_layers=layers,
        num_attention_heads=width // cfg.get("head_width", 64),
        image_size=cfg.get("image_size", 224),
        patch_size=cfg.get("patch_size", 16),
        projection_dim=model_cfg.get("embed_dim", 512),
        hidden_act="quick_gelu" if model_cfg.get("quick_gelu", False) else "gelu",
        layer_norm_eps=1e-5,
    )
    config.architectures = ["CLIPVisionModel"]
    tower = CLIPVisionModel(config)
    _, unexpected = tower.load_state_dict(_openclip_names(state, layers), strict=True)
    assert not unexpected
    interpolation = {"bilinear": BILINEAR}.get(preprocess_cfg.get("interpolation", "bicubic"), BICUBIC)
    preprocess = {
        "image_mean": preprocess_cfg.get("mean", CLIP_MEAN),
        "image_std": preprocess_cfg.get("std", CLIP_STD),
        "resample": interpolation,
        "squash": preprocess_cfg.get("resize_mode") == "squash",
    }
    return tower, preprocess


def _openclip_names(state: dict[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    out = {
        "embeddings.class_embedding": state["class_embedding"],
        "embeddings.patch_embedding.weight": state["conv1.weight"],
        "embeddings.position_embedding.weight": state["positional_embedding"],
    }
    pairs: list[tuple[str, str]] = [("pre_layrnorm", "ln_pre"), ("post_layernorm", "ln_post")]
    for i in range(num_layers):
        ours, theirs = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        pairs += [(ours + "layer_norm1", theirs + "ln_1"), (ours + "layer_norm2", theirs + "ln_2")]
        pairs += [(ours + "mlp.fc1", theirs + "mlp.c_fc"), (ours + "mlp.fc2", theirs + "mlp.c_proj")]
        pairs += [(ours + "self_attn.out_proj", theirs + "attn.out_proj")]
        for kind in ("weight", "bias"):
            parts = state[f"{theirs}attn.in_proj_{kind}"].chunk(3)
            for part, tensor in zip("qkv", parts, strict=True):
                out[f"{ours}self_attn.{part}_proj.{kind}"] = tensor.contiguous()
    for ours, theirs in pairs:
        out[f"{ours}.weight"], out[f"{ours}.bias"] = state[f"{theirs}.weight"], state[f"{theirs}.bias"]
    return out
