"""LoRA layers as one function beside PEFT's own: the same sums, gradients, dropout, and fewer passes."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from train.model.lora import LoraLinear, fuse_lora


def pair(*, bias=True, **options):
    """The same net with PEFT's layers and with ours; B is drawn, since PEFT starts it at 0."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=bias), nn.GELU(), nn.Linear(20, 7, bias=bias))
    net.requires_grad_(False)
    options = {"r": 4, "lora_alpha": 10, "target_modules": ["0", "2"]} | options
    inject_adapter_in_model(LoraConfig(**options), net)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    ours = copy.deepcopy(net)
    fuse_lora(ours)
    return net, ours


def learnt(net, x, seed=1):
    """Return the output and the gradients of x and of all that learns."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_(True)
    out = net(x)
    (out.float() * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in net.parameters() if not p.requires_grad)
    return {"out": out.detach(), "x": x.grad, **grads}


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"use_rslora": True}, {"lora_dropout": 0.4}])
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)])
def test_outputs_and_gradients_are_those_of_peft(options, shape):
    theirs, ours = pair(**options)
    assert [type(module) for module in ours if isinstance(module, nn.Module)][::2] == [LoraLinear, LoraLinear]
    x = torch.randn(*shape)
    expected, found = learnt(theirs, x), learnt(ours, x)
    assert expected.keys() == found.keys() and len(found) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_before_it_learns_and_in_half_precision():
    theirs, ours = pair()
    x = torch.randn(64, 12)
    exact = theirs(x)
    for net in (theirs, ours):
        for module in net[::2]:
            module.base_layer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = (net(x) for net in (ours, theirs))
        assert found.dtype == expected.dtype == torch.bfloat16
        found.float().sum().backward()
    off, before = ((out.float() - exact).norm().item() for out in (found, expected))
    assert off < 1.1 * before
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


def test_what_peft_alone_can_do_is_left_to_it():
    _, dora = pair(use_dora=True)
    assert learnt(dora, torch.randn(3, 12)).keys() >= {"0.lora_magnitude_vector.default.weight"}
    theirs, ours = pair()
    x = torch.randn(3, 12)
    for net in (theirs, ours):
        for module in net[::2]:
            module.enable_adapters(False)
    torch.testing.assert_close(ours(x), theirs(x))
    for net in (theirs, ours):
        for module in net[::2]:
            module.enable_adapters(True)
            module.merge()
    torch.testing.assert_close(ours(x), theirs(x))


class Passes(TorchDispatchMode):
    """Counts the elements that sums and multiples beside the products write."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mul, torch.ops.aten.mul_, torch.ops.aten.add):
            self.elements += out.numel()
        return out


@pytest.mark.parametrize("half", [False, True])
def test_sums_are_made_within_the_products(half):
    elements = []
    x = torch.ones(30, 12, dtype=torch.bfloat16 if half else torch.float32, requires_grad=True)
    for net in pair(bias=False, r=2):
        if half:
            for module in net[::2]:
                module.base_layer.bfloat16()
                module.cast_input_dtype_enabled = False
        with Passes() as passes, torch.autocast("cpu", torch.bfloat16) if half else nullcontext():
            net(x).sum().backward()
        elements.append(passes.elements)
    # y + s B A x: two passes over the outputs; s dy one, and dx + dx another over the inputs. Ours: s times [n, rank].
    assert elements == [3 * 30 * (20 + 7) + 30 * (12 + 20), 2 * 2 * 30 * 2]
