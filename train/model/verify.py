"""Compare a composed model with the language model itself: it must give the same logits, alone and packed.

Two short texts run through the causal language model as transformers publishes it, with its plainest attention, before
anything is folded or put into the llava class. Then both run through the composed model, side by side in a packed row.
Equal logits show at once that head, scales, attention and the isolation of documents are right; a third document, of
positions that are not tokens, shows that image features are accepted. If logits differ, the texts run one by one: if
they are equal then, the family is trained without packing; if not, it is refused, naming the difference. Finally the
composed model generates an answer token by token with its cache, as readers of an export do: some families keep a cache
of their own, which the class does not pass on, or cache wrongly.

    difference of a position = |ours - theirs| / |theirs|, over its logits [v]

In fp32 the largest difference counts; in half precision the median over a text's positions, as rounding may send a
token to another expert. Cost: seven or eight passes of a few tokens on the CPU; nothing random is drawn.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from train.errors import UsageError
from train.model import attention
from train.model.recurrent import for_recurrent

LENGTHS = (5, 9)  # tokens of the two texts
ANSWER = 4  # tokens that are generated one by one
log = logging.getLogger("train")


@dataclass(frozen=True)
class Reference:
    """Two texts, i64 ids each, and the logits [l, v] that the causal language model gives for each."""

    texts: list[Tensor]
    logits: list[Tensor]


def reference(lm: Any, skip: int) -> Reference:
    """Run a causal language model, before it is composed, on two texts without the token `skip`."""
    rows = lm.get_input_embeddings().num_embeddings
    ids = [i for i in range(3, rows, max(1, (rows - 3) // (sum(LENGTHS) + 1))) if i != skip]
    texts = [torch.tensor((ids * sum(LENGTHS))[sum(LENGTHS[:n]) :][:length]) for n, length in enumerate(LENGTHS)]
    lm.eval()
    lm.set_attn_implementation("eager")
    with torch.no_grad():
        return Reference(texts, [lm(input_ids=text[None], use_cache=False).logits[0].float() for text in texts])


def packs(model: Any, theirs: Reference, bias_v: Tensor | None, lm: str) -> bool:
    """Compare a composed model's logits; return whether documents can share a row.

    bias_v: the head's bias, if it was dropped.  Raises: UsageError if a text alone gives other logits.
    """
    expected = theirs.logits if bias_v is None else [part - bias_v.float() for part in theirs.logits]
    dtype = next(model.model.language_model.parameters()).dtype
    limit = _limit(dtype)
    together = _logits(model, theirs.texts)
    if (apart := _difference(together, expected, dtype)) <= limit:
        return True
    alone = [part for text in theirs.texts for part in _logits(model, [text])]
    difference = _difference(alone, expected, dtype)
    kind = model.config.text_config.model_type
    if not difference <= limit:  # also true for NaN
        raise UsageError(
            f"model.lm {lm!r} ({kind}): in the llava class its logits differ from its own by {difference:.2g} of their "
            f"size, where rounding explains {limit:.1g}: the class lacks something of this family; take another"
        )
    log.warning(
        "%s: documents in a row would see each other (logits differ by %.2g of their size); it trains without packing",
        *(kind, apart),
    )
    return False


def check_answers(model: Any, theirs: Reference, lm: str) -> None:
    """Compare the logits of an answer, generated token by token, with those of the same tokens in one pass.

    Raises: UsageError if they differ; or what the family's own code raises if the llava class cannot run it.
    """
    asked = theirs.texts[0]
    how = {"max_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    told = model.generate(asked[None], **how, return_dict_in_generate=True, output_logits=True)
    at_once = _logits(model, [told.sequences[0]])[0][len(asked) - 1 : -1]
    dtype = next(model.model.language_model.parameters()).dtype
    one_by_one = torch.cat(told.logits).float()
    if not (difference := _difference([one_by_one], [at_once], dtype)) <= _limit(dtype):
        raise UsageError(
            f"model.lm {lm!r} ({model.config.text_config.model_type}): generating token by token, the llava class "
            f"gives logits that differ by {difference:.2g} of their size from those of one pass over the same tokens: "
            "an export could not answer; take another"
        )


def _limit(dtype: torch.dtype) -> float:
    return max(1e-4, 8 * torch.finfo(dtype).eps)


def _logits(model: Any, texts: Sequence[Tensor]) -> list[Tensor]:
    """Return the logits [l, v] of texts; several share a row, followed by two positions that are not tokens."""
    language_model = model.model.language_model
    lengths = [len(text) for text in texts]
    with torch.no_grad():
        embeds = language_model.get_input_embeddings()(torch.cat(list(texts))[None])
    if len(texts) > 1:
        embeds = torch.cat([embeds, embeds[:, :2].mean(1, keepdim=True).expand(-1, 2, -1)], 1)
        lengths.append(2)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    packed = lengths if len(texts) > 1 else ()
    with torch.no_grad(), attention.packed_documents(packed, embeds.device) as documents:
        more = {**attention.nothing_padded(language_model, embeds), **for_recurrent(language_model, documents)}
        out = language_model(inputs_embeds=embeds, position_ids=positions, use_cache=False, **more)
        logits: Tensor = model.lm_head(out.last_hidden_state)[0].float()
    return list(torch.split(logits, lengths))[: len(texts)]


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> float:
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        per_position = (a - b).norm(dim=-1) / b.norm(dim=-1).clamp_min(1e-30)
        value = float(per_position.max() if dtype == torch.float32 else per_position.median())
        worst = value if value != value else max(worst, value)
    return worst
