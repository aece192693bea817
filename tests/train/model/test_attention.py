"""Packed documents, against transformers' own attention on each document alone and under its own masks."""

import itertools

import pytest
import torch
import transformers as tf

from train.errors import UsageError
from train.model import attention
from train.model.attention import NAME, Documents, attend, packed_documents, register

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FEWER = {**SMALL, "num_key_value_heads": 2}
CONFIGS = {
    "phi": tf.PhiConfig(**SMALL),
    "stablelm": tf.StableLmConfig(**FEWER),
    "gemma": tf.GemmaConfig(**FEWER, head_dim=8),
    "llama": tf.LlamaConfig(**FEWER),
    "qwen2": tf.Qwen2Config(**FEWER),
    "phi3": tf.Phi3Config(**FEWER, sliding_window=4),  # shorter than the documents
    "granite": tf.GraniteConfig(**FEWER),  # MiniCPM's shape
    "gpt_oss": tf.GptOssConfig(
        **FEWER, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),  # sinks
    "gemma2": tf.Gemma2Config(**FEWER, head_dim=8, attn_logit_softcapping=0.5, sliding_window=4),
}
OLDER = pytest.mark.skipif(bool(attention._varlen_lacks()), reason=attention._varlen_lacks())  # as torch 2.9
NO_SDPA = ("gpt_oss", "gemma2")  # transformers has sinks and caps in its eager attention alone
LENGTHS = [7, 1, 12, 3]


def enlarge(model):
    """Make every weight matter: sinks start at 0 and scores far below any cap."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_losses_and_gradients_are_those_of_each_document_alone(family, checkpointing):
    register()
    torch.manual_seed(0)
    ids = torch.randint(3, 64, (1, sum(LENGTHS)))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    outs = []
    for kind in (NAME, *([] if family in NO_SDPA else ["sdpa"]), "eager"):
        torch.manual_seed(1)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=kind)
        enlarge(model)
        body = model.get_decoder()
        if kind == NAME:
            if checkpointing:
                body.activation_checkpointing_enable({"use_reentrant": False})
            body.train()
            with packed_documents(LENGTHS, ids.device):
                hidden = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        elif kind == "eager":
            edges = Documents.of(LENGTHS, ids.device).edges
            parts = [body(input_ids=ids[:, a:b], use_cache=False) for a, b in zip(edges, edges[1:], strict=False)]
            hidden = torch.cat([part.last_hidden_state for part in parts], dim=1)
        else:
            hidden = body(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden)[0, :-1], ids[0, 1:], reduction="none")
        loss.sum().backward()
        outs.append((loss.detach(), gradients(model)))
    for loss, gradient in outs[1:]:
        torch.testing.assert_close(outs[0][0], loss, rtol=0, atol=1e-5)
        torch.testing.assert_close(outs[0][1], gradient, rtol=1e-4, atol=1e-4)


TREES = [(4, 3, 5, 2), (), (2, 9)]  # trunk and branches; the second document is none


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_branches_learn_what_each_learns_behind_its_own_trunk(family, dtype):
    """A tree's losses and gradients are those of trunk and branch as documents, the trunk's counted once."""
    register()
    lengths = [14, 6, 11]
    drawn = torch.randint(3, 64, (sum(lengths),), generator=torch.Generator().manual_seed(4))
    alone, starts, own_losses = [], [], []  # each document, and from where its losses count
    places = []
    for start, length, tree in zip((0, 14, 20), lengths, TREES, strict=True):
        trunk, *branches = tree or (length,)
        alone.append(drawn[start : start + trunk])
        starts.append(0)
        places += range(trunk)
        at = start + trunk
        for branch in branches:
            alone.append(torch.cat([drawn[start : start + trunk], drawn[at : at + branch]]))
            starts.append(trunk)
            places += range(trunk, trunk + branch)
            at += branch
    gained = []
    for kind in (NAME, "eager"):
        torch.manual_seed(1)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=kind).to(dtype)
        enlarge(model)
        body = model.get_decoder()
        if kind == NAME:
            with packed_documents(lengths, drawn.device, trees=TREES):
                out = body(input_ids=drawn[None], position_ids=torch.tensor([places]), use_cache=False)
            states = out.last_hidden_state[0]
        else:
            parts = [body(input_ids=ids[None], use_cache=False).last_hidden_state[0] for ids in alone]
            states = torch.cat([part[start:] for part, start in zip(parts, starts, strict=True)])
        own_losses.append(states.float().square().mean(1))
        own_losses[-1].sum().backward()
        gained.append(gradients(model).float())
    if dtype == torch.float32:
        torch.testing.assert_close(own_losses[0], own_losses[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gained[0], gained[1], rtol=1e-4, atol=1e-4)
    else:
        assert (own_losses[0] - own_losses[1]).norm() < 0.03 * own_losses[1].norm()
        assert (gained[0] - gained[1]).norm() < 0.06 * gained[1].norm()


@pytest.mark.parametrize("window", [None, 3])
def test_the_kernels_keys_are_what_the_mask_shows(window):
    """By the kernel's own rule: queries and keys of a span end together, and a query sees no key behind its own."""
    lengths = [14, 6, 11]
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn((1, 2, sum(lengths), 8), generator=generator) for _ in range(3))
    documents = Documents.of(lengths, q.device, trees=TREES)
    spans, module = documents.spans, torch.nn.Module()
    found, _ = attend(module, q, k, v, documents, scaling=0.5, sliding_window=window)
    keys, values = k[:, :, spans.keys_at], v[:, :, spans.keys_at]
    parts, edges = [], zip(spans.queries_n.tolist(), spans.keys_n.tolist(), strict=True)
    for (first, begin), (last, end) in itertools.pairwise(edges):
        rows, columns = last - first, end - begin
        assert rows <= spans.most_queries and columns <= spans.most_keys
        behind = torch.arange(columns)[None] - torch.arange(columns - rows, columns)[:, None]
        seen = (behind <= 0) & (behind > -(window or columns + 1))
        scores = q[:, :, first:last] @ keys[:, :, begin:end].transpose(2, 3) * 0.5
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values[:, :, begin:end])
    torch.testing.assert_close(found, torch.cat(parts, 2).transpose(1, 2))


@pytest.mark.parametrize("family", ["gpt_oss", "gemma2"])
def test_padded_rows_keep_sinks_and_caps(family):
    register()
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(0))
    outs = []
    for kind in (NAME, "eager"):
        torch.manual_seed(1)
        model = tf.AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation=kind).eval()
        enlarge(model)
        outs.append(model(input_ids=ids, use_cache=False).logits.detach())
    torch.testing.assert_close(outs[0], outs[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("documents", [None, [3, 4]])
def test_an_option_that_is_not_known_is_refused(documents):
    q, k, v = torch.randn(3, 1, 4, 7, 8)
    mask = None if documents is None else Documents.of(documents, q.device)
    attend(torch.nn.Module(), q, k, v, mask, scaling=1.0, position_ids=torch.arange(7), something=None)
    with pytest.raises(UsageError, match="takes block_indices, unsupported here; .*--set model.attention=eager"):
        attend(torch.nn.Module(), q, k, v, mask, scaling=1.0, block_indices=torch.zeros(1))


def test_attention_in_chunks_is_refused():
    register()
    config = tf.Llama4TextConfig(**FEWER, head_dim=8, attention_chunk_size=4, num_local_experts=2)
    model = tf.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with packed_documents([3, 4], torch.device("cpu")), pytest.raises(UsageError, match="attends in chunks of 4"):
        model(input_ids=torch.arange(3, 10)[None], use_cache=False)


def test_a_gpu_older_than_the_kernel_calls_sdpa_and_says_so(monkeypatch):
    """With `precision = "bf16"` such a GPU broke off in its first step; `auto` takes fp32 there."""
    half = torch.empty(1, 2, 3, 8, dtype=torch.bfloat16)
    for capability in ((7, 5), (8, 0)):
        attention._too_old.cache_clear()
        monkeypatch.setattr(attention, "_varlen_lacks", lambda: "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, found=capability: found)
        on_gpu = type("", (), {"is_cuda": True, "shape": half.shape, "dtype": half.dtype, "device": "cuda"})()
        against = attention.reason_against_varlen(on_gpu, on_gpu)
        assert against == (
            None if capability[0] == 8 else "a GPU of compute capability 7.5, older than the kernel's 8.0"
        )
    attention._too_old.cache_clear()


def test_a_torch_whose_kernel_lacks_an_argument_calls_sdpa_and_says_so(monkeypatch):
    """An earlier varlen_attn had neither windows nor shared heads; torch 2.9 has none."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")

    def older(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        raise AssertionError

    half = torch.empty(1, 2, 3, 8, dtype=torch.bfloat16)
    on_gpu = type("", (), {"is_cuda": True, "shape": half.shape, "dtype": half.dtype, "device": "cuda"})()
    attention._varlen_lacks.cache_clear()
    assert attention.reason_against_varlen(on_gpu, on_gpu) == (attention._varlen_lacks() or None)
    attention._varlen_lacks.cache_clear()
    monkeypatch.setattr(varlen, "varlen_attn", older)
    assert attention.reason_against_varlen(on_gpu, on_gpu).endswith("lacks enable_gqa, window_size")
    attention._varlen_lacks.cache_clear()
    cpu = torch.device("cpu")
    assert attention.describe(cpu, torch.float32).endswith("one SDPA call per document (no GPU)")
    assert attention.describe(cpu, torch.bfloat16).endswith("those of up to 1024 positions by the formula")


def test_the_work_is_quadratic_in_documents_not_in_rows():
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    module = torch.nn.Module()
    q, k, v = torch.randn(3, 1, 4, 256, 8)
    counts = []
    for lengths in ([256], [64] * 4):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            attend(module, q, k, v, Documents.of(lengths, q.device), scaling=1.0)
        counts.append(counter.get_total_flops())
    assert counts[0] == 4 * counts[1]


@pytest.mark.parametrize("rows", [2 * attention.BLOCK, 2 * attention.BLOCK + 40])
def test_blocks_of_queries_see_what_a_causal_mask_shows(rows):
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn((2, heads, 600, 8), generator=generator) for heads in (4, 2, 2))
    options = {"dropout": 0.0, "scaling": 0.4, "softcap": 2.0, "sinks_h": torch.tensor([0.0, 1.0, -1.0, 2.0])}
    causal = torch.ones(rows, 600, dtype=torch.bool).tril(600 - rows)[None, None]
    found, _ = attention._explicit(q[:, :, -rows:], k, v, None, **options)
    whole, _ = attention._explicit(q[:, :, -rows:], k, v, causal, **options)
    torch.testing.assert_close(found, whole)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("heads", [4, 2])
def test_half_precision_on_a_processor_agrees_with_fp32(heads, window):
    """Short documents by the formula, the longest by the kernel; values and gradients, heads shared or not."""
    module, lengths = torch.nn.Module(), [2 * attention.BLOCK + 9, 20, attention.SHORT + 1]
    module.num_key_value_groups = 4 // heads
    generator = torch.Generator().manual_seed(3)
    shapes = [(1, 4, sum(lengths), 16), (1, heads, sum(lengths), 16), (1, heads, sum(lengths), 16)]
    drawn = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    wanted_lhd = torch.randn((1, sum(lengths), 4, 16), generator=generator)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = [tensor.to(dtype).requires_grad_() for tensor in drawn]
        documents = Documents.of(lengths, torch.device("cpu"))
        out, _ = attend(module, *given, documents, scaling=0.3, sliding_window=window)
        out.backward(wanted_lhd.to(dtype))
        found.append([out, *(tensor.grad for tensor in given)])
    for exact, half in zip(*found, strict=True):
        assert half.dtype == torch.bfloat16
        assert (half.float() - exact).norm() < 0.01 * exact.norm()


@OLDER
@pytest.mark.gpu
@pytest.mark.parametrize("trees", [(), [(150, 90, 60), (), (30, 250)]])
@pytest.mark.parametrize(("heads", "window"), [(4, None), (2, None), (4, 100)])
def test_the_variable_length_kernel_agrees(heads, window, trees):
    attention.avoid_cudnn()  # as the trainer does
    module = torch.nn.Module()
    module.num_key_value_groups = 4 // heads
    shapes = [(1, 4, 600, 64), (1, heads, 600, 64), (1, heads, 600, 64)]
    given = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    documents = Documents.of([300, 20, 280], given[0].device, trees=trees)
    assert attention.reason_against_varlen(given[0], given[2]) is None
    weights = torch.randn((1, 600, 4, 64), device="cuda")
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        tensors = [tensor.to(dtype).detach().requires_grad_() for tensor in given]
        out, _ = attend(module, *tensors, documents, scaling=0.125, sliding_window=window)
        (out.float() * weights).sum().backward()
        found.append([out.float(), *(tensor.grad.float() for tensor in tensors)])
    for fast, slow in zip(*found, strict=True):
        torch.testing.assert_close(fast, slow, rtol=3e-2, atol=3e-2 * slow.abs().max().item())


@OLDER
@pytest.mark.parametrize("trees", [(), [(2, 3, 2), (), (), (2, 1)]])
@pytest.mark.parametrize("family", ["phi", "gemma", "phi3"])
def test_a_gpu_in_half_precision_takes_the_variable_length_kernel(family, trees, monkeypatch):
    """No GPU is needed: tensors that only pretend to be on one have shapes, types and kernels, and no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.func import functional_call
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "varlen_attn" in str(func):
                calls.append({tensor.dtype for tensor in args[:3]} | {tuple(args[9])})
            return func(*args, **(kwargs or {}))

    calls = []
    register()
    monkeypatch.setattr(torch._C, "_get_cudnn_sdp_enabled", lambda: False)  # the choice between two asks the driver
    model = tf.AutoModel.from_config(CONFIGS[family], attn_implementation=NAME).to(torch.bfloat16).eval()
    weights = [(n, t.shape, t.dtype) for n, t in (*model.named_parameters(), *model.named_buffers())]
    with FakeTensorMode(), Seen(), torch.no_grad():
        fake = {name: torch.empty(shape, dtype=dtype, device="cuda") for name, shape, dtype in weights}
        row = torch.empty(1, sum(LENGTHS), 32, device="cuda", dtype=torch.bfloat16)
        places = torch.empty(row.shape[:2], device="cuda", dtype=torch.int64)
        with packed_documents(LENGTHS, row.device, trees=trees):
            options = {"inputs_embeds": row, "position_ids": places, "use_cache": False}
            out = functional_call(model, fake, kwargs=options).last_hidden_state
    assert out.device.type == "cuda" and out.shape == row.shape
    assert calls == [{torch.bfloat16, (3 if family == "phi3" else -1, 0)}] * 2
