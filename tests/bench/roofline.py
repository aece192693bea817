"""What a training step should take on a GPU, counted kernel by kernel from a configuration; nothing is computed.

    python tests/bench/roofline.py [CONFIG …] [--gpus H100,A100,4090] [--without half|lora] [--json FILE]

The step's own code (forward.py, on what stage.py prepares) runs on tensors without values, so that the kernels, their
types and their shapes are those of a GPU under autocast. All layers cost the same, so models of a few layers are run,
and their costs extrapolated linearly to the real depths. Kernels of a kind take

    max(operations / (PRODUCTS of the peak), bytes / (MEMORY of the bandwidth))

attention by itself ATTENTION of the peak; AdamW reads and writes 28 bytes per trained weight. That is a floor with
stated efficiencies, not a measurement: launch gaps, data, collectives and the optimiser's schedule are not in it.

Samples are as long as the published ones (train/bench/workload.py): a caption behind its image; the mix of 665K. One
pass of PASS tokens is run; what a card's passes hold, by memory.py, changes only how often weights are read, which is
left out. A cast is a kernel that only changes a type or a place.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT)]

PRODUCTS, ATTENTION, MEMORY = 0.69, 0.30, 0.80  # of the peaks: 680 and 300 TFLOP/s, 2.7 TB/s on an H100
# Dense bf16 FLOP/s with sums in fp32, bytes per second, bytes: NVIDIA's data sheets (SXM boards; Ada's whitepaper).
GPUS = {"H100": (989e12, 3.35e12, 80e9), "A100": (312e12, 2.04e12, 80e9), "4090": (165e12, 1.01e12, 24e9)}
CONFIGS = ("pipelines/bunny.toml", "pipelines/small.toml")
PASS = 8192  # tokens of the pass that is run
DRAWN = 4096  # samples from which lengths are taken
KINDS = ("product", "attention", "cast", "other")
FP32 = ("layer_norm", "pow", "rsqrt", "softmax", "log_softmax", "cross_entropy_loss", "nll_loss", "sum", "norm", "exp")
VIEWS = ("prim.", "aten.detach", "aten._unsafe_view", "aten._reshape_alias", "aten.alias", "aten.lift")


@dataclass
class Kind:
    """Kernels of one kind: how many, their operations and their bytes."""

    kernels: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0


def lengths_of(stage: str, image_tokens: int) -> list[tuple[int, int, int]]:
    """Draw (tokens, supervised tokens, images) of samples."""
    import numpy as np

    from train.bench.workload import CAPTION_TOKENS, MIX

    rng = np.random.default_rng(0)
    if stage == "align":
        words = np.interp(rng.random(DRAWN), (0.05, 0.25, 0.5, 0.75, 0.95), CAPTION_TOKENS).round().astype(int)
        return [(image_tokens + int(n) + 1, int(n) + 1, 1) for n in words]
    parts = list(MIX.values())
    weights = np.array([part.thousands for part in parts], float)
    found = []
    for kind in rng.choice(len(parts), DRAWN, p=weights / weights.sum()):
        part = parts[kind]
        turns = 1 + rng.poisson(part.rounds - 1)
        asked, said = (int(rng.gamma(4.0, n / 4, turns).sum()) for n in (part.question, part.answer))
        said = max(1, min(said + turns, 2048 - asked))
        found.append((min(2048, image_tokens * part.image + asked + said + 8 * turns), said, int(part.image)))
    return found


def run_pass(config: Any, name: str, depths: tuple[int, int], without: str) -> tuple[dict[str, Kind], int]:
    """Run a pass of a model of so many layers (language model, tower) on tensors without values.

    Returns its kernels by kind, and its tokens.
    """
    import torch

    from train.model.forward import hidden_states, token_losses, tower_features

    stage = getattr(config, name)
    composed = shallow(config, stage, depths, without)
    vision, documents, supervised, shown = composed.vision, [], 0, 0
    for tokens, learnt, images in lengths_of(name, vision.tokens_per_image):
        if sum(documents) + tokens > PASS:
            break
        documents, supervised, shown = [*documents, tokens], supervised + learnt, shown + images
    counts = counter()
    with pretended_gpu(counts, documents):
        pretend(composed.model)

        def numbers(*shape: int, dtype: Any = torch.int64) -> Any:
            return torch.empty(shape, dtype=dtype)

        row, learnt_s = (1, sum(documents)), numbers(supervised)
        pixels = numbers(shown, 3, vision.image_size, vision.image_size, dtype=torch.uint8)
        places = numbers(shown * vision.tokens_per_image)
        with counts, torch.autocast("cpu", torch.bfloat16):
            feats = tower_features(composed, pixels, tuned=stage.tune_tower)
            hidden = hidden_states(composed, numbers(*row), numbers(*row), feats, documents, learnt_s, places)
            losses = token_losses(composed.model, hidden.flatten(0, 1)[learnt_s], numbers(supervised))
            (losses.sum() / supervised).backward()
    return counts.kinds, sum(documents)


def shallow(config: Any, stage: Any, depths: tuple[int, int], without: str) -> Any:
    """Compose a model of a few layers on the meta device and prepare it as stage.py does."""
    from train.model import attention, compose
    from train.model.half import stay_half
    from train.model.layer import feature_layer_index
    from train.model.learn import fuse, prepare, recompute
    from train.model.skip_unlabelled import skip_unlabelled

    described = compose._native_config

    def cut(options: Any, tower: Any, lm: Any, *rest: Any) -> Any:
        lm.num_hidden_layers, tower.num_hidden_layers = depths[0], depths[1] + 1
        if getattr(lm, "layer_types", None):
            lm.layer_types = lm.layer_types[: depths[0]]
        return described(options, tower, lm, *rest)

    attention.register()
    with mock.patch.object(compose, "_native_config", cut):
        model, vision = compose.blueprint(config.model)
    lm = model.model.language_model
    lm.config._attn_implementation = attention.NAME
    index = feature_layer_index(config.model.feature_layer, depths[1] + 1)
    composed = compose.Composed(model, None, vision, "<image>", "", index)
    prepare(composed, replace(stage, quantize=""))
    skip_unlabelled(lm)
    if without != "half":
        stay_half(model)
    if without not in ("half", "lora"):
        fuse(model)
    if config.model.gradient_checkpointing:
        recompute(lm)
    return composed


@contextmanager
def pretended_gpu(counts: Any, documents: list[int]) -> Iterator[None]:
    """Make tensors without values, under the casts of CUDA's autocast and with its variable-length attention.

    torch's autograd runs no pretended CUDA tensors where there is no card. So the tensors are a processor's, whose
    autocast has the same products in bf16, and what CUDA's has in fp32 besides (FP32) is turned into that here.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    from train.model import attention

    squares = float(sum(n * n for n in documents))

    class Cuda(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if torch.is_autocast_enabled("cpu") and getattr(func, "__name__", "") in FP32:
                args = torch.utils._pytree.tree_map_only(torch.Tensor, _whole, args)
            return func(*args, **(kwargs or {}))

    class Varlen(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Any, k: Any, v: Any) -> Any:
            ctx.save_for_backward(q, k, v)
            return counts.attend(torch.empty_like(q), 4, squares, q, k, v)

        @staticmethod
        def backward(ctx: Any, out: Any) -> Any:
            q, k, v = ctx.saved_tensors
            counts.attend(out, 10, squares, q, q, q, k, k, v, v)
            return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)

    class Rms(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.save_for_backward(x, weight)
            out = torch.empty_like(x)
            counts.add("other", [x, weight, out])
            return out

        @staticmethod
        def backward(ctx: Any, out: Any) -> Any:
            x, weight = ctx.saved_tensors
            found = torch.empty_like(x), torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            counts.add("other", [x, weight, out, *(t for t in found if t is not None)])
            return found

    def varlen(query: Any, key: Any, value: Any, *_: Any) -> Any:
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        return Varlen.apply(q, k, v)

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return torch.native_dropout(x, p, True)[0] if training and p else x  # one kernel each way, as on a GPU

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.nn.functional, "dropout", dropout))
        stack.enter_context(mock.patch.object(attention, "reason_against_varlen", lambda *_: None))
        stack.enter_context(mock.patch.object(attention, "_varlen", varlen))
        stack.enter_context(mock.patch.object(torch.nn.functional, "rms_norm", lambda x, _, w, eps: Rms.apply(x, w)))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(Cuda())
        yield


def _whole(tensor: Any) -> Any:
    return tensor.float() if tensor.is_floating_point() else tensor


def pretend(model: Any) -> None:
    """Put a model's weights on the imaginary GPU, in the types that a run gives them."""
    import torch

    for module in model.modules():
        for key, p in module._parameters.items():
            if p is not None:
                dtype = torch.float32 if p.requires_grad else torch.bfloat16
                made = torch.empty(p.shape, dtype=dtype)
                module._parameters[key] = torch.nn.Parameter(made, requires_grad=p.requires_grad)
        for key, b in module._buffers.items():
            if b is not None:
                module._buffers[key] = torch.empty(b.shape, dtype=b.dtype)


def counter() -> Any:
    """Return a mode that counts the kernels under it."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from torch.utils.flop_counter import flop_registry

    class Counts(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.kinds = {kind: Kind() for kind in KINDS}

        def add(self, kind: str, tensors: Any, flops: float = 0.0) -> None:
            found = self.kinds[kind]
            found.kernels += 1
            found.bytes += sum(t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values())
            found.flops += flops

        def attend(self, out: Any, factor: int, squares: float, *given: Any) -> Any:
            """Count attention in causal documents; `given` may name a tensor twice, as its gradient is written."""
            heads, width = out.shape[-2:]
            found = self.kinds["attention"]
            found.kernels += 1
            found.bytes += sum(t.numel() * t.element_size() for t in (out, *given))
            found.flops += factor * heads * width * squares / 2
            return out

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            name, packet = str(func), func._overloadpacket
            formula = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            if not tensors or func.is_view or "empty" in name or name.startswith(VIEWS):
                return out
            if "attention" in name:  # of the tower: whole images, forward
                n, heads, length, width = args[0].shape
                self.add("attention", tensors, 4.0 * n * heads * width * length**2)
            elif formula is not None:
                self.add("product", tensors, formula(*args, **(kwargs or {}), out_val=out))
            else:
                self.add("cast" if "_to_copy" in name else "other", tensors)
            return out

    return Counts()


def count(config: Any, name: str, without: str) -> tuple[dict[str, Kind], int]:
    """Return the kernels of a whole model's pass, and its tokens."""
    from train.model.compose import blueprint

    native = blueprint(config.model)[0].config
    deep = native.text_config.num_hidden_layers - 2
    tower = native.vision_config.num_hidden_layers + config.model.feature_layer + 1 - 2
    (base, tokens), (more, _), (seen, _) = (run_pass(config, name, d, without) for d in ((2, 2), (3, 2), (2, 3)))
    whole = {}
    for kind in KINDS:
        values = [vars(part[kind]) for part in (base, more, seen)]
        whole[kind] = Kind(
            **{f: a + deep * (b - a) + tower * (c - a) for f in values[0] for a, b, c in [[v[f] for v in values]]}
        )
    return whole, tokens


def expect(config: Any, name: str, gpu: str, kinds: dict[str, Kind], pass_tokens: int) -> dict[str, Any]:
    """Return what a stage's step takes on a card."""
    from train.config import Stage
    from train.model.compose import blueprint
    from train.model.learn import prepare
    from train.run.memory import Memory

    peak, bandwidth, size = GPUS[gpu]
    stage = getattr(config, name)
    model, vision = blueprint(config.model)
    prepare(SimpleNamespace(model=model), replace(stage, quantize=""))
    learns = sum(p.numel() for p in model.parameters() if p.requires_grad)
    memory = Memory.of(model, stage, 2, checkpointing=config.model.gradient_checkpointing)
    tokens = min(Stage.micro_tokens, memory.tokens(size))
    samples = lengths_of(name, vision.tokens_per_image)
    whole = stage.batch_size * sum(n for n, _, _ in samples) / len(samples)
    passes = whole / pass_tokens
    seconds = 28 * learns / (MEMORY * bandwidth)
    for kind, found in kinds.items():
        rate = {"product": PRODUCTS, "attention": ATTENTION}.get(kind, 1.0) * peak
        seconds += passes * max(found.flops / rate, found.bytes / (MEMORY * bandwidth))
    flops = passes * sum(found.flops for found in kinds.values())
    return {
        **{"stage": name, "gpu": gpu, "tokens_a_step": round(whole), "tflop": round(flops / 1e12, 1)},
        **{"ms_a_step": round(seconds * 1e3), "tokens_per_s": round(whole / seconds)},
        **{"of_peak": round(flops / peak / seconds, 3), "pass_tokens": tokens},
        **{"memory_gb": round(memory.bytes(tokens) / 1e9, 1), "tokens_a_sample": round(whole / stage.batch_size)},
    }


def main() -> None:
    """Count, print, and write the JSON if asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*", default=CONFIGS)
    parser.add_argument("--gpus", default=",".join(GPUS))
    parser.add_argument("--stages", default="align,finetune")
    told = "lora: LoRA's sums as PEFT makes them; half: norms and LoRA inputs in fp32, too"
    parser.add_argument("--without", choices=["", "half", "lora"], default="", help=told)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    from train import config as configuration

    rows = []
    for path in given.configs:
        config = configuration.load(str(path))
        for name in given.stages.split(","):
            kinds, tokens = count(config, name, given.without)
            per = {k: {"kernels": round(v.kernels), "gb": round(v.bytes / 1e9, 1)} for k, v in kinds.items()}
            print(f"{Path(path).stem} {name}: a pass of {tokens:,} tokens: {json.dumps(per)}", flush=True)
            for gpu in given.gpus.split(","):
                expected = expect(config, name, gpu, kinds, tokens)
                rows.append({"config": Path(path).stem, "without": given.without, **expected, "a_pass": per})
                print("  " + ", ".join(f"{key} {value}" for key, value in expected.items() if key != "stage"))
    if given.json:
        head = {"command": " ".join(["python tests/bench/roofline.py", *sys.argv[1:]]), "date": str(date.today())}
        assumed = {"products": PRODUCTS, "attention": ATTENTION, "memory": MEMORY, "gpus": GPUS}
        given.json.write_text(json.dumps({**head, "assumed": assumed, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
