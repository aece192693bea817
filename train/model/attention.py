"""Attention for packed rows: many documents in one row, each of which attends to itself alone.

Given documents of lengths l_1 ... l_n side by side in one row of L = sum(l_i) positions, position i may attend to
position j where both lie in the same document and j <= i (and i - j < window, where the layer has a window).
transformers expresses that by a mask over the whole row: L^2 entries, and no fast kernel takes it. Here the layers
receive the documents' edges in the mask's place, and attention costs sum(l_i^2):

    GPU, bf16 or fp16   one variable-length kernel over all documents (torch.nn.attention.varlen)
    elsewhere           one causal call of scaled_dot_product_attention for each document

Shapes: queries [1, heads, L, d]; keys and values [1, heads or fewer, L, d]; edges i32 [n + 1] = 0, l_1, l_1 + l_2, ...
A model gets this by `attn_implementation=NAME`, and its row's documents by `packed_documents(lengths)` around the call.
Without documents (rows padded on the right) it is transformers' own SDPA.
Source: variable-length attention of FlashAttention-2 (arXiv 2307.08691), under torch's name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

NAME = "documents"


@dataclass(frozen=True)
class Documents:
    """The documents of one row.

    edges: 0 and where each document ends, on the host for the calls a document; edges_n: the same, i32 [n + 1] on the
    device, for the kernel. longest: the longest document.
    learnt_s: i64, the positions whose last hidden states are used (skip_unlabelled.py); None: all.
    """

    edges: tuple[int, ...]
    edges_n: Tensor
    longest: int
    learnt_s: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, learnt_s: Tensor | None = None) -> Self:
        """Return the documents of a row that holds these lengths in this order."""
        edges = (0, *accumulate(lengths))
        return cls(edges, torch.tensor(edges, dtype=torch.int32, device=device), max(lengths, default=0), learnt_s)


_packed: ContextVar[Documents | None] = ContextVar("packed", default=None)


@contextmanager
def packed_documents(lengths: Sequence[int], device: torch.device, learnt_s: Tensor | None = None) -> Iterator[None]:
    """Within this context, a model that runs with `NAME` reads its one row as documents of these lengths.

    No lengths: rows are read as they are.
    """
    token = _packed.set(Documents.of(lengths, device, learnt_s) if lengths else None)
    try:
        yield
    finally:
        _packed.reset(token)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(**options: Any) -> Documents | Tensor | None:
    """Return the packed documents, or transformers' own mask where a row is not packed.

    A model hands its mask to each of its layers: it is the only argument that every family passes on unchanged.
    """
    from transformers.masking_utils import sdpa_mask

    found: Documents | Tensor | None = _packed.get()
    return sdpa_mask(**options) if found is None else found


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return [b, l, heads, d] for query [b, heads, l, d] and key, value with as many heads or fewer (shared ones).

    `attention_mask` decides: documents (b = 1), or a mask of transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if not isinstance(attention_mask, Documents):
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out, None
    if query.is_cuda and value.dtype in (torch.bfloat16, torch.float16) and not options.get("dropout"):
        return _varlen(query, key, value, attention_mask, sliding_window, options.get("scaling")), None
    lengths = [b - a for a, b in pairwise(attention_mask.edges)]
    parts = []
    for part in zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True):  # type: ignore[no-untyped-call]
        window = _window(part[0].shape[2], sliding_window, query.device)
        parts.append(sdpa_attention_forward(module, *part, window, **options)[0])
    return torch.cat(parts, dim=1), None


def _window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """Return the causal mask [1, 1, l, l] with a window; None where the document is no longer than the window."""
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Under autocast, rotary embeddings leave queries and keys in fp32.
    q_lhd, k_lhd, v_lhd = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    edges, longest = documents.edges_n, documents.longest
    out = varlen_attn(
        *(q_lhd, k_lhd, v_lhd, edges, edges, longest, longest),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_lhd.shape[1] != k_lhd.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]
