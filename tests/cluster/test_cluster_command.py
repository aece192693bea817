"""`curate cluster` as a user types it."""

import numpy as np
import pytest
from clouds import draw, unit

from house import curate, manifest


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("cloud") / "emb", rows=300)


def test_given_centroids_end_well_and_so_do_a_rerun_show_select_and_report(cloud, tmp_path):
    np.save(tmp_path / "given.npy", unit(np.random.default_rng(0).normal(size=(4, 32))).astype(np.float32))
    out = tmp_path / "clu"
    words = ["cluster", cloud.path, out, "--centroids", tmp_path / "given.npy"]
    for _ in range(2):
        ended = curate(*words)
        assert "k = 4 given" in ended.stdout and "Traceback" not in ended.stderr
    assert "fitted_rows" not in manifest(out)["fit"]
    assert "k = 4 given" in curate("show", out).stdout
    assert "300 rows" in curate("select", out, tmp_path / "sel", "--step", "dedup(0.95)").stdout
    curate("show", tmp_path / "sel")
    curate("report", tmp_path / "sel", tmp_path / "page.html")


def test_the_closing_line_says_what_was_fitted(cloud, tmp_path):
    ended = curate("cluster", cloud.path, tmp_path / "clu", "--k", "3")
    assert f"k = 3 fitted on {cloud.ok.sum()} rows" in ended.stdout
