"""A vision tower, a projector and a language model made into one `LlavaForConditionalGeneration`.

    pixels [n, 3, h, w] -> tower -> features [n, tokens, width] -> projector (two linear layers, GELU between)
        -> [n, tokens, d], which replace the image tokens among the embedded words [b, l, d] -> language model -> logits

The class is transformers' own, so that the result loads without code of ours. It lacks parts that some language models
have: its head has no bias, and it does not scale logits. Such parts are folded into neighbouring weights if that
changes no logit (`place_head_bias`, `fold_scales`), and otherwise dropped with a message or refused.
Cost: the weights once, on the CPU, in the dtype asked for; the projector is drawn in fp32. Everything is frozen;
learn.py chooses what is trained, forward.py runs the model.
Sources: LLaVA-1.5 (arXiv 2310.03744) for the structure; transformers' modeling_llava.py for the class.
"""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from train.config import Model
from train.model.attention import NAME
from train.model.language import (
    add_image_token,
    fold_scales,
    image_token_id,
    in_words,
    load_lm,
    load_tokenizer,
    read_lm_config,
    room_for,
    shrunk,
    turning_point,
)
from train.model.layer import feature_layer_index
from train.model.published import known_words
from train.model.recurrent import isolate_documents
from train.model.tower import EVA, MULTISCALE, TIMM, Vision, describe_tower, load_tower
from train.model.verify import check_answers, packs, reference

OWN_TOWERS = {EVA: "the EVA02-CLIP tower", TIMM: "a network of timm"}
log = logging.getLogger("train")


@dataclass
class Composed:
    """A model in native form, with its tokenizer and the description of its tower."""

    model: Any  # LlavaForConditionalGeneration
    tokenizer: Any
    vision: Vision
    image_token: str
    fingerprint: str  # digest of the tower's and the language model's weights as loaded
    feature_index: int
    feature_scale: float = 1.0  # factor on projected features in training; an export folds it into the projector
    can_pack: bool = True  # documents in one row do not see each other

    @property
    def image_id(self) -> int:
        """The id that stands for one image position."""
        return int(self.model.config.image_token_id)

    def against_trees(self, max_length: int) -> str:
        """Say why its documents of up to `max_length` tokens cannot branch (data/message_tree.py), or ""."""
        language_model = self.model.model.language_model
        if language_model.config._attn_implementation != NAME:
            return f'only model.attention = "{NAME}" supports branches'
        kind = language_model.config.model_type
        if getattr(language_model, "has_recurrent_layers", False):
            return f"layers of {kind} carry a state along the row, which cannot branch"
        if far := turning_point(language_model.config, max_length):  # a branch's place in the row exceeds its positions
            return f"rotary angles of {kind} change at {far} tokens; --set model.max_length={far}"
        return "" if self.can_pack else f"{kind} cannot be packed, and a branch shares its row with others"


def compose(options: Model, dtype: torch.dtype = torch.float32) -> Composed:
    """Build the model on the CPU: tower and language model in `dtype`, projector in fp32, everything frozen.

    The projector is drawn from `options.seed` as torch draws linear layers (as LLaVA does). The fingerprint is taken
    before anything is folded into the weights, since folding rounds differently by dtype.  Raises: UsageError.
    """
    from transformers import LlavaForConditionalGeneration
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    tower, vision = load_tower(options, dtype)
    tokenizer = load_tokenizer(options)
    with in_words(options):
        lm = load_lm(options, tokenizer, dtype)
        image_id = add_image_token(lm, tokenizer, options.image_token)
        theirs = reference(lm, image_id)
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
        fold_scales(lm)
        lost_v = None
        if getattr(head, "bias", None) is not None and not place_head_bias(model, head.bias, options.lm_head_bias):
            lost_v = head.bias.detach()
        isolate_documents(model.model.language_model)
        can_pack = packs(model, theirs, lost_v, options.lm)
        check_answers(model, theirs, options.lm)
    index = feature_layer_index(options.feature_layer, tower.config.num_hidden_layers)
    model.requires_grad_(False).eval()
    leftover = [name for name, p in model.named_parameters() if p.device.type == "meta"]
    assert not leftover, leftover
    if limits(config):
        log.warning("%s", limits(config))
    scale = math.sqrt(lm.config.hidden_size) if options.scale_features else 1.0
    return Composed(model, tokenizer, vision, options.image_token, fingerprint, index, scale, can_pack)


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
    """Name the tower of a configuration if its class is one of ours, else return ""."""
    tower = config.vision_config
    if tower.model_type == MULTISCALE:
        return "a tower behind several scales (S²)" if tower.scales > 1 else "a tower without its register tokens"
    return OWN_TOWERS.get(tower.model_type, "")


def limits(config: Any) -> str:
    """Say in one line what cannot be done with a model of this configuration; "" if everything can."""
    own = own_tower(config)
    return own and (
        f"{own} is not a transformers class: export writes a folder that `python -m train generate`, `eval` and "
        "`merge` read; it is not native llava-hf (vLLM and plain transformers refuse it) and has no --parts"
    )


def place_head_bias(model: Any, bias_v: Tensor, how: str) -> bool:
    """Fold a head's bias b [v] into the head's weight W [v, d] and the norm before it, or drop it.

    Returns whether the bias is kept.
    The llava class has a head without bias. After a layer norm nothing is lost: the norm gives z = w n + c with n of
    mean zero. With u = 1/w elementwise, u . z = sum(n) + u . c = u . c is the same constant for every position, so
    W + b u^T / (u . c) gives W z + b. To keep that constant away from zero, c is first replaced by c + w: it is then
    about d, and the logits grow by W w, which is subtracted from b. So the sum stays exact in bf16.
    If that is impossible (no layer norm, a norm weight of almost zero, a head tied to the embedding), the bias is
    dropped with a warning.
    """
    if not bool(bias_v.any()):
        return True
    if how == "drop":
        log.info("the language model's lm_head.bias is dropped, as in Bunny (model.lm_head_bias)")
        return False
    norm: Any = getattr(model.model.language_model, "final_layernorm", None)
    layered = isinstance(norm, nn.LayerNorm) and norm.bias is not None and not model.config.tie_word_embeddings
    if not layered or float(norm.weight.detach().abs().min()) < 1e-4:
        log.warning("the language model's lm_head.bias is dropped: it cannot be folded into the norm before it")
        return False
    bias_v = nn.functional.pad(bias_v, (0, len(model.lm_head.weight) - len(bias_v)))  # rows of added tokens
    with torch.no_grad():
        w_d, head_vd = norm.weight.double(), model.lm_head.weight
        moved_d = norm.bias.double() + w_d
        norm.bias.copy_(moved_d)
        u_d = 1 / w_d
        # Computed from the stored values, so that rounding the moved bias does no harm.
        constant = float(u_d @ norm.bias.double())
        shift_d = norm.bias.double() - (moved_d - w_d)
        for rows in torch.split(torch.arange(len(head_vd)), 4096):
            part = head_vd[rows].double()
            head_vd[rows] = (part + torch.outer((bias_v[rows].double() - part @ shift_d) / constant, u_d)).to(
                head_vd.dtype
            )
    log.info("the language model's lm_head.bias is folded into its head and last norm, which changes no logit")
    return True


def fold_feature_scale(model: Any, factor: float) -> None:
    """Multiply the projector's last layer, and so the image features, by a factor."""
    last = model.model.multi_modal_projector.linear_2
    with torch.no_grad():
        last.weight.mul_(factor)
        last.bias.mul_(factor)


def _fingerprint(model: Any) -> str:
    """Digest a strided sample of each weight, rounded to bf16, so that dtype and device of loading do not matter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        if "multi_modal_projector" not in name:
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 256)].to(torch.bfloat16).float()
            digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()
