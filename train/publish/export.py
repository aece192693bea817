"""Write a run as an llava-hf folder: `AutoModelForImageTextToText` and `AutoProcessor` load it with no code of ours.

LoRA is merged in fp32. Names are those of the llava-hf checkpoints (`vision_tower.vision_model.…`,
`language_model.model.…`), which transformers reads through its own renaming and vLLM expects; a model composed from
parts would save itself without the `vision_model.` infix and without `text_config.architectures`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from train.data.chat import chat_template
from train.data.encoder import Encoder
from train.data.own_template import OwnTemplate
from train.data.prompts import Template
from train.errors import UsageError
from train.folder import LOCK, held, read_json, refuse_unexported, relative, write_json
from train.model.compose import Composed, compose, fold_feature_scale
from train.model.tower import make_image_processor
from train.model.weights import write_shards, write_tensors
from train.publish.card import CARD, write_card
from train.publish.older_readers import write_for_older_readers
from train.publish.parts import INFIX, as_published, write_parts
from train.run import checkpoint
from train.run.base import check_base, describe_base
from train.run.stage import load_options, make_encoder

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RECORD, UNFINISHED = "train_manifest.json", ".unfinished"
log = logging.getLogger("train")


def export(
    run: Path, out: Path, *, dtype: str, overwrite: bool = False, parts: bool = False, scores: Sequence[Path] = ()
) -> dict[str, Any]:
    """Merge a finished run into its base model and write it to `out`, with a model card; return what was written.

    scores: results of `eval`, for the card; for a model that is exported already, only the card is rewritten.
    parts: write the parts instead (parts.py), of a run or of a model that is exported, imported or merged already.
    Raises: UsageError; TrainError if the base is no longer what the run was trained on.
    """
    if parts and (run / "config.json").is_file():
        return _split(run, out, dtype, overwrite)
    model, stage, _ = load_options(run)
    manifest = read_json(run / "manifest.json")
    record = {"command": "export", "run": relative(str(run), out), "dtype": dtype, "result": manifest["result"]}
    record |= {"parts": True} if parts else {}
    if (out / RECORD).is_file() and read_json(out / RECORD) == record and not overwrite:
        if scores:
            write_card(out, run, dtype, scores, folder=out)
            return {"out": str(out), "dtype": dtype, "card": str(out / CARD)}
        log.info("%s is exported already; nothing to do (--overwrite starts over)", out)
        return {"out": str(out), "dtype": dtype}
    with writing(out, record, overwrite) as folder:
        composed = compose(model, torch.float32)
        encoder = make_encoder(composed, model, stage)
        noted = {"weights": manifest["result"]["fingerprint"], **manifest["result"].get("base", {})}
        check_base(noted, describe_base(composed, encoder), f"{model.tower} or {model.lm}", run)
        merge_trained(composed.model, checkpoint.load_trained(run), stage.lora_scale)
        fold_feature_scale(composed.model, composed.feature_scale)
        if isinstance(encoder.template, OwnTemplate):
            thinks = 2 * manifest["result"].get("thinking", 0) > manifest["result"]["samples"]
            encoder.template = dataclasses.replace(encoder.template, thinks=thinks)
        if parts:
            _set_ends(composed, encoder)
            processor = _processor(composed, encoder)
            write_parts(composed.model, processor.tokenizer, processor.image_processor, folder, DTYPES[dtype])
        else:
            write_folder(composed, encoder, folder, DTYPES[dtype])
            write_json(folder / RECORD, record)
            write_card(folder, run, dtype, scores, folder=out)
    return {"out": str(out), "parameters": sum(p.numel() for p in composed.model.parameters()), "dtype": dtype}


def _split(folder: Path, out: Path, dtype: str, overwrite: bool) -> dict[str, Any]:
    from train.model.native import load_native

    record = {"command": "export", "model": relative(str(folder), out), "dtype": dtype, "parts": True}
    with writing(out, record, overwrite) as place:
        model, processor = load_native(folder, DTYPES[dtype])
        write_parts(model, processor.tokenizer, processor.image_processor, place, DTYPES[dtype])
    return {"out": str(out), "parameters": sum(p.numel() for p in model.parameters()), "dtype": dtype}


@contextmanager
def writing(out: Path, record: dict[str, Any], overwrite: bool) -> Iterator[Path]:
    """Yield a folder inside `out` to write a model to; then move it into place, with a record of how it was made.

    An existing model is removed only then, and only with `overwrite`; after a failure everything is as it was.
    Raises: UsageError.
    """
    with held(out):
        staged, whole = out / UNFINISHED, (out / RECORD).is_file()
        there = [path for path in out.iterdir() if path.name not in (LOCK, UNFINISHED)]
        if there and not (overwrite if whole else staged.is_dir()):
            raise UsageError(f"--out {out} is not empty" + "; type --overwrite to replace the model in it" * whole)
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        try:
            yield staged
            write_json(staged / RECORD, record)
        except BaseException:
            shutil.rmtree(staged)
            raise
        # The record marks a model as complete: the old one is removed first, the new one is written last.
        for path in sorted(there, key=lambda path: path.name != RECORD):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for path in sorted(staged.iterdir(), key=lambda path: path.name == RECORD):
            path.rename(out / path.name)
        staged.rmdir()


def merge_trained(model: Any, trained: Mapping[str, Tensor], scale: float) -> None:
    """Copy what was trained into the composed model, LoRA factors as `scale * B @ A` onto their layer.

    With DoRA, the magnitudes m [out] then set the length of each row: W' = m (W + scale B A) / |W + scale B A|.
    """
    with torch.no_grad():
        for name, tensor in trained.items():
            if ".lora_A." in name:
                factor_b = trained[name.replace(".lora_A.", ".lora_B.")]
                magnitude = trained.get(name.replace(".lora_A.", ".lora_magnitude_vector."))
                weight = model.get_parameter(name.replace(".lora_A.default.weight", ".weight"))
                weight.add_(scale * (factor_b.float() @ tensor.float()).to(weight.dtype))
                if magnitude is not None:
                    weight.mul_((magnitude.to(weight.dtype) / torch.linalg.norm(weight, dim=1))[:, None])
            elif ".lora_" not in name:
                parameter = model.get_parameter(name)
                parameter.copy_(tensor)


def llava_hf_name(name: str, vision_type: str) -> str:
    """Translate a parameter name of `LlavaForConditionalGeneration` to that of the llava-hf checkpoints."""
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    name = name.removeprefix("model.")
    if vision_type in INFIX:
        name = re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)
    return re.sub(r"^language_model\.(?!model\.)", "language_model.model.", name)


def write_folder(composed: Composed, encoder: Encoder, out: Path, dtype: torch.dtype) -> None:
    """Write weights, configuration, processor with its chat template, and generation settings."""
    model, vision_type = composed.model, composed.model.config.vision_config.model_type
    tied = model.config.tie_word_embeddings
    state = {
        llava_hf_name(name, vision_type): tensor.detach().to(dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in _state(model).items()
        if not (tied and name == "lm_head.weight")
    }
    if model.config.text_config.model_type == "phi":
        # The llava class has no such bias and ignores it; vLLM's Phi class has one, and needs its value.
        state["language_model.lm_head.bias"] = torch.zeros(len(model.lm_head.weight), dtype=dtype)
    write_shards(state, out)
    _set_ends(composed, encoder)
    config = model.config
    config.architectures, config.dtype = ["LlavaForConditionalGeneration"], dtype
    config.text_config.dtype = config.vision_config.dtype = dtype
    config.save_pretrained(out)
    model.generation_config.save_pretrained(out)
    _processor(composed, encoder).save_pretrained(out)
    write_for_older_readers(out)
    if config.text_config.model_type == "gemma":
        log.warning(
            "transformers before 5.4 (and vLLM, where its Gemma scales all its inputs) multiply this Gemma's image "
            "features by %.0f, which spoils its answers: load the folder with transformers 5.4 or later",
            math.sqrt(config.text_config.hidden_size),
        )


def _state(model: Any) -> dict[str, Tensor]:
    """Return a composed model's weights; language model and tower have the form of their own checkpoints."""
    from transformers import PreTrainedModel

    inner = model.model
    tower = getattr(inner.vision_tower, "tower", inner.vision_tower)
    parts = {"language_model": inner.language_model}
    if isinstance(tower, PreTrainedModel):
        parts["vision_tower" if tower is inner.vision_tower else "vision_tower.tower"] = tower
    places = tuple(f"model.{place}." for place in parts)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(places)}
    for place, part in parts.items():
        state |= {f"model.{place}.{name}": tensor for name, tensor in as_published(part).items()}
    return state


def _set_ends(composed: Composed, encoder: Encoder) -> None:
    """Store the token that ends answers: in the tokenizer, the generation settings and the text configuration."""
    from huggingface_hub.errors import StrictDataclassFieldValidationError
    from transformers import GenerationConfig

    tokenizer, config = composed.tokenizer, composed.model.config
    if not (isinstance(encoder.template, Template) and encoder.template.end_text):
        tokenizer.eos_token = encoder.end_token
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    ids["bos_token_id"] = encoder.bos_ids[0] if encoder.bos_ids else tokenizer.bos_token_id
    composed.model.generation_config = GenerationConfig(do_sample=False, **ids)
    for key, value in ids.items():
        with suppress(*[StrictDataclassFieldValidationError] * (value is None)):  # CWM's may not be without a bos token
            setattr(config.text_config, key, value)
    config.pad_token_id = tokenizer.pad_token_id


def _processor(composed: Composed, encoder: Encoder) -> Any:
    from transformers import LlavaProcessor

    tokenizer = composed.tokenizer
    tokenizer.padding_side = "left"  # for generation in batches
    tokenizer.chat_template = chat_template(encoder)
    return LlavaProcessor(
        image_processor=make_image_processor(composed.vision),
        tokenizer=tokenizer,
        patch_size=composed.vision.patch_size,
        vision_feature_select_strategy=composed.vision.strategy,
        num_additional_image_tokens=int(composed.vision.has_class_token),
        image_token=composed.image_token,
        chat_template=tokenizer.chat_template,
    )


def merge(models: Sequence[Path], weights: Sequence[float], out: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Average exported models weight by weight; everything else is taken from the first.

    Raises: UsageError when their tensors do not match.  Source: Bunny's tutorials, which average two fine-tuned runs.
    """
    if len(models) < 2 or len(models) != len(weights) or not abs(sum(weights) - 1) <= 1e-6:
        raise UsageError("merge needs two or more models and one --weight for each; weights must sum to 1")
    for folder in models:
        refuse_unexported(folder)
    record = {"command": "merge", "models": [relative(str(m), out) for m in models], "weights": list(weights)}
    with writing(out, record, overwrite) as place:
        for file in sorted(models[0].iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and file.name not in (LOCK, RECORD, CARD):
                shutil.copyfile(file, place / file.name)
        for file in sorted(models[0].glob("*.safetensors")):
            total: dict[str, Tensor] = {}
            for folder, weight in zip(models, weights, strict=True):
                if not (folder / file.name).is_file():
                    raise UsageError(f"{folder} has no {file.name}: the models were not exported alike")
                part = load_file(folder / file.name)
                if total and {k: v.shape for k, v in part.items()} != {k: v.shape for k, v in total.items()}:
                    raise UsageError(f"{folder} and {models[0]} hold different tensors")
                total = {k: total.get(k, torch.zeros(())) + weight * v.float() for k, v in part.items()}
            dtypes = {k: v.dtype for k, v in load_file(file).items()}
            write_tensors({k: v.to(dtypes[k]) for k, v in total.items()}, place / file.name)
    return {"out": str(out), "models": [str(m) for m in models], "weights": list(weights)}
