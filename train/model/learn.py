"""Which parts of a composed model are trained in a stage: projector, LoRA or everything; the rest is frozen."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from train.config import Stage
from train.errors import UsageError
from train.model.compose import Composed
from train.model.quantized import quantize
from train.model.tower import HEADS, trim


def lora_targets(model: Any) -> list[str]:
    """Return the full paths of the language model's linear layers; the head is not among them.

    Nor are expert routers that are linear layers by class but return more than a tensor (Phi-3.5-MoE's).
    Raises: UsageError for layers that share their weights (Zamba 2): only one layer's LoRA could be merged into them.
    """
    lm = model.model.language_model
    found = [(name, part) for name, part in lm.named_modules() if isinstance(part, nn.Linear)]
    if len({id(part.weight) for _, part in found}) < len(found):
        raise UsageError(
            f"layers of {lm.config.model_type} share their weights, so LoRA cannot adapt each of them: "
            'take tune = "full" or "projector"'
        )
    plain = (name for name, part in found if not type(part).__module__.startswith("transformers.models."))
    return [f"model.language_model.{name}" for name in plain]


def lora_config(stage: Stage, targets: list[str]) -> Any:
    """Describe the adapter for PEFT; its targets are one regular expression that matches only in the language model."""
    from peft import LoraConfig

    # A bare number, from a layer in a list, would match the decoder's layers, too.
    leaves = sorted({re.findall(r"[^.]*[^.0-9][^.]*(?:\.\d+)*$", target)[0] for target in targets})
    return LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,
        lora_dropout=stage.lora_dropout,
        use_dora=stage.dora,
        use_rslora=stage.rslora,
        bias="none",
        target_modules=rf"model\.language_model\..*\.({'|'.join(map(re.escape, leaves))})",
    )


def prepare(composed: Composed, stage: Stage) -> dict[str, nn.Parameter]:
    """Freeze and unfreeze for a stage and return the trained parameters by name, in fp32; drop unused tower blocks.

    The set is asserted against the stage: the whole projector, and LoRA factors on each linear layer of the language
    model, or all of the language model and its head, or nothing more.
    """
    model = composed.model
    trim(model.model.vision_tower, composed.model.config.vision_feature_layer)
    model.requires_grad_(False)
    projector = {f"model.multi_modal_projector.{n}" for n, _ in model.model.multi_modal_projector.named_parameters()}
    expected = set(projector)
    if stage.tune == "lora":
        from peft import inject_adapter_in_model

        if stage.quantize:
            quantize(model)
        targets = lora_targets(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            inject_adapter_in_model(lora_config(stage, targets), model)
        learnt = ("lora_A", "lora_B", *(["lora_magnitude_vector"] if stage.dora else []))
        expected |= {f"{target}.{name}.default.weight" for target in targets for name in learnt}
    elif stage.tune == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        expected |= {name for name, _ in model.named_parameters() if name.startswith(("model.language_model.", "lm_"))}
    model.model.multi_modal_projector.requires_grad_(True)
    if stage.tune_tower:
        model.model.vision_tower.float().requires_grad_(True)  # fp32 for its frozen heads, too: they read its output
        for name, parameter in model.model.vision_tower.named_parameters(prefix="model.vision_tower"):
            if any(word in name for word in HEADS):
                parameter.requires_grad_(False)
            else:
                expected.add(name)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert set(trainable) == expected, set(trainable) ^ expected
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
    model.eval()
    _set_dropout(model.model.language_model, stage)
    return trainable


def fuse(model: Any) -> None:
    """Make each LoRA layer of a prepared model, if it has any, one function each way (lora.py)."""
    if hasattr(model, "peft_config"):  # importing PEFT takes seconds, and most stages do not use it
        from train.model.lora import fuse_lora

        fuse_lora(model)


def _set_dropout(language_model: Any, stage: Stage) -> None:
    """Turn the language model's own dropout on or off (`lm_dropout`); LoRA's is always set by `lora_dropout`.

    Phi-2's published configuration has resid_pdrop = 0.1, most others have none.
    """
    language_model.train(stage.lm_dropout == "always" or stage.tune != "projector")
    if stage.lm_dropout != "never":
        return
    for name, module in language_model.named_modules():
        if isinstance(module, nn.Dropout) and "lora_" not in name:
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def recompute(language_model: Any, *, reentrant: bool = False) -> None:
    """Make a prepared language model keep no activations and recompute them in the backward pass.

    transformers recomputes in training mode only. That mode must not turn on a frozen model's dropout, so it is set on
    the recomputing layers themselves, not on their submodules.
    """
    language_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for module in language_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
