"""Configurations of published models, from a folder, from the hub, or from the facts shipped here; and loading them.

The shipped facts (`pipelines/configs/ORG--NAME/`) are the sizes of the published models that the pipelines name. They
describe a model when its weights are not needed (counting parameters, rehearsing a recipe at small size), so that this
works without the hub. Weights always come with their own configuration. A model's own code is never run.
"""

from __future__ import annotations

import json
import logging
import pickle
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

import pipelines
from pipelines.terminal import first_line
from train.errors import UsageError
from train.model.own import register_own_classes

CONFIGS = Path(pipelines.__file__).parent / "configs"
WEIGHTS, POINTER = (".bin", ".safetensors"), b"version https://git-lfs"
log = logging.getLogger("train")


@dataclass(frozen=True)
class Words:
    """Facts of a published tokenizer: its size, the token before every text ("" for none), the one that ends texts."""

    size: int
    bos: str
    eos: str


def locate(source: str) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a folder, a hub id, or a hub id with `@revision`."""
    name, at, revision = source.partition("@")
    if not at or Path(source).exists():
        return {"pretrained_model_name_or_path": source}
    return {"pretrained_model_name_or_path": name, "revision": revision}


def shipped(source: str) -> Path | None:
    """Return the folder of facts about a published model; None if there is none, or if a local folder has its name."""
    folder = CONFIGS / source.partition("@")[0].replace("/", "--")
    return folder if "/" in source and folder.is_dir() and not Path(source).exists() else None


def known_words(source: str) -> Words | None:
    """Return the shipped facts of a published model's tokenizer."""
    facts = tomllib.loads((CONFIGS / "tokenizers.toml").read_text("utf-8"))
    found = facts.get(source.partition("@")[0])
    return Words(**found) if found else None


def check_named(source: str, option: str) -> None:
    """Refuse a model option that is not set.  Raises: UsageError."""
    if not source:
        raise UsageError(f"{option} is not set; give a hub id or a local folder, e.g. --set {option}=FOLDER")


def read_config(source: str, option: str, *, described: bool = False) -> Any:
    """Read a model's configuration; MiniCPM's is returned as that of the equivalent Granite.

    described: use the shipped facts, if there are any.  Raises: UsageError.
    """
    from transformers import AutoConfig, PreTrainedConfig

    register_own_classes()
    check_named(source, option)
    where = locate(str((described and shipped(source)) or source))
    with loading(source, option):
        values, _ = PreTrainedConfig.get_config_dict(**where)
        if values.get("model_type") == "minicpm":
            return granite_of_minicpm(values)
        return AutoConfig.from_pretrained(**where, trust_remote_code=False)


def read_preprocess(source: str, *, described: bool = False) -> dict[str, Any]:
    """Read how a tower's images are prepared; an empty table if no file says so.  Raises: UsageError."""
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(
            **locate(str((described and shipped(source)) or source))
        )
    except (OSError, ValueError) as error:
        if (Path(source) / "preprocessor_config.json").is_file():
            raise UsageError(cannot_load(source, "model.tower", error)) from None
        return {}
    return dict(values)


def granite_of_minicpm(values: dict[str, Any]) -> Any:
    """Describe a MiniCPM as a Granite: the same layers under the same names, with MiniCPM's scales as multipliers.

    Source: MiniCPM (arXiv 2404.06395, §4), and openbmb's configuration_minicpm.py for the names: embeddings times
    scale_emb, branches times scale_depth / sqrt(layers), logits of hidden / (hidden_size / dim_model_base).
    """
    from transformers import GraniteConfig

    layers, width, heads = (values[k] for k in ("num_hidden_layers", "hidden_size", "num_attention_heads"))
    turned = dict(values.get("rope_scaling") or {})  # MiniCPM4 has longrope angles at any length
    turned.setdefault("rope_type", turned.pop("type", "default"))
    same = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    same += ["num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias"]
    same += ["bos_token_id", "eos_token_id", "pad_token_id", "initializer_range"]
    return GraniteConfig(
        **{name: values[name] for name in same if name in values},
        rope_parameters={**turned, "rope_theta": float(values.get("rope_theta", 10_000.0))},
        tie_word_embeddings=values.get("tie_word_embeddings", True),
        embedding_multiplier=float(values["scale_emb"]),
        residual_multiplier=values["scale_depth"] / layers**0.5,
        attention_multiplier=(width // heads) ** -0.5,
        logits_scaling=width / values["dim_model_base"],
    )


def load_published(
    kind: Any, source: str, option: str, config: Any, but: tuple[type[Exception], ...] = (), **how: Any
) -> tuple[Any, list[str]]:
    """Load a model with a class of transformers; return it, and the names of weights that none of its files has.

    transformers draws those at random and says so only in its log.  but: as in `loading`.  Raises: UsageError.
    """
    how |= {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    with loading(source, option, but):
        _check_index(Path(source))
        model, found = kind.from_pretrained(**locate(source), **how)
        for name, theirs, ours in sorted(found["mismatched_keys"]):
            raise ValueError(f"{name} is {list(theirs)} in its files but {list(ours)} by its config.json")
        _check_places(model, sorted(found["unexpected_keys"]), source if option == "model.lm" else "")
    return model, sorted(found["missing_keys"])


def _check_places(model: Any, more: Sequence[str], source: str) -> None:
    """Refuse files with a weight or bias for a layer that has none by its config.json; log other unused tensors.

    Such a layer would not compute what was trained. Whole parts that a class does not use, such as heads that predict
    further tokens, change nothing; they are logged if `source` is given.  Raises: ValueError.
    """
    layers = {name for name, part in model.named_modules() if next(part.parameters(recurse=False), None) is not None}
    for name in more:
        layer, _, leaf = name.rpartition(".")
        if leaf in ("weight", "bias") and layer in layers:
            raise ValueError(f"its files hold {name}, for which its config.json has no place")
    if more and source:
        told = (source, len(more), type(model).__name__, more[0])
        log.info("%s: %d tensors in its files are left out, as a %s has no place for them, among them %s", *told)


def check_whole(missing: Sequence[str], source: str, option: str) -> None:
    """Refuse a model whose files lack weights that are needed.  Raises: UsageError."""
    if missing:
        raise UsageError(cannot_load(source, option, lacking(missing)))


def lacking(missing: Sequence[str]) -> ValueError:
    """Word the lack of weights, which transformers would draw at random and mention only in its log."""
    return ValueError(f"its files lack {len(missing)} weights, among them {missing[0]}")


@contextmanager
def loading(source: str, option: str, but: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Turn what transformers raises for faulty files into one line.

    Their types are not documented: an incomplete download raises one, a broken tokenizer.json plain `Exception`.
    but: exceptions that the caller explains itself.  Raises: UsageError.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, (UsageError, *but)):
            raise
        raise UsageError(cannot_load(source, option, error)) from None


def cannot_load(source: str, option: str, error: Exception) -> str:
    """Word the failure to load a model: the first line of the reason, and what to type."""
    reason, folder = first_line(error), Path(source)
    if reason.endswith(":"):  # from a strict configuration: the reason is on the next line
        reason = " ".join(str(error).split())
    if isinstance(error, pickle.UnpicklingError):  # its text advises loading without weights_only
        reason = "its .bin files hold more than a table of tensors, and nothing else is read"
    elif isinstance(error, LookupError):  # its text is only the name
        reason = f"{type(error).__name__}: {reason}"
    reason = next(_broken(folder, isinstance(error, SafetensorError)), reason)
    other = "another" if folder.exists() else "a local"
    return f"{option} {source!r} cannot be loaded ({reason}); give {other} folder instead: --set {option}=FOLDER"


def _broken(folder: Path, headers: bool) -> Iterator[str]:
    """Yield what is wrong with files of a folder that have none or only part of their content.

    The libraries' errors do not name the file; with many shards, the user must know which.  headers: check those of
    safetensors, too.
    """
    for file in sorted(path for path in folder.glob("*.*") if path.suffix in (".json", ".model", *WEIGHTS)):
        with file.open("rb") as opened:
            if opened.read(len(POINTER)) == POINTER:
                yield f"{file.name} is a Git LFS pointer, not the file itself; type in that folder: git lfs pull"
    for file in sorted(folder.glob("*.safetensors")) if headers else ():
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            reason = first_line(error).removeprefix("Error while deserializing header: ")
            yield f"{file.name} is not a complete safetensors file: {reason:.80}"


def _check_index(folder: Path) -> None:
    """Raise a ValueError for a broken index of a folder's shards, which transformers does not report as such."""
    file = folder / "model.safetensors.index.json"
    if file.is_file() and not (folder / "model.safetensors").is_file():  # which comes first
        try:
            places = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ValueError(f"{file.name} is not a complete index of weights") from None
        if missing := sorted(name for name in set(places) if not (folder / name).is_file()):
            raise ValueError(f"{file.name} names {missing[0]}, which is not there")
