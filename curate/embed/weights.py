"""Where a model comes from: names, tags, folders and files resolved to a config and a local file of weights.

A model is named as open_clip names it (`ViT-B-32` with a pretrained tag), by `local-dir:FOLDER`, a folder, `hf-hub:ID`
or a config JSON; weights may always be a local file. What cannot be found is refused in one line before anything runs.
"""

import hashlib
import json
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from curate.errors import UsageError, unknown
from pipelines.terminal import first_line

SMALL_WEIGHTS_BYTES = 64 << 20
WEIGHT_NAMES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "model.safetensors")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
CONFIG = "open_clip_config.json"
FOLDER_FORM = f"a local model is a folder with {CONFIG} and a .safetensors file"


@dataclass(frozen=True)
class Source:
    """Where a model comes from, resolved and picklable.

    model: open_clip's name; config: a JSON to register first; checkpoint: a local file; weights: blake2b-128 of it and
    of the config that lies beside it.
    preprocess: what the pretrained tag or the caller says about images, over the model's own.
    """

    model: str
    config: str
    checkpoint: str
    weights: str
    preprocess: dict[str, Any]

    @property
    def size(self) -> int:
        """Return the bytes of the weights' file."""
        return os.path.getsize(self.checkpoint)

    @property
    def is_small(self) -> bool:
        """Say whether the model is too small to gain from half precision on a CPU."""
        return self.size < SMALL_WEIGHTS_BYTES


def whole_name(given: str) -> str:
    """Write the path of a local model or of local weights in full; any other name stays as it is."""
    kind = "local-dir:" if given.startswith("local-dir:") else ""
    folder = os.path.expanduser(given.removeprefix(kind))
    return kind + os.path.abspath(folder) if given and os.path.exists(folder) else given


def find(model: str, pretrained: str = "") -> Source:
    """Resolve a model and its weights to local files, downloading what a tag names.

    Raises: UsageError for an unknown model or tag, a missing file, or weights that cannot be had.
    """
    given = os.path.expanduser(pretrained)
    if os.path.isdir(os.path.expanduser(model)):
        model = f"local-dir:{model}"
    if model.startswith("local-dir:"):
        return _find_folder(os.path.expanduser(model.removeprefix("local-dir:")), given)
    if model.endswith(".json"):
        return _find_config(os.path.expanduser(model), given)
    if model.startswith("hf-hub:"):
        from open_clip.factory import download_pretrained_from_hf

        fetch = partial(download_pretrained_from_hf, model.removeprefix("hf-hub:"))
        return _source(model, _there(given) if given else _download(model, fetch))
    return _find_named(model, pretrained)


def _source(model: str, checkpoint: str, config: str = "", preprocess: dict[str, Any] | None = None) -> Source:
    digest = hashlib.blake2b(digest_size=16)
    beside = os.path.join(model.removeprefix("local-dir:"), CONFIG) if model.startswith("local-dir:") else config
    for path in filter(None, (beside, checkpoint)):
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return Source(model, config, checkpoint, digest.hexdigest(), preprocess or {})


def _find_folder(folder: str, given: str) -> Source:
    """Resolve a folder in open_clip's layout: `open_clip_config.json` and weights."""
    if not os.path.isfile(os.path.join(folder, CONFIG)):
        raise UsageError(f"{folder} has no {CONFIG}.", FOLDER_FORM)
    held = [name for suffix in WEIGHT_SUFFIXES for name in sorted(os.listdir(folder)) if name.endswith(suffix)]
    best = next((name for name in WEIGHT_NAMES if name in held), held[0] if held else "")
    if not given and not best:
        raise UsageError(f"{folder} holds no weights.", "give them with --pretrained PATH")
    return _source(f"local-dir:{folder}", _there(given) if given else os.path.join(folder, best))


def _there(weights: str) -> str:
    """Return a file of weights. Raises: UsageError if it does not exist."""
    if not os.path.isfile(weights):
        raise UsageError(f"the weights {weights} do not exist.")
    return weights


def _find_config(path: str, given: str) -> Source:
    """Resolve a config JSON, bare or as in a model folder, with weights from a file."""
    if not os.path.isfile(path):
        raise UsageError(f"the model config {path} does not exist.")
    if os.path.basename(path) == CONFIG:
        return _find_folder(os.path.dirname(path) or ".", given)
    if not os.path.isfile(given):
        raise UsageError(f"the config {path} needs weights; {given or 'none'} is no file.", "give --pretrained PATH")
    try:
        with open(path, encoding="utf-8") as file:
            complete = {"embed_dim", "vision_cfg", "text_cfg"} <= set(json.load(file))
    except (ValueError, TypeError) as error:
        raise UsageError(f"{path} is not readable JSON: {error}") from None
    if not complete:
        raise UsageError(
            f"{path} is not an open_clip model config: expected embed_dim, vision_cfg and text_cfg at its top level.",
            f"if it has model_cfg, name it {CONFIG} and give its folder",
        )
    return _source(os.path.basename(path)[: -len(".json")], given, config=path)


def _same_activation(name: str, tag: str) -> bool:
    """Say whether weights were trained with the activation of the model that they are to be loaded into."""
    import open_clip

    own, model = open_clip.get_pretrained_cfg(name, tag), open_clip.get_model_config(name) or {}
    return bool(own.get("quick_gelu", False) == model.get("quick_gelu", False))


def _find_named(model: str, pretrained: str) -> Source:
    """Resolve a model that open_clip lists, with a tag or a file."""
    import open_clip

    name = model.replace("/", "-")
    if name not in open_clip.list_models():
        if os.sep in model or model.startswith("."):
            raise UsageError(f"{model} is neither a folder nor a model that open_clip lists.", FOLDER_FORM)
        raise unknown("model", model, open_clip.list_models())
    given = os.path.expanduser(pretrained)
    if os.path.isfile(given):
        return _source(name, given)
    tags = open_clip.list_pretrained_tags_by_model(name)
    twin = name.removesuffix("-quickgelu") if name.endswith("-quickgelu") else f"{name}-quickgelu"
    if not pretrained:
        fit = [tag for tag in tags if _same_activation(name, tag)]
        others = f" ({', '.join(tag for tag in tags if tag not in fit)}: {twin})" if len(fit) < len(tags) else ""
        raise UsageError(f"{name} needs weights; there are: {', '.join(fit) or 'none'}{others}.", "--pretrained TAG")
    if not open_clip.is_pretrained_cfg(name, pretrained):
        if os.sep in pretrained or pretrained.endswith(WEIGHT_SUFFIXES):
            raise UsageError(f"the weights {pretrained} do not exist.")
        raise unknown(f"pretrained tag of {name}", pretrained, tags)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    if not _same_activation(name, pretrained):  # open_clip only warns, and every embedding is then slightly wrong
        raise UsageError(
            f"the weights {pretrained} were trained with a different activation from that of {name}.", f"use {twin}"
        )
    return _source(
        name,
        _download(f"{pretrained} of {name}", partial(open_clip.download_pretrained, tag)),
        preprocess={key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag},
    )


def _download(what: str, fetch: Callable[[], str]) -> str:
    """Fetch weights; only from the cache if the hub cannot be reached. Raises: UsageError in one line."""
    from huggingface_hub import constants

    hub = logging.getLogger("huggingface_hub")
    offline, level = constants.HF_HUB_OFFLINE, hub.level
    try:
        hub.setLevel(logging.CRITICAL)  # its retries would bury the one line that matters
        constants.HF_HUB_OFFLINE = offline or not _resolves(constants.ENDPOINT)
        return str(fetch())
    except Exception as error:
        raise UsageError(
            f"the weights {what} cannot be found or downloaded ({first_line(error)[:160]}).",
            "give local weights with --pretrained PATH",
        ) from None
    finally:
        hub.setLevel(level)
        constants.HF_HUB_OFFLINE = offline


def _resolves(url: str) -> bool:
    """Say whether a host has an address; behind a proxy only the proxy can tell."""
    if urllib.request.getproxies():
        return True
    try:
        return bool(socket.getaddrinfo(urllib.parse.urlparse(url).hostname, 443))
    except OSError:
        return False
