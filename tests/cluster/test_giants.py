"""Clusters that are cut into blocks, and pools of many shards: the same bytes as in one piece."""

import numpy as np
import pytest
from clouds import draw
from hypothesis import given, settings
from hypothesis import strategies as st

from curate.cluster import giants, scatter
from curate.cluster.cluster import cluster
from curate.cluster.options import ClusterOptions
from curate.engine import Job
from curate.storage import sidecar
from curate.vectors import duplicate_forest
from house import curate, fingerprint

QUIET = Job(workers=1, quiet=True)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    """A pool of which some rows are equal to the bit."""
    drawn = draw(tmp_path_factory.mktemp("cloud") / "emb", groups=4, spread=0.8)
    for stem in ("00000", "00002"):
        path = f"{drawn.path}/{stem}.arrow"
        table = sidecar.table(path).combine_chunks()
        vectors = sidecar.vectors(table["image_embedding"].chunk(0)).copy()
        vectors[40:80] = vectors[7]
        valid = table["image_embedding"].is_valid().to_numpy()
        place = table.schema.get_field_index("image_embedding")
        table = table.set_column(place, table.schema.field(place), sidecar.vector_column(vectors, valid))
        sidecar.write_table(path, table.schema, table.combine_chunks().to_batches())
    return drawn


def contents(out):
    return {name.split("/", 1)[1]: value for name, value in fingerprint(out).items()}


@pytest.mark.parametrize("neighbours", [1, 2])
@pytest.mark.parametrize("workers", [1, 2])
def test_blocks_of_giant_clusters_make_the_same_bytes(cloud, tmp_path, monkeypatch, neighbours, workers):
    monkeypatch.setattr("curate.cluster.edges.BUCKET_BYTES", 20_000)
    monkeypatch.setattr(duplicate_forest, "LARGE", 50)
    options = ClusterOptions(k=6, floor=0.3, neighbours=neighbours)
    cluster(cloud.path, str(tmp_path / "whole"), options, QUIET)
    monkeypatch.setattr(giants, "GIANT_ROWS", 90)
    monkeypatch.setattr(giants, "CHUNK_ROWS", 33)
    ran = []
    monkeypatch.setattr(giants, "blocks", lambda *given, blocks=giants.blocks: ran.append(blocks(*given)) or ran[-1])
    cluster(cloud.path, str(tmp_path / "cut"), options, Job(workers=workers, quiet=True))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len({block[0] for block in ran[0]}) >= 2 and len(ran[0]) > 20


def test_slices_and_a_rerun_go_on_with_the_blocks_that_are_left(cloud, tmp_path, monkeypatch):
    options = ClusterOptions(k=3, floor=0.3)
    monkeypatch.setattr(duplicate_forest, "LARGE", 50)
    cluster(cloud.path, str(tmp_path / "whole"), options, QUIET)
    monkeypatch.setattr(giants, "GIANT_ROWS", 90)
    monkeypatch.setattr(giants, "CHUNK_ROWS", 33)
    found = giants.CompareBlocks.__call__
    done = []

    def sometimes(self, block):
        done.append(block)
        if len(done) == 5:
            raise OSError("no room")
        return found(self, block)

    monkeypatch.setattr(giants.CompareBlocks, "__call__", sometimes)
    out = str(tmp_path / "cut")
    turns = 0
    while not (tmp_path / "cut" / "manifest.json").exists() and turns < 12:
        try:
            cluster(cloud.path, out, options, Job(workers=1, quiet=True, part=(turns % 2, 2)))
        except Exception as error:
            assert "no room" in str(error)
        turns += 1
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(done) == len(set(done)) + 1


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60), st.integers(1, 20))
def test_parts_follow_each_other_and_are_few(rows, limit):
    before, scatter.MAX_FILES = scatter.MAX_FILES, limit
    try:
        found = scatter.parts({str(stem): count for stem, count in enumerate(rows)})
    finally:
        scatter.MAX_FILES = before
    assert [stem for part in found.values() for stem in part] == [str(stem) for stem in range(len(rows))]
    assert all(part[0] == name for name, part in found.items())
    assert len(found) <= limit
    most = -(-sum(rows) // limit)
    assert all(sum(rows[int(stem)] for stem in part) <= most + max(rows) for part in list(found.values())[:-1])


def test_tiny_shards_are_read_and_scattered_together_and_large_ones_alone():
    assert len(scatter.parts(dict.fromkeys(map(str, range(10_000)), 4))) == 257
    assert len(scatter.parts(dict.fromkeys(map(str, range(250_000)), 4))) == 977
    assert len(scatter.parts(dict.fromkeys(map(str, range(1000)), 10_000))) == 1000
    assert len(scatter.parts(dict.fromkeys(map(str, range(50)), 100))) == 50


def test_parts_of_several_shards_make_the_same_bytes(cloud, tmp_path, monkeypatch):
    cluster(cloud.path, str(tmp_path / "whole"), ClusterOptions(k=6), QUIET)
    monkeypatch.setattr(scatter, "MAX_FILES", 2)
    cluster(cloud.path, str(tmp_path / "few"), ClusterOptions(k=6), QUIET)
    assert contents(tmp_path / "few") == contents(tmp_path / "whole")


def test_a_pool_of_many_shards_needs_few_open_files_and_maps(tmp_path):
    drawn = draw(tmp_path / "emb", rows=600, dim=8, stems=300)
    curate("cluster", drawn.path, tmp_path / "whole", "--k", "4", "--workers", "1")
    curate("cluster", drawn.path, tmp_path / "clu", "--k", "4", "--workers", "1", limits={"RLIMIT_NOFILE": 100})
    assert contents(tmp_path / "clu") == contents(tmp_path / "whole")


def test_no_map_stays_open_while_a_bucket_is_read(tmp_path, monkeypatch):
    drawn = draw(tmp_path / "emb", rows=400, dim=8, stems=200)
    most = []
    found = duplicate_forest.near_duplicate_forest

    def counting(*given, **options):
        most.append(sum(str(tmp_path) in line for line in open("/proc/self/maps", encoding="utf-8")))
        return found(*given, **options)

    monkeypatch.setattr("curate.cluster.edges.near_duplicate_forest", counting)
    cluster(drawn.path, str(tmp_path / "clu"), ClusterOptions(k=4), QUIET)
    assert most and max(most) < 5


def test_a_giant_is_one_that_takes_a_share_of_all_comparisons():
    sizes = np.array([100, 20_000, 1_000_000, 0])
    assert giants.choose(sizes) == {1: 8192, 2: 15_625}
    assert giants.choose(np.full(10_000, 100_000)) == {}
    assert set(giants.choose(np.full(200, 50_000))) == set(range(200))
