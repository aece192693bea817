"""`curate cluster` as a user types it."""

import json

import numpy as np
import pytest
from clouds import draw, unit

from curate.cluster import giants
from curate.cluster.cluster import cluster
from curate.cluster.options import ClusterOptions
from curate.engine import Job
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


def test_the_manifest_names_the_product_and_a_resume_keeps_it(cloud, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    curate("cluster", cloud.path, first, "--k", "3")
    assert manifest(first)["fit"]["screen"] == "f32"  # too little work to look for a faster one
    told = curate("cluster", cloud.path, second, "--k", "3", "--slice", "0/2", "--workers", "1").stdout
    assert "others are not (run it again once they are: a step is left)" in told
    fit = json.loads((second / "fit.json").read_text())
    older = {**fit["versions"], "numpy": "1.99"}
    (second / "fit.json").write_text(json.dumps({**fit, "screen": "bf16", "versions": older}))
    said = curate("cluster", cloud.path, second, "--k", "3", "--workers", "1").stderr
    assert "the centroids were fitted by other versions than these" in said and '"numpy": "1.99"' in said
    assert manifest(second)["fit"]["screen"] == "bf16" and manifest(second)["fit"]["versions"] == older
    assert manifest(second)["versions"]["numpy"] != "1.99"
    assert (first / "edges.arrow").read_bytes() == (second / "edges.arrow").read_bytes()


@pytest.mark.parametrize("product", ["int8", "bf16", "f32"])
def test_no_byte_of_the_edges_depends_on_the_product(cloud, tmp_path, monkeypatch, product):
    monkeypatch.setattr("curate.vectors.near_pairs.ROUNDED_WORK", 0)
    monkeypatch.setattr("curate.cluster.cluster.fastest_product", lambda dim: product)
    prints = []
    for giant_rows in (1 << 14, 40):
        monkeypatch.setattr(giants, "GIANT_ROWS", giant_rows)
        out = tmp_path / f"{product}-{giant_rows}"
        made = cluster(cloud.path, str(out), ClusterOptions(k=3, floor=0.5), Job(workers=1, quiet=True))
        assert made["fit"]["screen"] == product
        prints.append((out / "edges.arrow").read_bytes())
    curate("cluster", cloud.path, tmp_path / "plain", "--k", "3", "--floor", "0.5")
    assert prints == 2 * [(tmp_path / "plain" / "edges.arrow").read_bytes()]
