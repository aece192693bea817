"""Convert a checkpoint that the authors of Bunny, LLaVA or LLaVA-Gemma released to the native form.

In: a folder (or one file) of safetensors, or of `pytorch_model*.bin`, which is read without unpickling code. The
tokenizer, the configurations and the image preparation are those that `[model]` names. Out: an llava-hf folder, as
`export` writes it. Three families of names are known:

    Bunny, LLaVA    model.vision_tower.vision_tower.[vision_model.]… (model.… for EVA02-CLIP, under the names of its
                    authors) · model.mm_projector.{0,2} · model.{embed_tokens,layers,norm,final_layernorm} · lm_head
    llava-hf        vision_tower.[vision_model.]… · multi_modal_projector.linear_{1,2} · language_model.{model,lm_head}
                    (LLaVA-Gemma was published in these)

Every tensor must have a place and every parameter a tensor, in the right shape; otherwise the checkpoint is refused and
they are named. Exceptions, which are logged: a tower that the checkpoint does not hold, tower blocks after the feature
layer, and extra rows of the embedding here, for the image token.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.config import Config
from train.errors import CheckpointError, UsageError
from train.folder import read_json, relative
from train.model.compose import Composed, compose, fold_feature_scale, place_head_bias
from train.model.language import FOLDED, fold_into_norm
from train.model.tower import HEADS, MULTISCALE
from train.model.weights import read_tensors
from train.publish.export import DTYPES, write_folder, writing
from train.run.checkpoint import PROJECTOR
from train.run.stage import make_encoder

LM, TOWER = "model.language_model.", "model.vision_tower."
AUTHORS = re.compile(r"^model\.mm_projector\.")
EVA_PREFIX = "model.vision_tower.vision_tower.model."
RULES = (
    (r"^model\.mm_projector\.0\.", f"{PROJECTOR}linear_1."),
    (r"^model\.mm_projector\.2\.", f"{PROJECTOR}linear_2."),
    (r"^model\.vision_tower\.vision_tower\.(?:vision_model\.)?", TOWER),
    (r"^model\.(embed_tokens|layers|norm|final_layernorm)\.", rf"{LM}\1."),
    (r"^vision_tower\.(?:vision_model\.)?", TOWER),
    (r"^multi_modal_projector\.", PROJECTOR),
    (r"^language_model\.model\.", LM),
    (r"^(?:language_model\.)?lm_head\.", "lm_head."),
)
BUFFERS = re.compile(r"\.(position_ids|rotary_emb\.inv_freq)$")  # saved by older transformers, computed by newer ones
FUSED = ".self_attn.query_key_value."
SCALED_SINCE = (5, 4)  # transformers moved Gemma's factor from the merged embeddings into the table of tokens
log = logging.getLogger("train")


def import_released(source: Path, out: Path, config: Config, *, overwrite: bool = False) -> dict[str, Any]:
    """Read a released checkpoint into the model that `config` describes, write it to `out`, return what was written.

    Raises: UsageError, CheckpointError naming the tensors that do not fit.
    """
    files = checkpoint_files(source)
    dtype = DTYPES[config.export.dtype]
    record = {"command": "import", "source": relative(str(source), out), "dtype": config.export.dtype}
    with writing(out, record, overwrite) as place:
        model = dataclasses.replace(config.model, lm_weights="fresh")  # all its weights must come from the checkpoint
        composed = compose(model, dtype)
        keep_tower = config.model.tower_weights == "pretrained"
        load_released(composed, files, keep_tower=keep_tower, head_bias=config.model.lm_head_bias)
        write_folder(composed, make_encoder(composed, model, config.finetune), place, dtype)
    parameters = sum(p.numel() for p in composed.model.parameters())
    return {"out": str(out), "parameters": parameters, "dtype": config.export.dtype}


def checkpoint_files(source: Path) -> list[Path]:
    """Return the weight files of a checkpoint, safetensors before pickles.  Raises: UsageError."""
    if source.is_file():
        return [source]
    if (source / "adapter_config.json").is_file():
        raise UsageError(f"{source} holds a LoRA adapter; merge it into its base with PEFT, then import the result")
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        files = sorted(source.glob(pattern))
        if files:
            return files
    raise UsageError(f"{source} holds no model*.safetensors and no pytorch_model*.bin; give a downloaded checkpoint")


def our_name(theirs: str, vision_type: str = "") -> str | None:
    """Translate the name of a released tensor to that of our parameter.

    vision_type: the tower's model_type; with several scales, its names are one level deeper.
    Returns "" for a tensor that is not needed, None if no rule matches.
    """
    if theirs.startswith(EVA_PREFIX):
        from train.model.eva import our_name as eva_name

        below = eva_name(theirs.removeprefix(EVA_PREFIX))
        return TOWER + below if below else below
    inner = f"{TOWER}tower." if vision_type == MULTISCALE else TOWER
    for pattern, ours in RULES:
        name, found = re.subn(pattern, ours, theirs)
        if found:
            return re.sub(rf"^{re.escape(TOWER)}(?:tower\.)?", inner, name)
    return None


def load_released(composed: Composed, files: list[Path], *, keep_tower: bool, head_bias: str = "fold") -> None:
    """Copy a checkpoint into a composed model, file by file.

    keep_tower: keep the loaded tower if the checkpoint has none.  head_bias: as model.lm_head_bias.
    Raises: CheckpointError, UsageError.
    """
    parameters: dict[str, Tensor] = dict(composed.model.named_parameters(remove_duplicate=False))
    tied = bool(composed.model.config.tie_word_embeddings)
    unknown: list[str] = []
    filled: set[str] = set()
    old_names = False
    bias = torch.zeros(0)  # the head's, if it has one; Bunny's has none, but conversions to other tools add zeros
    vision_type = composed.model.config.vision_config.model_type
    with torch.no_grad():
        for theirs, tensor in read_tensors(files):
            if BUFFERS.search(theirs):
                continue
            old_names |= AUTHORS.match(theirs) is not None
            name = our_name(theirs, vision_type)
            if name == "lm_head.bias":
                bias = tensor
            if name in ("", "lm_head.bias"):
                continue
            for part_name, part in _split(name or "", tensor, composed):
                if part_name not in parameters:
                    unknown.append(theirs)
                elif part_name == "lm_head.weight" and tied:
                    filled.add(part_name)  # tied to the embedding, which the checkpoint also has
                else:
                    _copy(parameters[part_name], part, part_name, theirs)
                    filled.add(part_name)
        _check_complete(composed, unknown, set(parameters) - filled, tied=tied, keep_tower=keep_tower)
        if old_names and hasattr(composed.model.config.text_config, FOLDED):
            fold_into_norm(composed.model.model.language_model, getattr(composed.model.config.text_config, FOLDED))
        place_head_bias(composed.model, bias, head_bias)
        if _has_scaled_features(composed, files[0].parent, old_names):
            factor = math.sqrt(composed.model.config.text_config.hidden_size)
            fold_feature_scale(composed.model, factor)
            log.info("image features were scaled by sqrt(hidden_size) = %.4f: folded into linear_2", factor)


def _split(name: str, tensor: Tensor, composed: Composed) -> Iterator[tuple[str, Tensor]]:
    """Split the fused attention of Bunny's first Phi class: its rows go by head, then query, key, value, then width.

    Phi-3 is fused as well, but so is its native class. Source: bunny/model/language_model/phi/modeling_phi.py.
    """
    if FUSED not in name:
        yield name, tensor
        return
    heads = composed.model.config.text_config.num_attention_heads
    rows = tensor.reshape(heads, 3, -1, *tensor.shape[1:]) if tensor.shape[0] % (3 * heads) == 0 else None
    for i, letter in enumerate("qkv"):
        part = tensor if rows is None else rows[:, i].flatten(0, 1)
        yield name.replace(FUSED, f".self_attn.{letter}_proj."), part


def _copy(parameter: Tensor, tensor: Tensor, name: str, theirs: str) -> None:
    grown = name in (f"{LM}embed_tokens.weight", "lm_head.weight") and tensor.ndim == 2
    if grown and len(tensor) < len(parameter) and tensor.shape[1] == parameter.shape[1]:
        log.info("%s has %d rows of %d; the others stay fresh", theirs, len(tensor), len(parameter))
        parameter = parameter[: len(tensor)]
    if tensor.shape != parameter.shape:
        raise CheckpointError(
            f"{theirs} is {list(tensor.shape)} in the checkpoint and {list(parameter.shape)} in the model that [model] "
            "describes; name the tower and language model it was trained from"
        )
    parameter.copy_(tensor)


def _check_complete(composed: Composed, unknown: list[str], missing: set[str], *, tied: bool, keep_tower: bool) -> None:
    tower = {name for name, _ in composed.model.named_parameters() if name.startswith(TOWER)}
    if tied:
        missing.discard("lm_head.weight")
    if tower <= missing and keep_tower:
        log.info("the checkpoint holds no vision tower: that of [model] tower is kept")
        missing -= tower
    behind = {name for name in missing if _is_behind_features(name, composed.feature_index)}
    if behind and not missing - behind:
        log.info("the checkpoint's tower ends at the feature layer: %d tensors after it keep their values", len(behind))
    missing -= behind
    for names, what in (
        (unknown, "tensors of the checkpoint have no place in the model"),
        (missing, "tensors of the model are not in the checkpoint"),
    ):
        if names:
            shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise CheckpointError(f"{len(names)} {what}: {shown}; name the parts it was trained from in [model]")


def _is_behind_features(name: str, index: int) -> bool:
    """Whether a parameter of the tower does not affect the features; Bunny's early checkpoints lack those."""
    block = re.match(rf"^{re.escape(TOWER)}(?:tower\.)?encoder\.layers?\.(\d+)\.", name)
    return any(word in name for word in HEADS) if block is None else int(block.group(1)) >= index


def _has_scaled_features(composed: Composed, folder: Path, old_names: bool) -> bool:
    """Whether a Gemma was trained with image features that were multiplied by sqrt(hidden_size).

    transformers before 5.4 did so with all merged embeddings, LLaVA-Gemma's included; now only the token embeddings are
    scaled. Decided by the authors' tensor names, else by the version that wrote the configuration.
    """
    if composed.model.config.text_config.model_type != "gemma":
        return False
    if old_names:
        return True
    try:
        version = str(read_json(folder / "config.json")["transformers_version"])
        numbers = tuple(int(number) for number in version.split(".")[:2])
    except (UsageError, KeyError, ValueError):
        raise UsageError(
            f"{folder}/config.json gives no transformers_version, which tells whether features were scaled; add it"
        ) from None
    return numbers < SCALED_SINCE
