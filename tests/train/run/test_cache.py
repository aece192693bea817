"""Cached features: those that are gathered ahead are those that are asked for, in whatever order."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import torch

from train.run.cache import FeatureCache


def test_what_is_gathered_ahead_is_what_is_asked_for():
    cache = object.__new__(FeatureCache)
    cache.table, cache.at = torch.arange(60.0).view(10, 2, 3), {n: (2 * n, 2 * n + 2) for n in range(5)}
    cache.runtime, cache._thread = SimpleNamespace(device=torch.device("cpu")), ThreadPoolExecutor(1)
    cache._coming, cache._ahead = iter(()), None

    def rows(*images):
        return cache.table[[2 * image + images[:at].count(image) % 2 for at, image in enumerate(images)]]

    assert cache.get([3, 3, 1]).equal(rows(3, 3, 1))
    cache.expect([[0, 0], [4], [2, 2, 2]])
    assert cache.get([0, 0]).equal(rows(0, 0)) and cache._ahead[0] == [4]
    assert cache.get([1]).equal(rows(1)), "an unexpected one is gathered at once"
    assert cache.get([4]).equal(rows(4)) and cache.get([2, 2, 2]).equal(rows(2, 2, 2))
    assert cache._ahead is None
    cache._thread.shutdown()

    cache._thread = None  # on a processor
    cache.expect([[0, 0], [4]])
    assert cache._ahead is None and cache.get([0, 0]).equal(rows(0, 0)) and cache.get([4]).equal(rows(4))
