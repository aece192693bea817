"""The fastest product is the one that takes the least time, and one that is right."""

import time

import numpy as np
import pytest

from curate.vectors import products
from curate.vectors.near_pairs import product_for

BUSY_S = 0.002


def waits(share):
    """Take a share of BUSY_S of a processor's time, which is what counts."""

    def work():
        end = time.thread_time() + share * BUSY_S
        while time.thread_time() < end:
            pass

    return work


def test_the_shortest_work_is_chosen_unless_an_earlier_one_is_nearly_as_short():
    assert products.fastest({"int8": waits(8), "bf16": waits(1), "f32": waits(4)}) == "bf16"
    assert products.fastest({"int8": waits(1), "bf16": waits(1), "f32": waits(1)}) == "int8"
    assert products.fastest({"f32": waits(9)}) == "f32"


@pytest.mark.parametrize("dim", [1, 8, 31, 512, 768])
def test_a_product_is_what_multiply_promises(dim):
    import torch

    rng = np.random.default_rng(dim)
    x = rng.standard_normal((20, dim), np.float32)
    assert products.is_right("f32", dim)
    assert np.allclose(products.multiply(x, x, "f32"), x @ x.T)
    if products.is_right("int8", dim):
        whole = torch.from_numpy(np.clip(x * 60, -127, 127).astype(np.int8))
        wide = whole.numpy().astype(np.int64)
        assert (products.multiply(whole, whole, "int8") == wide @ wide.T).all()


def test_a_product_that_is_wrong_is_never_chosen(monkeypatch):
    multiply = products.multiply

    def saturating(left, right, product):
        found = multiply(left, right, product)
        return np.clip(found, -(2**15), 2**15 - 1) if product == "int8" else found + (3.0 if product == "bf16" else 0)

    for function in (products.is_right, products.fastest_product):
        function.cache_clear()
    monkeypatch.setattr(products, "multiply", saturating)
    try:
        assert not products.is_right("int8", 512) and not products.is_right("bf16", 512)
        assert products.fastest_product(512) == "f32"
        assert product_for(512, np.array([10]), np.array([10]), "int8") == "f32"
    finally:
        for function in (products.is_right, products.fastest_product):
            function.cache_clear()


def test_what_is_fastest_is_one_of_the_products_and_little_work_takes_f32():
    assert products.fastest_product(64) in products.PRODUCTS
    assert products.fastest_product(64, 300, argmax=True) in products.PRODUCTS
    assert product_for(64, np.array([10, 10]), np.array([10, 10]), None) == "f32"
