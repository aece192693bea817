"""The vision tower: loaded, and described by what the rest must know of it (sizes, tokens per image, colours).

A tower is a class of transformers (COLOURS names them), any network of timm (timm_published.py) or the EVA02-CLIP of
eva.py, from a hub id, a local folder, a folder with only a config.json (fresh weights), or an open_clip
`local-dir:FOLDER`. Plain ViTs are converted to a class of transformers (plain_vit.py). With `scales` above 1 a tower
looks at several sizes of the image (multiscale.py); the same wrapper drops register tokens.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from train.config import Model
from train.errors import CheckpointError, UsageError
from train.folder import read_json
from train.model import plain_vit, timm_published
from train.model.layer import feature_layer_index
from train.model.own import register_own_classes
from train.model.plain_vit import BICUBIC, CLIP_MEAN, CLIP_STD, OPENCLIP_PREFIX
from train.model.published import (
    cannot_load,
    check_whole,
    load_published,
    locate,
    read_config,
    read_preprocess,
    shipped,
)
from train.model.weights import read_tensors

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = ("post_layernorm", ".layernorm.", ".head.", "tower.norm.", "tower.rms_norm.")  # after every feature layer
EVA, MULTISCALE, TIMM = "eva02_clip_vision_model", "multiscale_vision_model", "timm_vision_model"
NAFLEX, METACLIP = "siglip2_vision_model", "metaclip_2_vision_model"
COLOURS = {  # mean and deviation of each kind of tower, for folders without preprocessor_config.json
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": ((0.5,) * 3, (0.5,) * 3),
    "dinov2": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov2_with_registers": (IMAGENET_MEAN, IMAGENET_STD),
    "dinov3_vit": (IMAGENET_MEAN, IMAGENET_STD),
    "aimv2_vision_model": (CLIP_MEAN, CLIP_STD),
    EVA: (CLIP_MEAN, CLIP_STD),
}
COLOUR_KEYS = ("image_mean", "image_std", "do_normalize", "do_rescale", "rescale_factor")  # in preprocessor_config.json
PATCHES_ALONE = ("siglip_vision_model", "aimv2_vision_model", TIMM)  # towers without a class token
# The files that EVA02-CLIP is published in: open_clip's, timm's, the authors'.
EVA_AUTHORS = "EVA02_CLIP_L_336_psz14_s6B.pt"
EVA_FILES = ("open_clip_model.safetensors", "model.safetensors", "open_clip_pytorch_model.bin", EVA_AUTHORS)
log = logging.getLogger("train")


@dataclass(frozen=True)
class Vision:
    """What other modules must know of a tower. Sizes in pixels; `strategy` as in LlavaConfig."""

    image_size: int
    patch_size: int
    has_class_token: bool
    strategy: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resample: int
    short_side: int  # 0: resize both sides to image_size; else resize the short side to this and crop the centre
    pad: bool

    @property
    def image_bytes(self) -> int:
        """How many bytes a decoded image takes."""
        return 3 * self.image_size**2

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
        from transformers import AutoModel

        with torch.device("meta"):
            tower = AutoModel.from_config(whole)
        tower.tower = load()
    return tower.to(dtype).eval(), vision


def describe_tower(options: Model) -> tuple[Any, Vision]:
    """Return a tower's configuration and description; weights are read only if the two come in one file.

    Raises: UsageError.
    """
    config, preprocess, _ = _find(options)
    return _adapt(config, preprocess, options)


def _find(options: Model) -> tuple[Any, dict[str, Any], Callable[[], Any]]:
    """Return the published configuration, the image preparation, and a function that loads the weights."""
    source = options.tower.removeprefix(OPENCLIP_PREFIX)
    files = _eva_files(source)
    if files:
        tower = _read_eva(files, source)
        return tower.config, read_preprocess(source), lambda: tower
    described = bool(options.shrink) or options.tower_weights == "fresh"
    if options.tower.startswith(OPENCLIP_PREFIX):
        network = timm_published.find_in_openclip(Path(source))
        if network is None:
            tower, preprocess = plain_vit.load_openclip(Path(source))
            return tower.config, preprocess, lambda: tower
    else:
        network = None if shipped(source) else timm_published.find(source, fresh=described)
    if network is not None:
        ours = timm_published.describe(network, options.feature_layer, shrink=bool(options.shrink), places=options.grid)
        return ours, network.preprocess, lambda: timm_published.load(network, ours)
    facts = shipped(source)
    eva = facts is not None and read_config(str(facts), "model.tower").model_type == EVA
    config = read_config(source, "model.tower", described=described or eva)
    config = getattr(config, "vision_config", config)
    if config.model_type not in (*COLOURS, NAFLEX, METACLIP):
        known = ", ".join((*COLOURS, NAFLEX, METACLIP))
        raise UsageError(f"model.tower {source!r} is a {config.model_type!r}; expected {known}, or a network of timm")
    preprocess = read_preprocess(source, described=described or eva)
    if not preprocess:
        log.info("%s has no preprocessor_config.json: images are prepared as is usual for its model type", source)
    if config.model_type == NAFLEX:
        square = plain_vit.naflex_config(config)
        log.info("%s: loaded as SigLIP's class, with square images of %d px", source, square.image_size)
        preprocess = {name: preprocess[name] for name in (*COLOUR_KEYS, "resample") if name in preprocess}
        return square, preprocess, lambda: plain_vit.convert_naflex(_pretrained(source, config), square)
    if config.model_type == METACLIP:
        clip = plain_vit.metaclip_config(config)
        return clip, preprocess, lambda: plain_vit.convert_metaclip(_pretrained(source, config), clip)
    return config, preprocess, lambda: _download_eva(source) if eva else _pretrained(source, config)


def _adapt(config: Any, preprocess: dict[str, Any], options: Model) -> tuple[Any, Vision]:
    """Shrink a tower and wrap it for several scales, if the options say so; describe the result."""
    if options.shrink:
        config = config if config.model_type == TIMM else _shrunk(config)
        preprocess = {**preprocess, "size": None, "crop_size": None}
    if options.grid and config.model_type != TIMM:
        raise UsageError(f"model.grid = {options.grid} needs a network of timm, which {options.tower!r} is not; give 0")
    try:
        vision = _describe(config, preprocess, options)
    except (AttributeError, TypeError, ValueError) as error:
        found = {
            name: preprocess[name] for name in (*COLOUR_KEYS, "resample", "size", "crop_size") if name in preprocess
        }
        raise UsageError(
            f"model.tower {options.tower!r}: its preprocessor_config.json cannot be read ({error}): {found}; sizes are "
            'numbers or {"height": …} or {"shortest_edge": …}, mean and deviation three numbers, resample one'
        ) from None
    registers = getattr(config, "num_register_tokens", 0)
    if options.scales == 1 and not registers:
        return config, vision
    if options.scales > 1 and ("dino" in config.model_type or vision.image_size != config.image_size):
        raise UsageError(f"model.scales = {options.scales} needs a tower that sees images of one size: SigLIP or CLIP")
    from train.model.multiscale import MultiscaleConfig

    register_own_classes()
    whole = MultiscaleConfig(
        tower_config=config,
        scales=options.scales,
        feature_index=feature_layer_index(options.feature_layer, config.num_hidden_layers),
        tokens_skipped=int(vision.has_class_token) + registers,
    )
    return whole, dataclasses.replace(
        vision,
        image_size=vision.image_size * options.scales,
        patch_size=whole.patch_size,
        short_side=vision.short_side * options.scales,
        has_class_token=False,
        strategy="full",
    )


def trim(tower: Any, layer: int) -> None:
    """Drop the blocks and heads after the feature layer: they would run for nothing and get no gradient."""
    if (blocks := blocks_of(tower)) == []:
        return  # a network of timm is built without them
    del blocks[feature_layer_index(layer, len(blocks)) :]
    tower = getattr(tower, "tower", tower)
    if hasattr(tower, "use_head"):
        tower.use_head = False


def blocks_of(tower: Any) -> Any:
    """Return the list of a tower's blocks; empty for a network of timm, whose forms vary."""
    tower = getattr(tower, "tower", tower)
    if tower.config.model_type == TIMM:
        return []
    encoder = tower.encoder if hasattr(tower, "encoder") else tower.model
    return encoder.layers if hasattr(encoder, "layers") else encoder.layer


def needed(names: Iterable[str]) -> list[str]:
    """Return the names of weights, in order, without those of a tower that no feature layer needs."""
    return [name for name in sorted(names) if not any(word in f"tower.{name}" for word in (*HEADS, ".mask_token"))]


def make_image_processor(vision: Vision) -> Any:
    """Build the image processor that is used in training and written by the export."""
    from transformers import LlavaImageProcessorPil

    square = {"height": vision.image_size, "width": vision.image_size}
    return LlavaImageProcessorPil(
        do_pad=vision.pad,
        size={"shortest_edge": vision.short_side} if vision.short_side else square,
        do_center_crop=bool(vision.short_side),
        crop_size=square,  # set even if nothing is cropped: LlavaProcessor counts image tokens with it
        resample=vision.resample,
        image_mean=list(vision.mean),
        image_std=list(vision.std),
    )


def _pretrained(source: str, config: Any) -> Any:
    """Load a tower from its own checkpoint, or from that of a whole model: CLIP's, LLaVA's, PaliGemma's.

    In some of those the tower's class finds no weights by name; then the whole model's class loads it.
    Raises: UsageError.
    """
    from transformers import AutoModel, MetaClip2VisionModel

    # AutoModel knows MetaCLIP 2 only as a whole model.
    kind = MetaClip2VisionModel if config.model_type == METACLIP else AutoModel._model_mapping[type(config)]
    tower, missing = load_published(kind, source, "model.tower", config, dtype=torch.float32)
    whole = read_config(source, "model.tower")
    if needed(missing) and hasattr(whole, "vision_config"):
        model, missing = load_published(AutoModel, source, "model.tower", whole, dtype="auto")
        inside = {name: part for name, part in model.named_modules() if type(part) is kind}
        place = next(iter(inside), "")
        tower = inside.get(place, tower).float()
        missing = [name for name in missing if name.startswith(f"{place}.")] if inside else missing
    check_whole(needed(missing), source, "model.tower")
    return tower


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
    for name in ("out_features", "out_indices", "stage_names"):  # from the backbone interface; they list every layer
        values.pop(name, None)
    return type(config).from_dict(values)


def _describe(config: Any, preprocess: dict[str, Any], options: Model) -> Vision:
    classed = config.model_type not in PATCHES_ALONE
    mean, std = _colours(preprocess, *COLOURS.get(config.model_type, (CLIP_MEAN, CLIP_STD)))
    size, crop = preprocess.get("size") or {}, preprocess.get("crop_size") or {}
    if isinstance(size, int):
        size = {"shortest_edge": size}
    crop = crop if isinstance(crop, int) else crop.get("height", 0)
    image_size = crop if crop and preprocess.get("do_center_crop", True) else size.get("height", config.image_size)
    if (problem := _misfit(config, image_size)) or len(mean) != 3 or len(std) != 3 or not min(std) > 0:
        raise ValueError(problem or f"mean {mean}, deviation {std}")
    siglip = config.model_type == "siglip_vision_model"
    direct = siglip or options.image != "square" or "height" in size or preprocess.get("squash", False)
    strategy = options.feature_strategy
    if strategy == "auto":
        strategy = "default" if classed else "full"
    if not classed and strategy == "default":
        raise UsageError(
            f'model.feature_strategy = "default" would drop a patch: {config.model_type} has no class token; use "full"'
        )
    return Vision(
        image_size=image_size,
        patch_size=config.patch_size,
        has_class_token=classed,
        strategy=strategy,
        mean=mean,
        std=std,
        resample=int(preprocess.get("resample", BICUBIC)),
        short_side=0 if direct else size.get("shortest_edge", image_size),
        pad=options.image == "pad",
    )


def _misfit(config: Any, image_size: int) -> str:
    """Say why a tower cannot see images of a size, or ""; DINO's adapt their positions, others have a fixed table.

    CLIP's class requires its exact size, SigLIP's the same number of places.
    """
    if image_size < config.patch_size:
        return f"images of {image_size} px"
    cells = {"clip_vision_model": 1, "siglip_vision_model": config.patch_size}.get(config.model_type, 0)
    if cells and image_size // cells != config.image_size // cells:
        return f"images of {image_size} px, where its config.json says {config.image_size}"
    return ""


def _colours(
    preprocess: dict[str, Any], mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and deviation for colours in [0, 1] that are equivalent to the tower's own preparation.

    That computes (x * factor - mean) / std for x in 0 … 255, and either half may be switched off; a factor other than
    1/255 goes into mean and deviation: x f = (x / 255) (255 f). So the export needs no switches.
    """
    if preprocess.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    else:
        given = [preprocess.get(key) or ours for key, ours in (("image_mean", mean), ("image_std", std))]
        mean, std = (tuple(map(float, v)) if isinstance(v, list | tuple) else (float(v),) * 3 for v in given)
    scaled = preprocess.get("do_rescale") is not False
    factor = 255 * float(preprocess.get("rescale_factor") or 1 / 255) if scaled else 255.0
    if abs(factor - 1) < 1e-6:  # the usual case: avoids rounding
        return mean, std
    return tuple(m / factor for m in mean), tuple(s / factor for s in std)


def _eva_files(source: str) -> list[Path]:
    """Return the local files that hold an EVA02-CLIP: a file named directly, or that of a folder which says so."""
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
