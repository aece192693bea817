"""Compose `LlavaForConditionalGeneration` from a tower and a language model, choose what learns, run it thinly.

The class is transformers' own, so that the artefact needs no code of ours. The forward pass here differs in three ways
that change no result: the tower runs without a graph and only up to the feature layer, several documents may share a
row, and logits are computed only at positions that have a label.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from train import attention
from train.config import Model, Stage
from train.language import (
    add_image_token,
    fold_logits_scaling,
    image_token_id,
    load_lm,
    load_tokenizer,
    read_lm_config,
    room_for,
    shrunk,
)
from train.published import known_words
from train.quantized import quantize
from train.tower import EVA, HEADS, MULTISCALE, Vision, describe_tower, feature_layer_index, features, load_tower, trim

LOGIT_CHUNK = 1 << 25  # elements of one slice of logits: 128 MB in fp32
OWN_TOWERS = {EVA: "the EVA02-CLIP tower", MULTISCALE: "a tower behind several scales (S²)"}
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
    feature_scale: float = 1.0  # on projected features while training; an export folds it into the projector

    @property
    def image_id(self) -> int:
        """The id that stands for one image position."""
        return int(self.model.config.image_token_id)


def compose(options: Model, dtype: torch.dtype = torch.float32) -> Composed:
    """Build the model on the CPU: tower and language model in `dtype`, projector in fp32, everything frozen.

    The projector is drawn from `options.seed` as torch draws linear layers (as LLaVA does). The fingerprint is of the
    weights before anything is folded into them, which rounds otherwise in another dtype.  Raises: UsageError.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower, vision = load_tower(options, dtype)
    tokenizer = load_tokenizer(options)
    lm = load_lm(options, tokenizer, dtype)
    image_id = add_image_token(lm, tokenizer, options.image_token)
    config = _native_config(options, tower.config, lm.config, vision, image_id)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    lm.set_attn_implementation(options.attention)  # the class above has set its own on the shared configuration
    model.model.vision_tower = tower
    model.model.language_model = lm.get_decoder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        model.model.multi_modal_projector = LlavaMultiModalProjector(config)
    head = lm.get_output_embeddings()
    model.lm_head.weight = head.weight
    fingerprint = _fingerprint(model)
    fold_logits_scaling(lm)
    if getattr(head, "bias", None) is not None:
        place_head_bias(model, head.bias, options.lm_head_bias)
    index = feature_layer_index(options.feature_layer, tower.config.num_hidden_layers)
    model.requires_grad_(False).eval()
    leftover = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert not leftover, leftover
    if limits(config):
        log.warning("%s", limits(config))
    scale = math.sqrt(lm.config.hidden_size) if options.scale_features else 1.0
    return Composed(model, tokenizer, vision, options.image_token, fingerprint, index, scale)


def blueprint(options: Model) -> tuple[Any, Vision]:
    """Build the model on the meta device, from descriptions alone: no weights, and no hub for published models.

    Raises: UsageError.
    """
    from transformers import LlavaForConditionalGeneration

    options = replace(options, tower_weights="fresh", lm_weights="fresh")
    tower_config, vision = describe_tower(options)
    lm_config = read_lm_config(options)
    words = known_words(options.tokenizer or options.lm)
    if options.shrink or words is None:
        tokenizer = load_tokenizer(options)
        lm_config = shrunk(lm_config, tokenizer) if options.shrink else lm_config
        image_id = image_token_id(tokenizer, options.image_token)
    else:
        image_id = words.size
    lm_config.vocab_size = room_for(image_id, lm_config.vocab_size)
    with torch.device("meta"):
        return LlavaForConditionalGeneration(_native_config(options, tower_config, lm_config, vision, image_id)), vision


def _native_config(options: Model, tower_config: Any, lm_config: Any, vision: Vision, image_id: int) -> Any:
    from transformers import LlavaConfig

    return LlavaConfig(
        vision_config=tower_config,
        text_config=lm_config,
        image_token_index=image_id,
        image_seq_length=vision.tokens_per_image,
        vision_feature_layer=options.feature_layer,
        vision_feature_select_strategy=vision.strategy,
        tie_word_embeddings=bool(lm_config.tie_word_embeddings),
    )


def own_tower(config: Any) -> str:
    """Name the tower of a configuration where it is one of ours, else return ""."""
    return OWN_TOWERS.get(config.vision_config.model_type, "")


def limits(config: Any) -> str:
    """Say in one line what cannot be done with a model of this configuration, or "" where everything can."""
    own = own_tower(config)
    return own and (
        f"{own} is no class of transformers: export writes a folder that `python -m train generate`, `eval` and "
        "`merge` read, which is not native llava-hf (vLLM and plain transformers refuse it), and no --parts"
    )


def place_head_bias(model: Any, bias_v: Tensor, how: str) -> None:
    """Fold the bias of a language model's head into the head's weight and the norm before it, or drop it.

    The llava class has a head without bias. Behind a layer norm that is no loss: z = w n + c, where n has mean zero, so
    u z with u = 1/w is the constant u c, and W + b u/(u c) gives W z + b. First c is moved by w, which makes that
    constant about the width and so keeps the sum exact in bf16. Where the norm does not allow it (another kind, a
    weight of almost zero, a head that is the embedding too), the bias is dropped with a warning.
    """
    if not bool(bias_v.any()):
        return
    if how == "drop":
        log.info("the language model's lm_head.bias is dropped, as in Bunny (model.lm_head_bias)")
        return
    norm: Any = getattr(model.model.language_model, "final_layernorm", None)
    layered = isinstance(norm, nn.LayerNorm) and norm.bias is not None and not model.config.tie_word_embeddings
    if not layered or float(norm.weight.detach().abs().min()) < 1e-4:
        log.warning("the language model's lm_head.bias is dropped: the norm before it does not allow to fold it")
        return
    bias_v = nn.functional.pad(bias_v, (0, len(model.lm_head.weight) - len(bias_v)))  # rows of added tokens
    with torch.no_grad():
        w_d, head_vd = norm.weight.double(), model.lm_head.weight
        moved_d = norm.bias.double() + w_d
        norm.bias.copy_(moved_d)
        u_d = 1 / w_d
        # Of the values as they are stored, so that rounding the moved bias costs nothing.
        constant = float(u_d @ norm.bias.double())
        shift_d = norm.bias.double() - (moved_d - w_d)
        for rows in torch.split(torch.arange(len(head_vd)), 4096):
            part = head_vd[rows].double()
            head_vd[rows] = (part + torch.outer((bias_v[rows].double() - part @ shift_d) / constant, u_d)).to(
                head_vd.dtype
            )
    log.info("the language model's lm_head.bias is folded into its head and last norm, which changes no logit")


def fold_feature_scale(model: Any, factor: float) -> None:
    """Multiply the projector's last layer, and so the image features, by a factor."""
    last = model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)


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

        if stage.quantize:
            quantize(model)
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
        model.model.vision_tower.float().requires_grad_(True)  # its frozen ends too: they meet what it gives
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


def recompute(language_model: Any, *, reentrant: bool = False) -> None:
    """Let a prepared language model keep no activations and compute them again in the backward pass.

    transformers does so in training mode alone. A frozen model's dropout must not come with that, so only the layers
    that recompute are told, not what they hold.
    """
    language_model.activation_checkpointing_enable({"use_reentrant": reentrant})
    for module in language_model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


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
    composed: Composed,
    ids_bl: Tensor,
    positions_bl: Tensor,
    feats: Tensor | None,
    documents: Sequence[int] = (),
    learnt_s: Tensor | None = None,
) -> Tensor:
    """Return the language model's last hidden states [b, l, d].

    documents: the lengths of the documents that share the one row, whose positions restart at 0 and which do not see
    each other. Without them a row is a document, padded on the right, where causal attention cannot look: no mask.
    learnt_s: the positions of that one row whose states are used; others may then be anything (frugal.py).
    """
    embeds = embeddings(composed, ids_bl, feats)
    with attention.apart(documents, ids_bl.device, learnt_s):
        out = composed.model.model.language_model(inputs_embeds=embeds, position_ids=positions_bl, use_cache=False)
    return cast(Tensor, out.last_hidden_state)


def embeddings(composed: Composed, ids_bl: Tensor, feats: Tensor | None) -> Tensor:
    """Return what the language model reads, [b, l, d]: embedded words, and the projected features of the images."""
    inner = composed.model.model
    embeds = cast(Tensor, inner.language_model.get_input_embeddings()(ids_bl))
    if feats is None:
        return embeds
    projected = inner.multi_modal_projector(feats.to(inner.multi_modal_projector.linear_1.weight.dtype))
    where = (ids_bl == composed.image_id).unsqueeze(-1)
    return embeds.masked_scatter(where, (projected * composed.feature_scale).to(embeds.dtype))


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
