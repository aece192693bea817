"""A step asks the device for values once, at its end; what bf16 runs leave in half precision changes rounding only."""

import json
from collections import Counter

import pytest
import torch
from test_loop import losses, run
from torch.utils._python_dispatch import TorchDispatchMode

from train.model.attention import avoid_cudnn
from train.model.half import LayerNorm, stay_half
from train.run import loop, stage

# What a GPU can only answer when it has computed it: values, and shapes that depend on values.
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "aten.equal", "bincount", "tolist")


class Waits(TorchDispatchMode):
    """Counts what waits, in the forward and the backward pass."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found.update(name for name in WAITS if name in str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "settings",
    [
        ("finetune.micro_tokens=70",),
        ("finetune.packing=false",),
        ("finetune.loss_norm=microbatch", "finetune.losses=true"),
        ("finetune.tune=full", "finetune.cache_features_mb=10", "model.gradient_checkpointing=true"),
    ],
    ids=lambda settings: settings[0],
)
def test_a_step_waits_once_for_the_device(world, tmp_path, monkeypatch, settings):
    found, step, tolist = [], loop.Training._step, torch.Tensor.tolist

    def counted(self, *given):
        with Waits() as waits, monkeypatch.context() as patch:

            def listed(tensor):
                waits.found["tolist"] += tensor.is_floating_point()  # whole numbers are those of the host's batches
                return tolist(tensor)

            patch.setattr(torch.Tensor, "tolist", listed)
            out = step(self, *given)
        found.append(dict(waits.found))
        return out

    monkeypatch.setattr(loop.Training, "_step", counted)
    make = loop.make_optimizer  # as on a GPU; the processor's plain AdamW reads its own counters
    monkeypatch.setattr(loop, "make_optimizer", lambda *given, **_: make(*given, fused=True))
    run(world, tmp_path / "run", "finetune.steps=3", *settings)
    assert found == [{"tolist": 1}] * 3


def test_cudnn_is_not_among_the_kernels_of_attention(world, tmp_path):
    torch.backends.cuda.enable_cudnn_sdp(True)
    run(world, tmp_path / "run", "finetune.steps=1")
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    enabled = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled())
    avoid_cudnn()
    assert all(enabled) and torch.backends.cuda.math_sdp_enabled()


def test_what_stays_in_half_precision_leaves_the_losses_equal(world, tmp_path, monkeypatch):
    """Also LoRA's dropout: it draws the same mask, on the same numbers."""
    for name in ("half", "whole"):
        if name == "whole":
            monkeypatch.setattr(stage, "stay_half", lambda model: None)
        run(world, tmp_path / name, "finetune.precision=bf16")
    assert losses(tmp_path / "half") == pytest.approx(losses(tmp_path / "whole"), rel=2e-3)
    norms = [json.loads(line)["grad_norm"] for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    others = [json.loads(line)["grad_norm"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert norms == pytest.approx(others, rel=2e-2)


def test_a_norm_in_half_precision_is_the_whole_one_rounded_once():
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(256)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    norm.bfloat16()
    model = torch.nn.Sequential(norm, torch.nn.LayerNorm(4))
    x = (3 * torch.randn(64, 256) + 1).bfloat16().requires_grad_()
    weights = (norm.weight.float(), norm.bias.float())
    # As autocast on a GPU has it: everything in fp32, and the next product rounds.
    whole = torch.nn.functional.layer_norm(x.float(), (256,), *weights).bfloat16()
    back = torch.randn(64, 256).bfloat16()
    (expected,) = torch.autograd.grad(whole, x, back)
    stay_half(model)
    assert all(type(module) is LayerNorm for module in model)
    with torch.autocast("cpu", torch.bfloat16):
        half = norm(x)
        assert half.dtype == torch.bfloat16 and model[1](torch.randn(2, 4)).dtype == torch.float32
    (found,) = torch.autograd.grad(half, x, back)
    torch.testing.assert_close(half, whole, rtol=2**-7, atol=2**-8)
    torch.testing.assert_close(found, expected, rtol=2**-6, atol=2**-6)
