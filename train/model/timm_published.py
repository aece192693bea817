"""timm's published networks: found in a folder, on the hub or in an open_clip folder, described, and loaded.

    FOLDER                 config.json with an `architecture`, model.safetensors: as timm writes it
    timm/NAME[@REVISION]   from the hub; with fresh weights, from timm's own registry, without the hub
    local-dir:FOLDER       an open_clip folder whose tower is one of timm's

Weights are loaded by timm's and open_clip's own code, strictly and without unpickling. A plain vision transformer is
converted to the equivalent class of transformers (plain_vit.py), so that its export is native; others stay timm's.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from train.errors import UsageError
from train.folder import read_json
from train.model import plain_vit
from train.model.layer import feature_layer_index
from train.model.own import register_own_classes
from train.model.published import cannot_load, locate
from train.model.timm_tower import TimmVisionConfig, TimmVisionModel, create, cut, grid

HUB = "timm/"
SMALL: dict[str, dict[str, Any]] = {  # how classes of timm are made tiny; any other keeps its size, on small images
    "VisionTransformer": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "Eva": {"depth": 2, "embed_dim": 32, "num_heads": 2},
    "ConvNeXt": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 32]},
}
SMALL_STRIDES = 2  # places per side in a tiny network's last map
log = logging.getLogger("train")


@dataclasses.dataclass(frozen=True)
class Network:
    """A network of timm: its name and arguments, its image preparation, and a function that loads it whole."""

    source: str
    architecture: str
    arguments: dict[str, Any]
    facts: dict[str, Any]  # timm's pretrained_cfg: input_size, mean, std, interpolation, crop_mode
    load: Callable[[], Any]

    @property
    def preprocess(self) -> dict[str, Any]:
        """How its images are prepared, in transformers' terms. The whole picture is seen: crop_pct is ignored."""
        resample = {"bilinear": 2, "nearest": 0, "lanczos": 1}.get(self.facts.get("interpolation", "bicubic"), 3)
        out = {"image_mean": self.facts.get("mean"), "image_std": self.facts.get("std"), "resample": resample}
        return out | {"squash": self.facts.get("crop_mode") == "squash"}


def find(source: str, *, fresh: bool) -> Network | None:
    """Return the network of a folder or hub id, or None if it is not one of timm's.

    fresh: look up a published name in timm's registry.  Raises: UsageError.
    """
    import timm

    if fresh and source.startswith(HUB) and not Path(source).exists():
        name = source.removeprefix(HUB).partition("@")[0]
        if not timm.is_model(name.partition(".")[0]):
            raise UsageError(f"model.tower {source!r}: timm {timm.__version__} has no {name.partition('.')[0]!r}")
        facts = timm.get_pretrained_cfg(name) or timm.get_pretrained_cfg(name.partition(".")[0])
        return Network(source, name.partition(".")[0], {}, facts.to_dict() if facts else {}, lambda: None)
    if not _is_timms(source):
        return None
    full = f"local-dir:{source}" if Path(source).exists() else f"hf-hub:{source}"
    with in_words(source), torch.device("meta"):
        model = timm.create_model(full)
    arguments = {k: v for k, v in model._model_args.items() if k not in ("pretrained_cfg", "cache_dir")}
    name = model.pretrained_cfg["architecture"]
    return Network(
        source, name, arguments, dict(model.pretrained_cfg), lambda: timm.create_model(full, pretrained=True)
    )


def find_in_openclip(folder: Path) -> Network | None:
    """Return the network of an open_clip folder, or None if its tower is open_clip's own.  Raises: UsageError."""
    if not (folder / "open_clip_config.json").is_file():
        return None
    document = read_json(folder / "open_clip_config.json")
    model_cfg, how = document.get("model_cfg", document), document.get("preprocess_cfg", {})
    vision_cfg = model_cfg.get("vision_cfg", {}) if isinstance(model_cfg, dict) else {}
    name = vision_cfg.get("timm_model_name")
    if not name:
        return None

    def build() -> Any:
        from open_clip.model import _build_vision_tower

        return _build_vision_tower(model_cfg["embed_dim"], {**vision_cfg, "timm_model_pretrained": False})

    def load() -> Any:
        from safetensors.torch import load_file

        state = load_file(folder / "open_clip_model.safetensors")
        visual = build()
        visual.load_state_dict({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")})
        return visual.trunk

    with in_words(str(folder)), torch.device("meta"):
        facts = dict(build().trunk.pretrained_cfg)
    facts |= {key: how[key] for key in ("mean", "std", "interpolation") if key in how}
    facts["crop_mode"] = "squash" if how.get("resize_mode") == "squash" else "center"
    size = vision_cfg.get("image_size")
    if size:
        facts["input_size"] = (3, *([size, size] if isinstance(size, int) else size))
    return Network(str(folder), name.partition(".")[0], {}, facts, load)


def describe(network: Network, feature_layer: int, *, shrink: bool, places: int = 0) -> Any:
    """Return the configuration of the tower: an equivalent class of transformers if there is one, else timm's.

    places: per side, to average the map to (`model.grid`); 0: keep its own. Nothing is computed: shapes come from the
    meta device.  Raises: UsageError.
    """
    register_own_classes()
    with in_words(network.source), _shapes_alone(network.architecture):
        trunk, arguments, side = _skeleton(network, shrink)
        native = None if places else plain_vit.native_config(trunk, side)
        if native is not None:
            return native
        return _own_config(network.architecture, arguments, trunk, side, feature_layer, places)


def load(network: Network, config: Any) -> Any:
    """Load the weights into the tower that `describe` gave; a converted one is compared with timm's own.

    Raises: UsageError.
    """
    with in_words(network.source):
        trunk = network.load().eval().float()
        if config.model_type != TimmVisionConfig.model_type:
            return plain_vit.convert(trunk, config, network.source)
        with torch.device("meta"):
            tower = TimmVisionModel(config)
    tower.trunk = cut(trunk, config.feature_index, config.whole)
    return tower


def _is_timms(source: str) -> bool:
    from transformers import PreTrainedConfig

    try:
        values, _ = PreTrainedConfig.get_config_dict(**locate(source))
    except (OSError, ValueError):
        return False  # reported where the configuration is read
    return "architecture" in values and values.get("model_type", "timm_wrapper") == "timm_wrapper"


def _skeleton(network: Network, shrink: bool) -> tuple[Any, dict[str, Any], int]:
    """Return the network on the meta device, its arguments, and the side of its images."""
    arguments = dict(network.arguments)
    with torch.device("meta"):
        trunk = create(network.architecture, arguments)
    size = arguments.get("img_size") or (network.facts.get("input_size") or trunk.pretrained_cfg["input_size"])[1:]
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise UsageError(f"model.tower {network.source!r} takes images of {height} x {width}; they must be square")
    if shrink:
        height = SMALL_STRIDES * max(level["reduction"] for level in trunk.feature_info)
        arguments |= SMALL.get(type(trunk).__name__, {})
        arguments |= {"img_size": height} if hasattr(getattr(trunk, "patch_embed", None), "img_size") else {}
        with torch.device("meta"):
            trunk = create(network.architecture, arguments)
    elif height != trunk.pretrained_cfg["input_size"][1] and hasattr(getattr(trunk, "patch_embed", None), "img_size"):
        arguments.setdefault("img_size", height)
    return trunk, arguments, height


def _own_config(
    name: str, arguments: dict[str, Any], trunk: Any, side: int, feature_layer: int, places: int
) -> TimmVisionConfig:
    from torch.utils.flop_counter import FlopCounterMode

    pixels = torch.empty(1, 3, side, side, device="meta")
    with torch.no_grad():
        maps = trunk.forward_intermediates(pixels, intermediates_only=True)
        end = trunk.forward_features(pixels)
    index = feature_layer_index(feature_layer, len(maps))
    if getattr(trunk, "output_fmt", "NCHW") == "NHWC" and isinstance(end, torch.Tensor) and end.ndim == 4:
        end = end.permute(0, 3, 1, 2)
    whole = index == len(maps) and isinstance(end, torch.Tensor) and end.ndim == 4 and end.shape != maps[-1].shape
    cut(trunk, index, whole)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        seen = grid(trunk, pixels, index, whole)
    _, channels, rows, columns = seen.shape
    if places > rows:
        raise UsageError(
            f"model.grid = {places}: map {index} of {name} has {rows} x {columns} places; give fewer, or 0"
        )
    patch = next((p for p in range(side, 0, -1) if side // p == (places or rows)), 0)
    if rows != columns or not patch:
        raise UsageError(
            f"{name}: map {index} has {rows} x {columns} places for an image of {side} px, which is not a grid"
        )
    log.info("%s: map %d of %d, %d x %d places of %d channels", name, index, len(maps), rows, columns, channels)
    if places:
        log.info("averaged to %d x %d places (model.grid)", places, places)
    return TimmVisionConfig(
        architecture=name,
        model_args=arguments,
        feature_index=index,
        whole=whole,
        places=places,
        hidden_size=channels,
        image_size=side,
        patch_size=patch,
        num_hidden_layers=len(maps),
        flops=int(counter.get_total_flops()),
    )


@contextmanager
def _shapes_alone(architecture: str) -> Iterator[None]:
    """Refuse as a tower a network that needs an image's values to lay out its places (Gemma 4's)."""
    try:
        yield
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        raise UsageError(
            f"model.tower: {architecture} of timm lays out its places by an image's values, so it cannot be a tower "
            "here; take a network of a fixed grid (SigLIP 2, DINOv3, PE, …)"
        ) from None


@contextmanager
def in_words(source: str) -> Iterator[None]:
    """Turn what timm and open_clip raise for an unsuitable network into one line.  Raises: UsageError."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError) as error:
        raise UsageError(cannot_load(source, "model.tower", error)) from error
    except (NotImplementedError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise UsageError(cannot_load(source, "model.tower", error)) from error
