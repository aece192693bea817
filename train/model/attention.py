"""Attention in which each document of a packed row sees only itself, at the cost of its own squared length.

transformers tells packed documents apart by a mask over the whole row, which is quadratic in the row and loses the fast
kernels. Registered with it under `NAME`, this puts the documents' edges in the mask's place: one variable-length kernel
on a GPU in half precision (torch.nn.attention.varlen), one causal call a document elsewhere. Without documents (rows
that are padded on the right) it is transformers' own SDPA.
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
    """Where the documents of a row lie: their edges, also as i32 [n+1] on the device; and what is learnt from them.

    learnt_s: i64, the positions whose last hidden states are used (frugal.py); None: all.
    """

    edges: tuple[int, ...]
    edges_n: Tensor
    longest: int
    learnt_s: Tensor | None = None

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device, learnt_s: Tensor | None = None) -> Self:
        """Lay documents of these lengths side by side."""
        edges = (0, *accumulate(lengths))
        return cls(edges, torch.tensor(edges, dtype=torch.int32, device=device), max(lengths, default=0), learnt_s)


_packed: ContextVar[Documents | None] = ContextVar("packed", default=None)


@contextmanager
def apart(lengths: Sequence[int], device: torch.device, learnt_s: Tensor | None = None) -> Iterator[None]:
    """Let a model that runs with `NAME` read its one row as documents of these lengths; none: as it is."""
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
    """Return what a model hands to each of its layers as the mask; not every layer passes anything else on."""
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
    """Return [b, l, heads, d] for query [b, heads, l, d] and key, value with as many or fewer heads."""
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
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=device)
    behind = at[:, None] - at[None, :]
    return ((behind >= 0) & (behind < window))[None, None]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Rotary embeddings may have widened the two under autocast.
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
