"""RMS norms as one kernel: which classes are changed, equal in fp32, and rounded once in bf16."""

import importlib

import pytest
import torch

from train.model.half import RMSNorm, stay_half

RMS = "Llama Qwen2 Qwen3 Phi3 Mistral SmolLM3 Granite Olmo2 Glm4 Lfm2 Aimv2 Gemma Gemma3 Qwen3_5 Mamba2".split()
OTHERS = {"Qwen3_5RMSNormGated": (64,), "Zamba2RMSNormGated": (64, 32), "NanoChatRMSNorm": ()}


def made(name, *sizes):
    family = name.partition("RMSNorm")[0].lower()
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    norm = getattr(module, name)(*sizes)
    for weight in norm.parameters():
        torch.nn.init.normal_(weight, 0.5, 0.3, torch.Generator().manual_seed(1))
    return norm


def passed(norm, x, back):
    """The result for [n, d], and the gradients of input and weights."""
    x = x.detach().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    return out, *torch.autograd.grad(out, [x, norm.weight], back.to(out.dtype))


@pytest.mark.parametrize("family", RMS)
def test_an_rms_norm_is_one_kernel_that_rounds_once(family):
    norm, whole = (made(family + "RMSNorm", 64) for _ in range(2))
    draw = torch.Generator().manual_seed(0)
    x, back = ((3 * torch.randn(40, 64, generator=draw)).bfloat16().float() for _ in range(2))
    x[0] *= 2**-13  # no larger than epsilon
    norm.bfloat16()
    whole.load_state_dict(norm.state_dict())
    exact = passed(whole, x, back)
    stay_half(torch.nn.Sequential(norm, whole))
    assert isinstance(norm, RMSNorm) and type(norm).__name__ == type(whole).__name__
    for found, expected in zip(passed(whole, x, back), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    out, *gradients = passed(norm, x.bfloat16(), back)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact[0], rtol=2**-8, atol=1e-6)
    for found, expected in zip(gradients, exact[1:], strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=2**-6, atol=2**-6 * float(expected.abs().max()))
    assert norm(x).dtype == type(norm).__mro__[2].forward(norm, x).dtype, "of two types: as its own class has it"


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_more_or_less_than_an_rms_norm_stays_what_it_is(name):
    model = torch.nn.Sequential(made(name, *OTHERS[name]))
    stay_half(model)
    assert not isinstance(model[0], RMSNorm)
