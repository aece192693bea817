"""The fastest matrix product of this processor: int8, bf16 or f32, found by measuring.

A processor's flags do not tell how fast its libraries are: two cores with AMX multiply bf16 at three times the speed of
int8 in PyTorch, two with only VNNI int8 at twice the speed of bf16. So each product is tried on blocks of the actual
size, in turns for about a tenth of a second, on one thread. The shortest processor time of each counts, which a busy
machine disturbs least. A product that is faster by less than a fifth does not displace one that comes before it in
PRODUCTS, so that repeated measurements seldom disagree.

Rounded products are used only where an exact or f32 computation decides afterwards. A product that is wrong on this
machine, such as int8 on processors whose instructions saturate at 16 bits, is never used, however fast.
"""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from curate.vectors import on_device

PRODUCTS = ("int8", "bf16", "f32")
MARGIN = 1.2
MEASURE_S, LEAST_ROUNDS = 0.1, 4
BLOCK_ROWS = 512


def multiply(left_pd: Any, right_qd: Any, product: str) -> np.ndarray:
    """Multiply prepared rows, all with all: i32 [p, q] for int8, else f32.

    int8 and bf16 take torch tensors of that dtype, f32 takes NumPy arrays. bf16 products are summed in f32, then
    rounded to bf16.
    """
    if product == "f32":
        return np.asarray(left_pd @ right_qd.T)
    import torch

    if product == "int8":
        return np.asarray(torch._int_mm(left_pd, right_qd.T).numpy())
    return np.asarray((left_pd @ right_qd.T).float().numpy())


@cache
def is_right(product: str, dim: int) -> bool:
    """Say whether this machine computes a product as `multiply` promises, on rows of `dim` numbers.

    Products of int8 use a private function of torch: if a version lacks it, or takes other arguments, there are none.
    """
    if product == "f32":
        return True
    if product == "gpu":
        return on_device.device() is not None
    import torch

    rng = np.random.default_rng(0)
    if product == "int8":
        x = rng.integers(-127, 128, (64, dim)).astype(np.int8)
        x[:4], x[4:8] = 127, -127  # the largest sums, where 16 bits would saturate
        tensor = torch.from_numpy(x)
        wide = x.astype(np.int64)
        try:
            return bool((multiply(tensor, tensor, product) == wide @ wide.T).all())
        except (AttributeError, TypeError, RuntimeError):
            return False
    tensor = torch.from_numpy(rng.standard_normal((64, dim), np.float32) + 1).bfloat16()  # long sums of one sign
    exact = tensor.double().numpy() @ tensor.double().numpy().T
    return bool((np.abs(multiply(tensor, tensor, product) - exact) <= 2.0**-8 * np.abs(exact) + 1e-2).all())


@cache
def fastest_product(dim: int, columns: int = BLOCK_ROWS, *, argmax: bool = False) -> str:
    """Name the fastest product of BLOCK_ROWS by `columns` rows of `dim` numbers, with each row's argmax if wanted."""
    import torch

    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((n, dim), np.float32) for n in (BLOCK_ROWS, columns))
    forms: dict[str, Callable[[np.ndarray], Any]] = {
        "int8": lambda x: torch.from_numpy(np.clip(x * 40, -127, 127).astype(np.int8)),
        "bf16": lambda x: torch.from_numpy(x).bfloat16(),
        "f32": torch.from_numpy,  # NumPy's product is as fast, but takes threads of its own
    }

    def work(product: str) -> Callable[[], Any]:
        a, b = forms[product](left), forms[product](right)
        one = (lambda: (a @ b.T).numpy()) if product == "f32" else (lambda: multiply(a, b, product))
        return (lambda: one().argmax(axis=1)) if argmax else one

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fastest({product: work(product) for product in PRODUCTS if is_right(product, dim)})
    finally:
        torch.set_num_threads(threads)


def fastest(work: dict[str, Callable[[], Any]]) -> str:
    """Name the first of several pieces of work that takes at most MARGIN times as long as the shortest."""
    shortest = dict.fromkeys(work, float("inf"))
    for each in work.values():
        each()  # libraries prepare themselves at the first call
    started, rounds = time.perf_counter(), 0
    while rounds < LEAST_ROUNDS or time.perf_counter() - started < MEASURE_S:
        rounds += 1
        for name, each in work.items():
            before = time.thread_time()
            each()
            shortest[name] = min(shortest[name], time.thread_time() - before)
    best = min(shortest.values())
    return next(name for name, taken in shortest.items() if taken <= MARGIN * best)
