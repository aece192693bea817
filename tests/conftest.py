"""Skips with their reasons, and a small demo made once."""

import os

import hypothesis
import pytest
from warm import one_worker, warm_up

from house import GPU, REAL_DATA

# No deadlines: a busy machine is no defect. The same draws each time; HYPOTHESIS_PROFILE=wide draws others.
hypothesis.settings.register_profile(
    "same", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.register_profile("wide", deadline=None, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


def pytest_configure(config):
    """Start what the tests share, and hide GPUs from tests that are not of them: bf16 has other figures than fp32."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks torch
    one_worker()
    warm_up()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("realdata") and not REAL_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"real data is not at {REAL_DATA}"))
        if item.get_closest_marker("gpu") and GPU == "cuda":
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and pytest -m gpu"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A dirty demo of 600 rows in 3 shards, with its truth, instruction data and tests."""
    from curate.demo.render import render

    out = tmp_path_factory.mktemp("demo")
    render(out, rows=600, seed=11, shards=3, dirt="dirty", instruct=60, tests=1)
    return out
