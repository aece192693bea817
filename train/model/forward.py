"""The forward pass: pixels to features to the language model's states, and the loss at the labels only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from train.model import attention
from train.model.compose import Composed
from train.model.layer import features
from train.model.recurrent import for_recurrent
from train.model.tower import Vision

LOGIT_CHUNK = 1 << 25  # elements of one slice of logits: 128 MB in fp32


def normalise(pixels_nchw: Tensor, vision: Vision, dtype: torch.dtype) -> Tensor:
    """Scale uint8 pixels [n, 3, h, w] as the exported image processor does."""
    colours = (attention.upload(c, torch.float32, pixels_nchw.device) for c in (vision.mean, vision.std))
    mean, std = (c.view(1, 3, 1, 1) for c in colours)
    return ((pixels_nchw.float() / 255 - mean) / std).to(dtype)


def tower_features(composed: Composed, pixels_nchw: Tensor, *, tuned: bool = False) -> Tensor:
    """Return the selected features [n, tokens, width] of uint8 images, with a graph only if the tower is trained."""
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
    shown_p: Tensor | None = None,
    zero: Tensor | float = 0.0,
    trees: Sequence[Sequence[int]] = (),
) -> Tensor:
    """Return the language model's last hidden states [b, l, d].

    documents: the lengths of the documents that share the one row, whose positions restart at 0 and which do not see
    each other. Without them each row is a document, padded on the right, which causal attention never sees: no mask.
    learnt_s: the positions of that one row whose states are used; the others are then undefined (skip_unlabelled.py).
    shown_p: i64, positions of image tokens in the flattened rows; None: they are looked up, which waits for the device.
    trees: the lengths of trunk and branches of each document, () if it is not a tree (data/message_tree.py).
    zero: a 0 with a graph, so that every layer has a backward pass (sharding.zero_for_unused).
    """
    embeds = embeddings(composed, ids_bl, feats, shown_p)
    if isinstance(zero, Tensor):
        embeds = embeds + zero.to(embeds.dtype)
    language_model = composed.model.model.language_model
    with attention.packed_documents(documents, ids_bl.device, learnt_s, trees) as packed:
        more = {**attention.nothing_padded(language_model, embeds), **for_recurrent(language_model, packed)}
        out = language_model(inputs_embeds=embeds, position_ids=positions_bl, use_cache=False, **more)
    return cast(Tensor, out.last_hidden_state)


def embeddings(composed: Composed, ids_bl: Tensor, feats: Tensor | None, shown_p: Tensor | None = None) -> Tensor:
    """Return what the language model reads, [b, l, d]: embedded words, and the projected features of the images."""
    inner = composed.model.model
    embeds = cast(Tensor, inner.language_model.get_input_embeddings()(ids_bl))
    if feats is None:
        return embeds
    if shown_p is None:
        shown_p = (ids_bl.flatten() == composed.image_id).nonzero()[:, 0]
    projected = inner.multi_modal_projector(feats.to(inner.multi_modal_projector.linear_1.weight.dtype))
    shown_pd = (projected * composed.feature_scale).to(embeds.dtype).flatten(0, -2)
    return embeds.flatten(0, 1).index_copy(0, shown_p, shown_pd).view_as(embeds)


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
