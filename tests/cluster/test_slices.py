"""Slices of one clustering on several machines: one fit, equal bytes, and an end for each."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from clouds import draw

from curate.cluster import cluster as stage
from curate.cluster.cluster import cluster
from curate.cluster.options import ClusterOptions
from curate.engine import Job
from curate.errors import ContractError
from curate.storage import claim
from curate.vectors import kmeans
from house import curate, fingerprint, manifest

OPTIONS = ClusterOptions(k=5, floor=0.7)


@pytest.fixture(scope="module")
def cloud(tmp_path_factory):
    return draw(tmp_path_factory.mktemp("cloud") / "emb", stems=4)


@pytest.fixture(scope="module")
def whole(cloud, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "clu"
    cluster(cloud.path, str(out), OPTIONS, Job(workers=1, quiet=True))
    return contents(out)


def contents(out):
    return {name.split("/", 1)[1]: value for name, value in fingerprint(out).items()}


def run_slice(emb, out, rank, world, turns, marks, pause_s):
    """Run a slice of OPTIONS `turns` times; each fit leaves a mark, and lasts a while."""
    claim.BEAT_S, claim.POLL_S = 0.2, 0.05
    fit = kmeans.fit

    def slow_fit(*given, **options):
        (Path(marks) / f"fit-{os.getpid()}").touch()
        time.sleep(pause_s)
        return fit(*given, **options)

    kmeans.fit = slow_fit
    for _ in range(turns):
        cluster(emb, out, OPTIONS, Job(workers=1, quiet=True, part=(rank, world)))


def start(*given):
    child = multiprocessing.get_context("spawn").Process(target=run_slice, args=given)
    child.start()
    return child


def end(children):
    for child in children:
        child.join()
        assert child.exitcode == 0


def test_slices_that_start_together_fit_once(cloud, whole, tmp_path):
    out = tmp_path / "clu"
    end([start(cloud.path, str(out), rank, 3, 1, str(tmp_path), 1.0) for rank in range(3)])
    assert len(list(tmp_path.glob("fit-*"))) == 1
    end([start(cloud.path, str(out), rank, 3, 3, str(tmp_path), 0.0) for rank in range(3)])
    assert contents(out) == whole
    assert manifest(out)["clusters"]["k"] == 5


def test_another_slice_fits_where_the_fitter_was_killed(cloud, whole, tmp_path):
    out = tmp_path / "clu"
    first = start(cloud.path, str(out), 0, 2, 1, str(tmp_path), 600.0)
    while not list(tmp_path.glob("fit-*")):
        time.sleep(0.01)
    second = start(cloud.path, str(out), 1, 2, 1, str(tmp_path), 0.0)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    end([second])
    curate("cluster", cloud.path, out, "--k", "5", "--floor", "0.7", "--workers", "1")
    assert contents(out) == whole


def test_a_fitter_that_was_taken_for_dead_leaves_the_others_centroids(cloud, tmp_path, monkeypatch):
    fit = kmeans.fit
    out = str(tmp_path / "clu")

    def overtaken(*given, **options):
        monkeypatch.setattr(kmeans, "fit", fit)
        cluster(cloud.path, out, OPTIONS, Job(workers=1, quiet=True))
        return fit(given[0], given[1], 1, 5, **options)

    monkeypatch.setattr(kmeans, "fit", overtaken)
    cluster(cloud.path, out, OPTIONS, Job(workers=1, quiet=True))
    expected = kmeans.fit(cloud.image[cloud.ok], 5, 20, 0, backend=manifest(out)["fit"]["backend"]).centroids
    assert np.load(tmp_path / "clu" / "centroids.npy").tobytes() == expected.tobytes()


def test_shards_that_were_assigned_to_unlike_centroids_are_not_joined(cloud, tmp_path):
    out = tmp_path / "clu"
    cluster(cloud.path, str(out), OPTIONS, Job(workers=1, quiet=True, part=(0, 2)))
    np.save(out / stage.CENTROIDS, np.load(out / stage.CENTROIDS)[::-1])
    with pytest.raises(ContractError, match=r"00000\.arrow was assigned to centroids"):
        for rank in (1, 0):
            cluster(cloud.path, str(out), OPTIONS, Job(workers=1, quiet=True, part=(rank, 2)))
    assert not (out / "manifest.json").exists()
    ended = curate("cluster", cloud.path, out, "--k", "5", "--floor", "0.7", check=False)
    assert ended.returncode == 2 and "--overwrite" in ended.stderr and "Traceback" not in ended.stderr


def test_the_last_slices_end_together(cloud, whole, tmp_path):
    out = tmp_path / "clu"
    for rank in range(3):
        curate("cluster", cloud.path, out, "--k", "5", "--floor", "0.7", "--slice", f"{rank}/3", "--workers", "1")
    end([start(cloud.path, str(out), rank, 3, 2, str(tmp_path), 0.0) for rank in range(3)])
    assert contents(out) == whole
