"""Compute torch's CUDA operators by the processor's, where runtime.c has put CUDA tensors into its memory.

Every operator with a kernel for CUDA is given another one, in the whole process: it takes the tensors' memory for
tensors of the processor, has the processor's operator compute, and copies what is new back. Views and allocations stay
torch's own, and so do its allocator, streams, pinned memory and autograd. So devices are checked as on a GPU: operands
on two devices, `numpy()` of a CUDA tensor, a CPU generator for CUDA and the like fail. What kernels do is not: their
rounding, their order, their speed, their limits.

Attention and a few other operators have no form for the processor; they are written out below.
"""

import contextlib
import ctypes
import math
import os
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
HALF = torch.float16, torch.bfloat16
# They touch no element: torch's own do for memory that is the processor's.
KEPT = "empty.memory_format empty_strided as_strided view view.dtype _reshape_alias unfold alias resize_ record_stream "
KEPT += "view_as_real view_as_complex _pin_memory is_pinned _conj _neg_view _local_scalar_dense _efficientzerotensor "
KEPT += "set_ set_.source_Storage set_.source_Storage_storage_offset set_.source_Tensor is_set_to set_data"
# Of these CUDA takes tensors of the processor, too.
MIXED = "copy_ _to_copy index.Tensor index.Tensor_out index_put_ index_put _index_put_impl_ _unsafe_index.Tensor"
RANDOM = "native_dropout bernoulli normal uniform random randperm multinomial exponential"
WRITTEN: dict[str, Callable[..., Any]] = {}


def on_cuda(value: Any) -> bool:
    """Say whether a value is a tensor on a GPU."""
    return isinstance(value, Tensor) and value.device.type == "cuda"


def lower(tensor: Any) -> Any:
    """Return the same memory as a tensor of the processor; anything but a CUDA tensor as it is."""
    if not on_cuda(tensor):
        return tensor
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    storage, size = tensor.untyped_storage(), tensor.element_size()
    raw = torch.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), dtype=torch.uint8)
    plain = raw[: len(raw) // size * size].view(tensor.dtype)
    return plain.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def lift(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the processor to a GPU."""
    out = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
    lower(out).copy_(tensor)
    return out


def here() -> torch.device:
    """Return the current GPU."""
    return torch.device("cuda", torch.cuda.current_device())


def generator_of(given: torch.Generator | None = None) -> torch.Generator:
    """Return a generator of the processor for a GPU's, which goes on: of equal states come equal numbers."""
    given = given or torch.cuda.default_generators[torch.cuda.current_device()]
    if given.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    state = given.initial_seed() * 1_000_003 + given.get_offset()
    given.set_offset(given.get_offset() + 4)
    return torch.Generator().manual_seed(state % 2**63)


@contextlib.contextmanager
def drawing_like_cuda(name: str, values: list[Any]) -> Any:
    """Within it the processor's own generator stands for a GPU's, for operators that draw and are given none."""
    if name.partition(".")[0].rstrip("_") not in RANDOM.split() or any(isinstance(v, torch.Generator) for v in values):
        yield
        return
    before = torch.get_rng_state()
    torch.set_rng_state(generator_of().get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


def device_of(name: str, values: list[Any]) -> torch.device:
    """Return the GPU that an operator's results lie on.  Raises: RuntimeError for operands on several devices."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    homes = {value.device for value in tensors if on_cuda(value)}
    strays = {value.device for value in tensors if not on_cuda(value) and value.dim()}
    if name not in MIXED.split() and len(homes | strays) > 1:
        raise RuntimeError(
            f"{name}: Expected all tensors to be on the same device, not {sorted(map(str, homes | strays))}"
        )
    asked = [value for value in values if isinstance(value, torch.device) and value.type == "cuda"]
    home = next(iter([*asked, *homes]), here())
    return home if home.index is not None else here()


def compute(operator: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Have the processor's operator compute what CUDA's would."""
    values, form = tree_flatten((args, kwargs))
    home, lowered = device_of(name, values), []
    for value in values:
        if isinstance(value, torch.Generator):
            value = generator_of(value)
        lowered.append(torch.device("cpu") if isinstance(value, torch.device) else lower(value))
    args, named = tree_unflatten(lowered, form)
    pairs = [(new, old) for new, old in zip(lowered, values, strict=True) if on_cuda(old)]
    written = {argument.name for argument in operator._schema.arguments if argument.kwarg_only and argument.is_out}
    outs = {key: kwargs[key] for key in written if on_cuda(kwargs.get(key))}
    named |= {key: torch.empty(0, dtype=old.dtype) for key, old in outs.items()}  # it gives them their size
    with drawing_like_cuda(name, values):
        found = _called(operator, args, named)
    for key, old in outs.items():
        old.resize_(named[key].shape)
        lower(old).copy_(named[key])
        pairs.append((named[key], old))

    def raised(value: Any) -> Any:
        same = [old for new, old in pairs if new is value]
        return same[0] if same else lift(value, home) if isinstance(value, Tensor) else value

    return tree_map(raised, found)


def _called(operator: Any, args: Any, named: Any) -> Any:
    """Call an operator; numbers that stand for tensors there are taken by its other overloads, or made tensors."""
    kinds = [str(argument.type) for argument in operator._schema.arguments]
    numbers = [
        n for n, (kind, value) in enumerate(zip(kinds, args, strict=False)) if kind == "Tensor" and _plain(value)
    ]
    if not numbers:
        return operator(*args, **named)
    try:
        return operator.overloadpacket(*args, **named)
    except RuntimeError:
        dtype = next((value.dtype for value in args if isinstance(value, Tensor)), None)
        args = [torch.tensor(v, dtype=dtype) if n in numbers else v for n, v in enumerate(args)]
        return operator(*args, **named)


def _plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | complex)


def instead(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what stands for an operator that the processor lacks, or does otherwise."""

    def note(function: Callable[..., Any]) -> Callable[..., Any]:
        WRITTEN[name] = function
        return function

    return note


@instead("copy_")
def copy(self: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy within or between devices."""
    lower(self).copy_(lower(source))
    return self


@instead("_int_mm")
def int_mm(a: Tensor, b: Tensor) -> Any:
    """Multiply bytes, of the shapes that cuBLAS takes."""
    if a.shape[0] <= 16 or a.shape[1] % 8 or b.shape[1] % 8:
        raise RuntimeError(f"_int_mm: {tuple(a.shape)} and {tuple(b.shape)} are no sizes for cuBLAS")
    return compute(aten._int_mm.default, "_int_mm", (a, b), {})


@instead("convolution")
def convolution(*args: Any) -> Any:
    """Convolve; torch would choose among kernels of cuDNN."""
    return compute(aten.convolution.default, "convolution", args, {})


@instead("convolution_backward")
def convolution_backward(*args: Any) -> Any:
    """Return the gradients of `convolution`."""
    return compute(aten.convolution_backward.default, "convolution_backward", args, {})


@instead("_fused_rms_norm_backward")
def rms_norm_backward(grad: Tensor, x: Tensor, shape: list[int], rstd: Tensor, weight: Any, mask: list[bool]) -> Any:
    """Gradients of y = x r w, r = 1 / sqrt(mean(x^2) + eps), over the last dimensions."""
    g, x_f, r, w = lower(grad).float(), lower(x).float(), lower(rstd).float(), lower(weight)
    inner = tuple(range(x.dim() - len(shape), x.dim()))
    r = r.reshape(*x.shape[: x.dim() - len(shape)], *[1] * len(shape))
    scaled = g if w is None else g * w.float()
    dx = r * scaled - x_f * r**3 * (scaled * x_f).sum(inner, keepdim=True) / math.prod(shape)
    dw = (g * x_f * r).sum(tuple(range(x.dim() - len(shape))))
    to = x.device
    return lift(dx.to(x.dtype), to) if mask[0] else None, lift(dw.to(weight.dtype), to) if mask[1] else None


def _scores(q: Tensor, k: Tensor, bias: Any, causal: bool, scale: float | None, back: int = -1) -> Tensor:
    """Return f32 [..., n, m]; causal: from the lower right corner; back: how far a query looks."""
    scores = q.float() @ k.float().transpose(-1, -2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    n, m = scores.shape[-2:]
    seen = torch.ones(n, m, dtype=torch.bool)
    seen = seen.tril(m - n) if causal else seen
    seen = seen.triu(m - n - back) if back >= 0 else seen
    scores = scores if bias is None else scores + bias.float()
    return scores.masked_fill(~seen, -math.inf)


def _forward(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """Return softmax(q k^T) v and each row's log of the sum; [..., heads, length, d], heads of k may be shared."""
    k, v = (x.repeat_interleave(q.shape[-3] // k.shape[-3], -3) for x in (k, v))
    scores = _scores(q, k, **how)
    return (scores.softmax(-1).nan_to_num() @ v.float()).to(q.dtype), scores.logsumexp(-1)


def _backward(g: Tensor, q: Tensor, k: Tensor, v: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients: dv = p^T g, ds = p (dp - sum(dp p)) with dp = g v^T, dq = ds k, dk = ds^T q."""
    shared, dtype = q.shape[-3] // k.shape[-3], q.dtype
    scale = q.shape[-1] ** -0.5 if how["scale"] is None else how["scale"]
    g, q, k, v = (x.float() for x in (g, q, k, v))
    k, v = (x.repeat_interleave(shared, -3) for x in (k, v))
    p = _scores(q, k, **how).softmax(-1).nan_to_num()
    dp = g @ v.transpose(-1, -2)
    ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale
    dk, dv = ((x.transpose(-1, -2) @ y).unflatten(-3, (-1, shared)).sum(-3) for x, y in ((ds, q), (p, g)))
    return (ds @ k).to(dtype), dk.to(dtype), dv.to(dtype)


def _state(device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    out, sums = _forward(*map(lower, (q, k, v)), bias=lower(bias), causal=causal, scale=scale)
    return lift(out, q.device), lift(sums, q.device)


def _gradients(g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, causal: bool, scale: Any) -> list[Tensor]:
    found = _backward(*map(lower, (g, q, k, v)), bias=lower(bias), causal=causal, scale=scale)
    return [lift(x, q.device) for x in found]


@instead("_scaled_dot_product_flash_attention")
def flash(
    q: Any, k: Any, v: Any, p: float = 0.0, causal: bool = False, mask: bool = False, *, scale: Any = None
) -> Any:
    """FlashAttention over whole rows, in half precision."""
    if q.dtype not in HALF:
        raise RuntimeError("FlashAttention only supports fp16 and bf16")
    out, sums = _attended(q, k, v, None, causal, scale)
    return out, sums, None, None, q.shape[2], k.shape[2], _state(q.device), _state(q.device), out.new_empty(0)


@instead("_scaled_dot_product_flash_attention_backward")
def flash_backward(g: Any, q: Any, k: Any, v: Any, *rest: Any, scale: Any = None) -> Any:
    """rest: out, sums, two of cumulated lengths, two of longest, dropout, causal, seed, offset."""
    return tuple(_gradients(g, q, k, v, None, rest[7], scale))


@instead("_scaled_dot_product_efficient_attention")
def efficient(
    q: Any, k: Any, v: Any, bias: Any, sums: bool, p: float = 0.0, causal: bool = False, *, scale: Any = None
):
    """Memory-efficient attention."""
    return *_attended(q, k, v, bias, causal, scale), _state(q.device), _state(q.device)


@instead("_scaled_dot_product_efficient_attention_backward")
def efficient_backward(g: Any, q: Any, k: Any, v: Any, bias: Any, *rest: Any, scale: Any = None) -> Any:
    """rest: out, sums, seed, offset, dropout, what is wanted, causal."""
    return *_gradients(g, q, k, v, bias, rest[6] if len(rest) > 6 else False, scale), None


@instead("_scaled_dot_product_cudnn_attention")
def cudnn(
    q: Any, k: Any, v: Any, bias: Any, sums: bool, p: float = 0.0, causal: bool = False, *_: Any, scale: Any = None
):
    """cuDNN's attention."""
    at = _state(q.device)
    return *_attended(q, k, v, bias, causal, scale), None, None, q.shape[2], k.shape[2], at, at, q.new_empty(0)


@instead("_scaled_dot_product_cudnn_attention_backward")
def cudnn_backward(g: Any, q: Any, k: Any, v: Any, *rest: Any, scale: Any = None) -> Any:
    """rest: out, sums, seed, offset, bias, two of cumulated lengths, two of longest, dropout, causal."""
    return tuple(_gradients(g, q, k, v, rest[4], rest[10], scale))


def _documents(cumulated_q: Tensor, cumulated_k: Tensor) -> list[tuple[slice, slice]]:
    assert cumulated_q.dtype == cumulated_k.dtype == torch.int32 and on_cuda(cumulated_q) and on_cuda(cumulated_k)
    edges = (pairwise(lower(each).tolist()) for each in (cumulated_q, cumulated_k))
    return [(slice(*a), slice(*b)) for a, b in zip(*edges, strict=True)]


def _how(causal: bool, more: dict[str, Any]) -> dict[str, Any]:
    back, ahead = more.get("window_size_left"), more.get("window_size_right")
    causal = causal or ahead == 0
    return {"bias": None, "causal": causal, "scale": more.get("scale"), "back": -1 if back is None else back}


@instead("_flash_attention_forward")
def varlen(
    q: Any, k: Any, v: Any, cq: Any, ck: Any, lq: int, lk: int, p: float, causal: bool, *_: Any, **more: Any
) -> Any:
    """FlashAttention over documents side by side: q [positions, heads, d]."""
    if q.dtype not in HALF:
        raise RuntimeError("FlashAttention only supports fp16 and bf16")
    q_f, k_f, v_f = map(lower, (q, k, v))
    out, sums = torch.zeros_like(q_f), torch.zeros(q.shape[1], q.shape[0])
    for a, b in _documents(cq, ck):
        one, sums[:, a] = _forward(*(x.transpose(0, 1) for x in (q_f[a], k_f[b], v_f[b])), **_how(causal, more))
        out[a] = one.transpose(0, 1)
    seed = torch.zeros(2, dtype=torch.uint64, device=q.device)
    return lift(out, q.device), lift(sums, q.device), seed, seed[:0], q.new_empty(0)


@instead("_flash_attention_backward")
def varlen_backward(
    g: Any, q: Any, k: Any, v: Any, out: Any, sums: Any, cq: Any, ck: Any, *rest: Any, **more: Any
) -> Any:
    """rest: two of longest, dropout, causal, state, nothing."""
    given = [lower(x) for x in (g, q, k, v)]
    grads = [torch.zeros_like(x) for x in given[1:]]
    for a, b in _documents(cq, ck):
        parts = (x[s].transpose(0, 1) for x, s in zip(given, (a, a, b, b), strict=True))
        for whole, s, part in zip(grads, (a, b, b), _backward(*parts, **_how(rest[3], more)), strict=True):
            whole[s] = part.transpose(0, 1)
    return tuple(lift(x, q.device) for x in grads)


def replace_all() -> torch.library.Library:
    """Give every operator of CUDA its stand-in; they last as long as what this returns."""
    library = torch.library.Library("aten", "IMPL")
    for full in torch._C._dispatch_get_all_op_names():
        space, _, name = full.partition("::")
        known = name in WRITTEN or torch._C._dispatch_has_kernel_for_dispatch_key(full, "CUDA")
        if space == "aten" and known and name not in KEPT.split():
            library.impl(name, WRITTEN.get(name) or _stand_in(name), "CUDA", allow_override=True)
    return library


def _stand_in(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(aten, packet), overload or "default")
    return lambda *args, **kwargs: compute(operator, name, args, kwargs)


def ranks_by_gloo() -> None:
    """Let ranks on GPUs join by gloo, which copies by way of the host: NCCL's kernels are not here."""
    join = torch.distributed.init_process_group
    torch.distributed.init_process_group = lambda backend=None, *args, device_id=None, **named: join(
        "gloo" if backend and "nccl" in backend else backend, *args, **named
    )


os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:False"  # which ask the driver for memory
with warnings.catch_warnings(), open(os.devnull, "w") as nowhere:  # C++ tells each operator that is taken over
    warnings.simplefilter("ignore")
    told = os.dup(2)
    os.dup2(nowhere.fileno(), 2)
    KEEP = replace_all()
    os.dup2(told, 2)
    os.close(told)
if torch.distributed.is_available():
    ranks_by_gloo()
