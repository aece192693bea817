"""Compose `LlavaForConditionalGeneration` from a tower and a language model, choose what learns, run it thinly.

The class is transformers' own, so that the artefact needs no code of ours. The forward pass here differs in three ways
that change no result: the tower runs without a graph and only up to the feature layer, several documents may share a
row, and logits are computed only at positions that have a label.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from train import attention
from train.config import Model, Stage
from train.errors import UsageError
from train.tower import HEADS, Vision, cannot_load, feature_layer_index, features, load_tower, read_config, trim

LOGIT_CHUNK = 1 << 25  # elements of one slice of logits: 128 MB in fp32
log = logging.getLogger("train")


@dataclass
class Composed:
    """A model in native form, with its tokenizer and what its tower expects."""

    model: Any  # LlavaForConditionalGeneration
    tokenizer: Any
    vision: Vision
    image_token: str
    fingerprint: str  # of the tower's and the language model's weights as loaded
    feature_index: int

    @property
    def image_id(self) -> int:
        """The id that stands for one image position."""
        return int(self.model.config.image_token_id)


def compose(options: Model, dtype: torch.dtype = torch.float32) -> Composed:
    """Build the model on the CPU: tower and language model in `dtype`, projector in fp32, everything frozen.

    The projector is drawn from `options.seed` as torch draws linear layers (as LLaVA does).  Raises: UsageError.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower, vision = load_tower(options, dtype)
    lm = _load_lm(options, dtype)
    tokenizer = load_tokenizer(options.tokenizer or options.lm)
    image_id = _image_token(lm, tokenizer, options.image_token)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=lm.config,
        image_token_index=image_id,
        image_seq_length=vision.tokens_per_image,
        vision_feature_layer=options.feature_layer,
        vision_feature_select_strategy=vision.strategy,
        tie_word_embeddings=bool(lm.config.tie_word_embeddings),
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    model.model.vision_tower = tower
    model.model.language_model = lm.get_decoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    head = lm.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        # Also dropped by Bunny (bunny_phi.py: bias=False), so its Phi models are reproduced as they are.
        log.info("the language model's lm_head.bias is dropped: the llava class has none")
    model.lm_head.weight = head.weight
    index = feature_layer_index(options.feature_layer, tower.config.num_hidden_layers)
    model.requires_grad_(False).eval()
    leftover = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert not leftover, leftover
    return Composed(model, tokenizer, vision, options.image_token, _fingerprint(model), index)


def _load_lm(options: Model, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    attention.register()
    config = read_config(options.lm, "model.lm")
    if options.shrink:
        config = _shrunk(config)
    if options.shrink or options.lm_weights == "fresh":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed + 1)
            lm = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=options.attention)
    else:
        try:
            lm = AutoModelForCausalLM.from_pretrained(
                options.lm, dtype=dtype, attn_implementation=options.attention, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UsageError(cannot_load(options.lm, "model.lm", error)) from None
    lm.config.architectures = [type(lm).__name__]  # other readers of llava-hf build the language model from it
    return lm


def _shrunk(config: Any) -> Any:
    values = {**config.to_dict(), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2 if config.num_key_value_heads else None}
    if "head_dim" in values:
        values["head_dim"] = 8
    for name in ("layer_types", "rope_scaling"):
        values.pop(name, None)
    return type(config).from_dict(values)


def load_tokenizer(source: str) -> Any:
    """Load a tokenizer without running code of its own, with a pad token.  Raises: UsageError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(cannot_load(source, "model.tokenizer", error)) from None
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of {source!r} has no fast form (tokenizer.json), which labels are built on")
    if tokenizer.pad_token is None:  # only generation pads by id; training goes by lengths, so eos is safe
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def _image_token(lm: Any, tokenizer: Any, token: str) -> int:
    """Return the id of the image token: one the tokenizer has, a spare row of the embedding, or else a new row."""
    from tokenizers import AddedToken

    known = tokenizer.convert_tokens_to_ids(token)
    if known is None or (known == tokenizer.unk_token_id and token != tokenizer.unk_token):
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, normalized=False, special=True)]})
        known = tokenizer.convert_tokens_to_ids(token)
    rows = lm.get_input_embeddings().num_embeddings
    if known >= rows:
        log.info("the language model has no spare row for %s: its embedding grows from %d rows", token, rows)
        lm.resize_token_embeddings(known + 1, pad_to_multiple_of=64 if rows % 64 == 0 else None, mean_resizing=False)
    return int(known)


def _fingerprint(model: Any) -> str:
    """Digest a strided sample of each weight, rounded to bf16, so that no dtype or device of loading matters."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if "multi_modal_projector" not in name:
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()


# ---- what learns -----------------------------------------------------------------------------------------------------


def lora_targets(model: Any) -> list[str]:
    """Return the full paths of the language model's linear layers; the head is not among them."""
    lm = model.model.language_model
    return [f"model.language_model.{name}" for name, module in lm.named_modules() if isinstance(module, nn.Linear)]


def lora_config(stage: Stage, targets: list[str]) -> Any:
    """Describe the adapter for PEFT; its targets are one expression that matches only in the language model."""
    from peft import LoraConfig

    leaves = sorted({target.rsplit(".", 1)[1] for target in targets})
    return LoraConfig(
        r=stage.lora_rank,
        lora_alpha=stage.lora_alpha,
        lora_dropout=stage.lora_dropout,
        bias="none",
        target_modules=rf"model\.language_model\..*\.({'|'.join(map(re.escape, leaves))})",
    )


def prepare(composed: Composed, stage: Stage) -> dict[str, nn.Parameter]:
    """Freeze and unfreeze for a stage and return what learns by name, in fp32; cuts unused tower blocks.

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

        targets = lora_targets(model)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stage.seed)
            inject_adapter_in_model(lora_config(stage, targets), model)
        expected |= {f"{target}.lora_{ab}.default.weight" for target in targets for ab in "AB"}
    elif stage.tune == "full":
        model.model.language_model.requires_grad_(True)
        model.lm_head.requires_grad_(True)
        expected |= {name for name, _ in model.named_parameters() if name.startswith(("model.language_model.", "lm_"))}
    model.model.multi_modal_projector.requires_grad_(True)
    if stage.tune_tower:
        model.model.vision_tower.requires_grad_(True)
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
    model.model.language_model.train(stage.tune != "projector")
    return trainable


# ---- the forward pass ------------------------------------------------------------------------------------------------


def normalise(pixels_nchw: Tensor, vision: Vision, dtype: torch.dtype) -> Tensor:
    """Scale uint8 pixels [n, 3, h, w] as the exported image processor does."""
    mean = torch.tensor(vision.mean, device=pixels_nchw.device).view(1, 3, 1, 1)
    std = torch.tensor(vision.std, device=pixels_nchw.device).view(1, 3, 1, 1)
    return ((pixels_nchw.float() / 255 - mean) / std).to(dtype)


def tower_features(composed: Composed, pixels_nchw: Tensor, *, tuned: bool = False) -> Tensor:
    """Return the selected features [n, tokens, width] of uint8 images, with a graph only where the tower learns."""
    tower = composed.model.model.vision_tower
    with torch.set_grad_enabled(tuned):
        pixels = normalise(pixels_nchw, composed.vision, next(tower.parameters()).dtype)
        return features(tower, pixels, composed.feature_index, composed.vision.strategy)


def hidden_states(
    composed: Composed, ids_bl: Tensor, positions_bl: Tensor, feats: Tensor | None, documents: Sequence[int] = ()
) -> Tensor:
    """Return the language model's last hidden states [b, l, d].

    documents: the lengths of the documents that share the one row, whose positions restart at 0 and which do not see
    each other. Without them a row is a document, padded on the right, where causal attention cannot look: no mask.
    """
    inner = composed.model.model
    embeds = inner.language_model.get_input_embeddings()(ids_bl)
    if feats is not None:
        projected = inner.multi_modal_projector(feats.to(_projector_dtype(inner)))
        where = (ids_bl == composed.image_id).unsqueeze(-1)
        embeds = embeds.masked_scatter(where, projected.to(embeds.dtype))
    with attention.apart(documents, ids_bl.device):
        out = inner.language_model(inputs_embeds=embeds, position_ids=positions_bl, use_cache=False)
    return cast(Tensor, out.last_hidden_state)


def _projector_dtype(inner: Any) -> torch.dtype:
    return cast(torch.dtype, inner.multi_modal_projector.linear_1.weight.dtype)


def token_losses(model: Any, hidden_nd: Tensor, targets_n: Tensor) -> Tensor:
    """Return the cross-entropy f32 [n] of each supervised position, in slices whose logits are recomputed backward."""
    rows = max(1, LOGIT_CHUNK // model.config.text_config.vocab_size)
    if hidden_nd.shape[0] <= rows:
        return _slice_losses(model, hidden_nd, targets_n)
    from torch.utils.checkpoint import checkpoint

    parts = [
        checkpoint(_slice_losses, model, hidden, targets, use_reentrant=False)
        for hidden, targets in zip(torch.split(hidden_nd, rows), torch.split(targets_n, rows), strict=True)
    ]
    return torch.cat(parts)


def _slice_losses(model: Any, hidden_nd: Tensor, targets_n: Tensor) -> Tensor:
    logits = model.lm_head(hidden_nd).float()
    cap = getattr(model.config.text_config, "final_logit_softcapping", None)
    assert cap is None, "the llava class applies no logit cap"
    return nn.functional.cross_entropy(logits, targets_n, reduction="none")
