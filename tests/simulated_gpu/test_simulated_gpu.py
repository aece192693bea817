"""A GPU that is not there has to refuse what a real one does, and to compute what the processor does."""

import subprocess
import sys

import pytest
import simulate

from house import ROOT

PROBE = """
import torch
from torch.nn.functional import scaled_dot_product_attention as attention
x, w = torch.randn(3, 4, device="cuda"), torch.randn(4, 2, device="cuda", requires_grad=True)
torch.nn.functional.gelu(x @ w).sum().backward()
plain = w.detach().cpu().requires_grad_()
torch.nn.functional.gelu(x.cpu() @ plain).sum().backward()
torch.testing.assert_close(w.grad.cpu(), plain.grad)
q = torch.randn(1, 2, 5, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
seen = torch.ones(5, 5, dtype=torch.bool, device="cuda").tril()
for how in ({"is_causal": True}, {"attn_mask": seen}):
    q.grad, exact = None, q.detach().cpu().float().requires_grad_()
    attention(q, q, q, **how).float().square().sum().backward()
    attention(exact, exact, exact, is_causal=True).square().sum().backward()
    torch.testing.assert_close(q.grad.cpu().float(), exact.grad, atol=.1, rtol=.1)
torch.manual_seed(0); first = torch.randn(4, device="cuda")
torch.manual_seed(0); assert (torch.randn(4, device="cuda") == first).all() and not torch.randn(4).is_cuda
assert torch.ones(2).pin_memory().is_pinned() and torch.cuda.memory_allocated() > 0
plain = torch.Generator()
for wrong in (lambda: x @ torch.ones(4, 2), lambda: x.numpy(), lambda: x.to("cuda:1") + x,
              lambda: torch.empty(10**10, device="cuda"), lambda: torch.rand(2, device="cuda", generator=plain)):
    try:
        wrong()
    except (RuntimeError, TypeError) as error:
        print(type(error).__name__)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if reason := simulate.lacks():
        pytest.skip(reason)
    return simulate.build(tmp_path_factory.mktemp("cuda"))


def simulated(library, *words, gpus=1):
    environment = simulate.environment(library, gpus)
    return subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_it_refuses_what_a_gpu_does_and_computes_what_the_processor_does(library):
    ran = simulated(library, "-c", PROBE, gpus=2)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.split() == ["RuntimeError", "TypeError", "RuntimeError", "OutOfMemoryError", "RuntimeError"]


@pytest.mark.parametrize("path", ["tests/vectors/test_on_device.py", "tests/train/model/test_attention.py"])
def test_tests_of_cuda_paths_pass_there(library, path):
    ran = simulated(library, "-m", "pytest", "-q", "-rs", "-m", "gpu", "-p", "no:cacheprovider", path)
    assert ran.returncode == 0 and "SKIPPED" not in ran.stdout, ran.stdout[-2000:]
