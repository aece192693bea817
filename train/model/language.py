"""The language model and its tokenizer: loaded, or drawn small and fresh for a rehearsal."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from train.config import Model
from train.data.encoder import is_token
from train.data.prompts import TEMPLATES
from train.errors import UsageError
from train.model import attention
from train.model.published import (
    Words,
    cannot_load,
    check_named,
    check_whole,
    known_words,
    load_published,
    loading,
    locate,
    read_config,
)
from train.model.quantized import whole_weights

FOLDED = "folded_logits_scaling"  # configuration key: the divisor that was folded into the last norm's weight
UNFIT = (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError)  # from a family's own code
log = logging.getLogger("train")


def read_lm_config(options: Model) -> Any:
    """Read a language model's configuration; for a checkpoint of several parts, that of the language model in it.

    Raises: UsageError, also for a kind whose head the llava class cannot express.
    """
    return _read_configs(options)[1]


def _read_configs(options: Model) -> tuple[Any, Any]:
    """Read the configurations of a checkpoint and of the language model in it, which are usually the same."""
    from transformers import AutoModelForCausalLM

    if (Path(options.lm) / "adapter_config.json").is_file():  # transformers would apply it to the weights beside it
        raise UsageError(
            f"model.lm {options.lm!r} holds a LoRA adapter; merge it into its base with PEFT (merge_and_unload), save "
            "the result to another folder and name that"
        )
    config = read_config(options.lm, "model.lm", described=_is_described(options))
    whole_weights(config, options.lm)
    inner = config.get_text_config()
    if type(inner) not in AutoModelForCausalLM._model_mapping:
        inside = f" with a {inner.model_type!r} inside" if inner is not config else ""
        raise UsageError(
            f"model.lm {options.lm!r} is a {config.model_type!r}{inside}, which has no causal language model"
        )
    for key in ("final_logit_softcapping", "logit_scale"):
        if getattr(inner, key, None) not in (None, 1, 1.0):
            raise UsageError(f"model.lm {options.lm!r} has {key}, which the llava class does not apply")
    if getattr(inner, "hidden_size_per_layer_input", None):
        raise UsageError(
            f"model.lm {options.lm!r} has a second embedding of tokens in each layer (hidden_size_per_layer_input), "
            "which image features lack; take a language model without it"
        )
    return config, inner


def _is_described(options: Model) -> bool:
    """Return whether the language model's weights are drawn, so that its configuration is enough."""
    return bool(options.shrink) or options.lm_weights == "fresh"


def rotary_switch(config: Any) -> tuple[str, int]:
    """Return the rule by which a language model changes rotary angles for long documents, and above how many tokens.

    transformers chooses the angles of a pass by the longest document in it: `longrope` has one table up to the returned
    length and one beyond; `dynamic` angles differ for each length beyond.  config: that of a language model.  Returns
    "", 0 if the angles never change.
    """
    tables = getattr(config, "rope_parameters", None) or {}
    for table in [tables] if "rope_type" in tables else tables.values():  # Gemma 3 has one for each kind of layer
        kind = str((table or {}).get("rope_type"))
        if kind == "longrope":
            return kind, int(table["original_max_position_embeddings"])
        if "dynamic" in kind:
            return kind, int(config.max_position_embeddings)
    return "", 0


def turning_point(config: Any, longest: int) -> int:
    """Return the number of tokens above which a sample shares no pass with shorter ones; 0: any may share one.

    longest: tokens of the longest sample.
    Raises: UsageError if a sample is longer and the angles are dynamic, since those also change later passes.
    """
    kind, far = rotary_switch(config)
    if not kind or far >= longest:
        return 0
    if kind == "longrope":
        log.info("samples of more than %d tokens share no pass with shorter ones (longrope)", far)
        return far
    raise UsageError(
        f"model.lm ({config.model_type}) has rotary angles that a sample of more than {far} tokens changes for "
        f"those beside and after it ({kind}); --set model.max_length={far} cuts such samples"
    )


@contextmanager
def in_words(options: Model) -> Iterator[None]:
    """Turn what the code of an unsuitable model family raises into one line.  Raises: UsageError."""
    try:
        yield
    except (*UNFIT, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        message = f"model.lm {options.lm!r} does not fit into the llava class ({reason:.200}); take another family"
        raise UsageError(message) from error


def load_lm(options: Model, tokenizer: Any, dtype: torch.dtype) -> Any:
    """Load a language model in `dtype` on the CPU, or draw a fresh or small one from `seed`.

    From a checkpoint with other parts, only the language model is kept.  Raises: UsageError.
    """
    from transformers import AutoModelForCausalLM

    attention.register()
    whole, config = _read_configs(options)
    packed = bool(getattr(whole, "quantization_config", None))
    inside = whole.model_type != config.model_type
    if options.shrink:
        config = shrunk(config, tokenizer)
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    how = {"config": config, "attn_implementation": options.attention}
    described = _is_described(options)
    try:
        if described:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.seed + 1)
                lm = AutoModelForCausalLM.from_config(**how, dtype=torch.float32)
            for parameter in lm.parameters():  # drawn alike for every dtype; rotary angles are buffers and stay fp32
                parameter.data = parameter.data.to(dtype)
        elif inside:
            lm = _take_out(options.lm, whole, config, kind, dtype)
        else:
            lm, missing = load_published(kind, options.lm, "model.lm", but=(*UNFIT, ImportError), **how, dtype=dtype)
            check_whole(missing, options.lm, "model.lm")
    except ImportError as error:
        if options.attention == attention.NAME:  # needs no other package
            raise UsageError(cannot_load(options.lm, "model.lm", error)) from None
        raise UsageError(f"model.attention = {options.attention!r} cannot be used: {error}".splitlines()[0]) from None
    except (OSError, ValueError) as error:
        raise UsageError(cannot_load(options.lm, "model.lm", error)) from None
    if packed:  # unpacked weights are bf16
        for parameter in lm.parameters():
            parameter.data = parameter.data.to(dtype)
    if hasattr(lm.config, "quantization_config"):
        del lm.config.quantization_config
    own_head = lm.get_output_embeddings().weight is not lm.get_input_embeddings().weight
    if own_head and lm.config.tie_word_embeddings and not described:
        log.warning("%s: its head is kept: it is not the embedding, though its config.json says so", options.lm)
    lm.config.tie_word_embeddings = not own_head  # if tied, an export leaves out the head
    if lm.get_decoder() is lm:  # Llama 4: its layers cannot be found, so no attention can be set
        kind = lm.config.model_type
        raise UsageError(f"model.lm {options.lm!r} ({kind}) names its layers in an unknown way; take another family")
    lm.config.architectures = [type(lm).__name__]  # other llava-hf readers build the language model from this
    return lm


def _take_out(source: str, whole: Any, config: Any, kind: Any, dtype: torch.dtype) -> Any:
    """Load a checkpoint of several parts with its own class and keep its language model, as a causal one."""
    from transformers import AutoModelForMultimodalLM

    model, missing = load_published(AutoModelForMultimodalLM, source, "model.lm", whole, dtype=dtype)
    with torch.device("meta"):
        lm = kind(config)
    setattr(lm, lm.base_model_prefix, model.get_decoder())
    lm.set_output_embeddings(model.get_output_embeddings())
    taken = {id(p) for p in lm.parameters()}
    lost = [name for name, p in model.named_parameters() if name in missing and id(p) in taken]
    check_whole(lost, source, "model.lm")
    lm.config = model.get_decoder().config
    log.info("%s: only its language model is used (%s)", source, kind.__name__)
    return lm


def fold_scales(lm: Any) -> None:
    """Move the scales that a family applies outside its layers into weights: the llava class applies none.

    Granite and MiniCPM3 divide their logits; that goes into the norm before the head, not into the head itself, which
    MiniCPM shares with its embedding. Falcon-H1 multiplies its embeddings and its logits: the first factor goes into
    the embedding, the second into the norm, less what a head tied to the embedding has already got.
    """
    if lm.config.model_type == "falcon_h1":
        words, logits = lm.config.embedding_multiplier, lm.config.lm_head_multiplier
        with torch.no_grad():
            lm.get_input_embeddings().weight.mul_(words)
            lm.get_decoder().final_layernorm.weight.mul_(logits / words if lm.config.tie_word_embeddings else logits)
        for one in (lm.config, lm.get_decoder()):
            one.embedding_multiplier = one.lm_head_multiplier = 1.0
    factor = getattr(lm.config, "logits_scaling", 1.0)
    if factor != 1.0:
        fold_into_norm(lm.get_decoder(), factor)
        if lm.config.model_type == "minicpm3":  # divides by hidden_size / dim_model_base
            lm.config.dim_model_base = lm.config.hidden_size
        else:
            lm.config.logits_scaling = 1.0
        setattr(lm.config, FOLDED, factor)


def fold_into_norm(decoder: Any, factor: float) -> None:
    """Divide the last norm's weight, and so the logits, by a factor."""
    with torch.no_grad():
        decoder.norm.weight.div_(factor)


def shrunk(config: Any, tokenizer: Any) -> Any:
    """Return the configuration of a small model of the same class, for a tokenizer made here of its size."""
    values = {**config.to_dict(), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    grouped = (config.num_key_value_heads or config.num_attention_heads) < config.num_attention_heads
    values |= {"num_attention_heads": 2, "num_key_value_heads": 1 if grouped else 2}
    if "head_dim" in values:
        values["head_dim"] = 16  # wide enough for any published partial rotary factor
    for name in ("layer_types", "rope_scaling"):
        values.pop(name, None)
    if is_tiny(tokenizer):
        values["vocab_size"] = len(tokenizer)
        for kind in ("bos", "eos", "pad"):
            values[f"{kind}_token_id"] = getattr(tokenizer, f"{kind}_token_id")
    return type(config).from_dict(values)


def load_tokenizer(options: Model) -> Any:
    """Load a tokenizer without running code of its own, with a pad token; for a rehearsal, a small one.

    Raises: UsageError.
    """
    from transformers import AutoTokenizer

    source = options.tokenizer or options.lm
    check_named(source, "model.lm")
    words = known_words(source) if options.shrink else None
    try:
        # A rehearsal does not ask the hub: it takes what is in a local folder or in the cache.
        here = {} if words is None else {"local_files_only": True}
        with loading(source, "model.tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(**locate(source), trust_remote_code=False, **here)
    except UsageError:
        if words is None:
            raise
        log.info("the tokenizer of %s is not available: this rehearsal uses bytes as tokens", source)
        return tiny_tokenizer(words, options.image_token)
    if not tokenizer.is_fast:
        raise UsageError(f"the tokenizer of {source!r} has no fast form (tokenizer.json), which building labels needs")
    if tokenizer.pad_token is None:  # only generation pads by id; training uses lengths, so eos is safe
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


CHATML = (
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(words: Words, image_token: str) -> Any:
    """Make a byte tokenizer that begins and ends texts as the published one does, and knows every template's tokens.

    ChatML stands in for the published one's own chat template.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", *([words.bos] if words.bos else []), words.eos, image_token, "<|im_start|>", "<|im_end|>"]
    special = list(dict.fromkeys([*special, *(t for template in TEMPLATES.values() for t in template.special_tokens)]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate([*special, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    if words.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{words.bos} $A", special_tokens=[(words.bos, special.index(words.bos))]
        )
    names = {"unk_token": "<unk>", "eos_token": words.eos, "pad_token": "<unk>"}
    if words.bos:
        names["bos_token"] = words.bos
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        made_for_rehearsal=True,
        chat_template=CHATML,
        **names,
    )


def is_tiny(tokenizer: Any) -> bool:
    """Whether a tokenizer was made by `tiny_tokenizer`."""
    return bool(tokenizer.init_kwargs.get("made_for_rehearsal", False))


def room_for(token_id: int, rows: int) -> int:
    """Return how many rows an embedding of `rows` needs to hold a token; a multiple of 64 stays a multiple of 64."""
    needed = max(rows, token_id + 1)
    return needed if rows % 64 else -(-needed // 64) * 64


def image_token_id(tokenizer: Any, token: str) -> int:
    """Return the id of the image token, which is added to the tokenizer if it is not there.

    Raises: UsageError for a token that already means something else.
    """
    from tokenizers import AddedToken

    if token in (tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token):
        raise UsageError(f"model.image_token = {token!r} already means something else in the tokenizer; name another")
    if not is_token(tokenizer, token):
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, normalized=False, special=True)]})
    return int(tokenizer.convert_tokens_to_ids(token))


def add_image_token(lm: Any, tokenizer: Any, token: str) -> int:
    """Return the id of the image token: one the tokenizer has, a spare row of the embedding, or else a new row.

    New rows start at the mean of the others: with a row of 0 in the head, the new token would have logit 0 and compete
    with the others. The mean is taken in bf16, so that it is the same for any dtype of loading.

    Raises: UsageError for a tokenizer of a larger model, with tokens that have no row here.
    """
    known = image_token_id(tokenizer, token)
    rows = lm.get_input_embeddings().num_embeddings
    added = tokenizer.added_tokens_decoder  # added tokens never come from text; Gemma 3 has one without a row
    if more := [word for word, i in tokenizer.get_vocab().items() if i >= rows and i not in added]:
        raise UsageError(
            f"the tokenizer has {len(more)} tokens beyond the {rows} rows of the language model's embedding, among "
            f"them {more[0]!r}: it belongs to another model; name the right one with model.tokenizer"
        )
    if room_for(known, rows) > rows:
        log.info("the language model has no spare row for %s: its embedding of %d rows grows", token, rows)
        lm.resize_token_embeddings(room_for(known, rows), mean_resizing=False)
        with torch.no_grad():  # new rows that are drawn would differ by dtype and by earlier draws
            for table in (lm.get_input_embeddings(), lm.get_output_embeddings()):
                parts = torch.split(table.weight[:rows], 4096)
                table.weight[rows:] = sum(part.bfloat16().double().sum(0) for part in parts) / rows
    return known
