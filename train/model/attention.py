"""Attention for packed rows: many documents in one row, each of which attends only to itself.

Given documents of lengths l_1 ... l_n side by side in one row of L = sum(l_i) positions, position i may attend to
position j if both lie in the same document and j <= i (and i - j < window, if the layer has a window).
transformers expresses that by a mask over the whole row: L^2 entries, and no fast kernel accepts it. Here the layers
receive the documents' edges instead of a mask, and attention costs sum(l_i^2):

    GPU, bf16 or fp16   one variable-length kernel over all documents (torch.nn.attention.varlen)
    elsewhere           one causal call of scaled_dot_product_attention for each document
    caps and sinks      the explicit formula for each document, as no torch kernel has them: sum(l_i^2) memory, too
    CPU, half, short    the explicit formula, too, in blocks of queries: torch's CPU kernel takes 1.4 to 1.9 times as
                        long forward and backward (200 to 1,024 positions, 9 heads of 64 or 32 of 80, bf16, torch 2.15,
                        one core with avx512_bf16)

Shapes: queries [1, heads, L, d]; keys and values [1, heads or fewer, L, d]; edges i32 [n + 1] = 0, l_1, l_1 + l_2, ...
A model selects this with `attn_implementation=NAME`; `packed_documents(lengths)` around a call gives it the documents
of its row. Without documents (rows padded on the right) it is transformers' own SDPA.

A document may be a tree (data/message_tree.py): trunk and branches side by side, each branch seeing the trunk and
itself. For the kernel, each branch's keys are the trunk's and then its own, and its queries are aligned with their end;
elsewhere a mask [l_i, l_i] says who sees what.
Source: variable-length attention of FlashAttention-2 (arXiv 2307.08691), in torch's implementation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, Self

import torch
from torch import Tensor

from train.data.message_tree import positions
from train.errors import UsageError

NAME = "documents"
HALF = (torch.bfloat16, torch.float16)
FLASH = (8, 0)  # Ampere: FlashAttention refuses older GPUs
SHORT = 1024  # up to here a CPU uses the formula in half precision: it keeps up to 1 MB of attention weights per head
BLOCK = 256  # queries per product of the formula; keys after the last of them are not needed
# Options passed to attention functions that do not change the result here; any other that is set is refused.
_HARMLESS = {"is_causal", "position_ids", "documents", "use_cache", "output_attentions", "output_hidden_states"}
_HARMLESS |= {"return_dict", "output_router_logits", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
_OTHERWISE = "use transformers' own attention: --set model.attention=eager"


@dataclass(frozen=True)
class Spans:
    """Documents, trunks and branches, each with the keys that it may see.

    keys_at: i64, the positions of all keys; queries_n, keys_n: i32 [n + 1], where the spans end in queries and keys.
    """

    keys_at: Tensor
    queries_n: Tensor
    keys_n: Tensor
    most_queries: int
    most_keys: int


@dataclass(eq=False)  # not frozen: torch 2.9 looks into frozen ones and recompiles for each number of edges
class Documents:
    """The documents of one row.

    edges: 0 and where each document ends, on the host, for one call per document; edges_n: the same, i32 [n + 1] on the
    device, for the kernel. longest: length of the longest document.
    trees: per document, the lengths of trunk and branches, () if it is not a tree; empty if no document is one.
    learnt_s: i64, the positions whose last hidden states are used (skip_unlabelled.py); None: all.
    """

    edges: tuple[int, ...]
    edges_n: Tensor
    longest: int
    learnt_s: Tensor | None = None
    window: int | None = None
    trees: Sequence[Sequence[int]] = ()
    masks: dict[tuple[int, int | None], Tensor | None] = field(default_factory=dict)  # see `seen`

    @classmethod
    def of(
        cls,
        lengths: Sequence[int],
        device: torch.device,
        learnt_s: Tensor | None = None,
        trees: Sequence[Sequence[int]] = (),
    ) -> Self:
        """Return the documents of a row that holds these lengths in this order, each with its tree or ()."""
        edges = (0, *accumulate(lengths))
        edges_n, longest = upload(edges, torch.int32, device), max(lengths, default=0)
        return cls(edges, edges_n, longest, learnt_s, trees=trees if any(trees) else ())

    def seen(self, number: int, window: int | None) -> Tensor | None:
        """Return what each position of a document sees, as `_seen` does; computed once for all layers."""
        if (number, window) not in self.masks:
            length = self.edges[number + 1] - self.edges[number]
            tree = self.trees[number] if self.trees else ()
            self.masks[number, window] = _seen(length, tree, window, self.edges_n.device)
        return self.masks[number, window]

    @cached_property
    def spans(self) -> Spans:
        """What the kernel reads instead of the documents if there are trees."""
        queries, keys, keys_at = [0], [0], list[int]()
        for (start, end), tree in zip(pairwise(self.edges), self.trees, strict=True):
            trunk, *branches = tree or (end - start,)
            for number, length in enumerate((trunk, *branches)):
                stop = queries[-1] + length
                keys_at += [*range(start, start + trunk if number else start), *range(queries[-1], stop)]
                queries.append(stop)
                keys.append(len(keys_at))
        device = self.edges_n.device
        return Spans(
            keys_at=upload(keys_at, torch.int64, device),
            queries_n=upload(queries, torch.int32, device),
            keys_n=upload(keys, torch.int32, device),
            most_queries=max(b - a for a, b in pairwise(queries)),
            most_keys=max(b - a for a, b in pairwise(keys)),
        )


def upload(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor on a device, without waiting for its queued work."""
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device, through pinned memory: a copy from other memory would wait for the device."""
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# The documents of the one row; (): rows of one document each, padded on the right; None: leave it to transformers.
_packed: ContextVar[Documents | tuple[()] | None] = ContextVar("packed", default=None)


@contextmanager
def packed_documents(
    lengths: Sequence[int],
    device: torch.device,
    learnt_s: Tensor | None = None,
    trees: Sequence[Sequence[int]] = (),
) -> Iterator[Documents | None]:
    """Within this context, a model that runs with `NAME` reads its one row as documents of these lengths.

    Yields the documents; None without lengths: each row is then one document, which must not be padded on the left.
    """
    documents = Documents.of(lengths, device, learnt_s, trees) if lengths else None
    token = _packed.set(documents or ())
    try:
        yield documents
    finally:
        _packed.reset(token)


def register() -> None:
    """Make `attn_implementation=NAME` known to transformers."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def mask(local_size: int | None = None, **options: Any) -> Documents | Tensor | None:
    """Return the packed documents, or transformers' own mask if rows are not packed.

    The mask carries the documents because it is the only argument that every model family passes unchanged to its
    layers.  local_size: how far back a layer with a window looks.  Raises: UsageError for attention in fixed chunks.
    """
    from transformers.masking_utils import sdpa_mask

    found = _packed.get()
    if not isinstance(found, Documents):
        if found is not None:  # causal attention never sees padding on the right
            options["attention_mask"] = None
        out: Tensor | None = sdpa_mask(local_size=local_size, **options)
        return out
    if local_size is not None and getattr(options.get("config"), "attention_chunk_size", None) == local_size:
        raise UsageError(f"{_kind(options['config'])} attends in chunks of {local_size}; {_OTHERWISE}")
    return replace(found, window=local_size)


def nothing_padded(language_model: Any, embeds_bld: Tensor) -> dict[str, Tensor]:
    """Return the further arguments with which a language model builds its masks without reading the positions.

    transformers would read from the device whether positions restart, and wait for it. A mask of ones says that nothing
    is padded, and `mask` does not read it. Recurrent layers (recurrent.py) would, so their models get none.
    """
    ours = language_model.config._attn_implementation == NAME
    if _packed.get() is None or not ours or getattr(language_model, "has_recurrent_layers", False):
        return {}
    return {"attention_mask": torch.ones(embeds_bld.shape[:2], dtype=torch.bool, device=embeds_bld.device)}


def avoid_cudnn() -> None:
    """Let attention on a GPU choose among flash, memory-efficient and plain kernels, in the whole process.

    cuDNN's, which torch prefers on Hopper, builds a graph for every new shape, and each packed row has one: tens of
    milliseconds per pass, and the cache only grows (pytorch/pytorch, aten/src/ATen/native/cudnn/MHA.cpp). A context
    manager around the model would not do: recomputed layers run in the backward pass, outside of it.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Documents | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return [b, l, heads, d] for query [b, heads, l, d] and key, value with as many heads or fewer (shared ones).

    attention_mask: documents (b = 1), or a mask of transformers.  softcap: bounds scores to ±softcap, by tanh.
    s_aux: f [heads], attention sinks: one extra score per head, which takes part in the softmax but adds no value.
    Raises: UsageError for an option that would change the result but is not supported here.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    documents = attention_mask if isinstance(attention_mask, Documents) else None
    unknown = sorted(name for name, value in options.items() if value is not None and name not in _HARMLESS)
    if documents is not None and options.get("is_causal") is False:
        unknown.append("is_causal = False")
    if unknown:
        raise UsageError(f"attention of {_kind(module)} takes {', '.join(unknown)}, unsupported here; {_OTHERWISE}")
    formula: Any = partial(_explicit, dropout=dropout, scaling=scaling, softcap=softcap, sinks_h=s_aux)
    one = formula
    if softcap is None and s_aux is None:
        one = partial(sdpa_attention_forward, module, dropout=dropout, scaling=scaling, **options)
    if documents is None:
        return one(query, key, value, attention_mask)[0], None
    window = documents.window if sliding_window is None else sliding_window
    if softcap is None and s_aux is None and not dropout and reason_against_varlen(query, value) is None:
        return _varlen(query, key, value, documents, window, scaling), None
    lengths = [b - a for a, b in pairwise(documents.edges)]
    parts = []
    half_on_cpu = _half_on_cpu(query.device, value.dtype)
    split = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), strict=True)  # type: ignore[no-untyped-call]
    for number, part in enumerate(split):
        use = formula if half_on_cpu and lengths[number] <= SHORT else one
        parts.append(use(*part, documents.seen(number, window))[0])
    return torch.cat(parts, dim=1), None


def _half_on_cpu(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and dtype in HALF


def _kind(thing: Any) -> str:
    return type(thing).__name__.removesuffix("Config").removesuffix("Attention")


def _seen(length: int, tree: Sequence[int], window: int | None, device: torch.device) -> Tensor | None:
    """Return what each position of a document sees, bool [1, 1, l, l]; None if that is everything up to itself."""
    if not tree and (window is None or length <= window):
        return None
    numbers = [n for n, size in enumerate(tree or (length,)) for _ in range(size)]  # branch of each position; 0: trunk
    at, branch = (upload(each, torch.int64, device) for each in (positions(length, tree).tolist(), numbers))
    behind = at[:, None] - at[None, :]
    seen = (behind >= 0) & ((branch[None, :] == 0) | (branch[:, None] == branch[None, :]))
    return (seen if window is None else seen & (behind < window))[None, None]


def _explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    dropout: float,
    scaling: float | None,
    softcap: float | None,
    sinks_h: Tensor | None,
) -> tuple[Tensor, None]:
    """Compute attention by its formula, with scores [b, heads, l, l] in memory, where no torch kernel does it.

    scores = softcap tanh(q k^T scaling / softcap); out = softmax([scores, sinks]) [v, 0].
    mask: bool, true where a position may be seen; or a float that is added to the scores; None: causal.
    """
    b, heads, rows, d = query.shape
    shared, columns = key.shape[1:3]
    if mask is None and rows > BLOCK:
        seen = range(columns - rows, columns, BLOCK)  # keys before the first query of each block
        ends = [min(columns, first + BLOCK) for first in seen]
        block = partial(_explicit, mask=None, dropout=dropout, scaling=scaling, softcap=softcap, sinks_h=sinks_h)
        queries: tuple[Tensor, ...] = query.split(BLOCK, 2)  # type: ignore[no-untyped-call]
        pairs = zip(queries, ends, strict=True)
        return torch.cat([block(part, key[:, :, :end], value[:, :, :end])[0] for part, end in pairs], 1), None
    # Query heads that share a key head are stacked along the rows, so that keys and values are not repeated.
    query = (query * (d**-0.5 if scaling is None else scaling)).reshape(b, shared, -1, d).to(key.dtype)
    scores = (query @ key.transpose(2, 3)).view(b, heads, rows, columns)
    if softcap is not None or sinks_h is not None:
        scores = scores.float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril(columns - rows)
    if mask.dtype == torch.bool:  # added in place, so that the backward pass fills nothing
        scores = scores.add_(scores.new_zeros(mask.shape).masked_fill_(~mask, -math.inf))
    else:
        scores = scores + mask
    if sinks_h is not None:
        sinks = sinks_h.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    shares = scores.softmax(-1)[..., :columns].to(value.dtype)
    shares = torch.nn.functional.dropout(shares, dropout) if dropout else shares
    out = shares.reshape(b, shared, -1, columns) @ value
    return out.view(b, heads, rows, value.shape[-1]).transpose(1, 2).contiguous(), None


@cache
def _varlen_lacks() -> str:
    """Return why torch's variable-length kernel cannot be used at all, or ""."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"torch {torch.__version__} has no varlen_attn"
    lacks = {"window_size", "enable_gqa", "scale"} - signature(varlen_attn).parameters.keys()
    return f"varlen_attn of torch {torch.__version__} lacks {', '.join(sorted(lacks))}" if lacks else ""


@cache
def _too_old(device: torch.device) -> str:
    """Return why a GPU is too old to run the kernel, or ""; under FakeTensorMode it never is."""
    if not torch.cuda.is_available() or (found := torch.cuda.get_device_capability(device)) >= FLASH:
        return ""
    return f"a GPU of compute capability {found[0]}.{found[1]}, older than the kernel's {FLASH[0]}.{FLASH[1]}"


def reason_against_varlen(query: Tensor, value: Tensor) -> str | None:
    """Return why the variable-length kernel cannot take tensors like these, or None if it can."""
    if not query.is_cuda:
        return "no GPU"
    if value.dtype not in HALF:
        return f"{value.dtype} is not half precision"
    if query.shape[-1] != value.shape[-1] or query.shape[-1] > 256 or query.shape[-1] % 8:
        return f"heads of {query.shape[-1]} and {value.shape[-1]} channels"
    return _varlen_lacks() or _too_old(query.device) or None


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """Say how packed documents attend on a device, and why."""
    probe = torch.empty(1, 1, 1, 8, device=device, dtype=dtype)
    against = reason_against_varlen(probe, probe)
    if against is None:
        return "packed documents attend by one variable-length kernel (torch.nn.attention.varlen)"
    told = f"packed documents attend by one SDPA call per document ({against})"
    return f"{told}, those of up to {SHORT} positions by the formula" if _half_on_cpu(device, dtype) else told


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # Under autocast, rotary embeddings leave queries and keys in fp32.
    q_lhd, k_lhd, v_lhd = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))
    if documents.trees:
        spans = documents.spans
        k_lhd, v_lhd = (x.index_select(0, spans.keys_at) for x in (k_lhd, v_lhd))
        edges = spans.queries_n, spans.keys_n, spans.most_queries, spans.most_keys
    else:
        edges = documents.edges_n, documents.edges_n, documents.longest, documents.longest
    out = varlen_attn(
        *(q_lhd, k_lhd, v_lhd, *edges),
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=q_lhd.shape[1] != k_lhd.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None]
