"""The Ray engine, on actors of this machine and on a cluster of several nodes that loses one."""

import os
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import tiny_clip
from artefacts import write_pool
from test_engine import Device, Square, Unready

from curate.cluster.cluster import ClusterOptions, cluster
from curate.embed.embed import EmbedOptions, embed
from curate.emit.emit import EmitOptions, emit
from curate.engine import Job, ask, gpus, run_stage
from curate.errors import RunError
from curate.select.select import SelectOptions, select
from house import ROOT, fingerprint

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'data-curate[ray]'")
RAY = Job(engine="ray", workers=2, quiet=True)
SEEN = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}}


@pytest.fixture
def actors():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=SEEN)
    yield
    ray.shutdown()


def walk(home, pool, model, job):
    embed(pool, f"{home}/emb", EmbedOptions(model), job)
    cluster(f"{home}/emb", f"{home}/clu", ClusterOptions(k=3, floor=0.5), job)
    select(f"{home}/clu", f"{home}/sel", SelectOptions(steps=("sample(20)",)), replace(job, engine="local"))
    emit(f"{home}/sel", f"{home}/out", EmitOptions(shard_size=7), job)
    return fingerprint(*(Path(home) / name for name in ("emb", "clu", "sel", "out")))


def test_actors_report_what_a_loop_reports(actors):
    outcome = run_stage("square", Square(), [0, 1, 2, 3, 4, 6], RAY)
    assert {item: value["square"] for item, value in outcome.done.items()} == {0: 0, 1: 1, 2: 4, 6: 36}
    assert outcome.failed == {3: "three is broken", 4: "ValueError: four"}
    assert run_stage("unready", Unready(), [1, 2, 3], RAY).failed == dict.fromkeys([1, 2, 3], "the weights are gone")


def test_a_ray_that_does_not_start_or_goes_away_ends_the_run_in_one_line(monkeypatch):
    def refuse(**options):
        raise Exception("The current node timed out during startup.\nThis could happen.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(
        RunError, match="^Ray does not start: Exception: The current node timed out during startup. .*again"
    ):
        run_stage("square", Square(), [0, 1], RAY)

    def gone(*given, **options):
        raise ray.exceptions.RaySystemError("the raylet died")

    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("curate.engine._actor", gone)
    with pytest.raises(RunError, match="^Ray is gone: .*the raylet died"):
        run_stage("square", Square(), [0, 1], RAY)


def test_gpus_are_those_of_the_cluster_and_reserved_by_stages_that_use_them_alone():
    ray.init(num_cpus=3, num_gpus=2, include_dashboard=False, log_to_driver=False, runtime_env=SEEN)
    try:
        job = Job(engine="ray", quiet=True)
        assert gpus(job) == 2 and job.gpus == 0
        assert ask(lambda: ray.get_runtime_context().get_accelerator_ids()["GPU"], job)[0] in ("0", "1")
        used = run_stage("device", Device(), list(range(4)), job, gpu=True)
        assert {value["device"] for value in used.done.values()} <= {"0", "1"}
        spared = run_stage("device", Device(), list(range(4)), RAY)
        assert not {value["device"] for value in spared.done.values()} & {"0", "1"}
    finally:
        ray.shutdown()


def test_an_item_that_kills_its_actor_fails_by_name_and_the_others_go_on(actors):
    outcome = run_stage("square", Square(), [0, 5, 1, 2, 6, 7], RAY)
    assert set(outcome.done) == {0, 1, 2, 6, 7} and "died" in outcome.failed[5]


def test_two_actors_leave_the_bytes_of_a_local_run(actors, tmp_path, monkeypatch):
    model = tiny_clip.write(tmp_path / "model")
    pool = write_pool(tmp_path / "pool", [f"{number:05d}" for number in range(4)], 9)
    (tmp_path / "local").mkdir()
    expected = walk(tmp_path / "local", pool, model, Job(workers=1, quiet=True))
    (tmp_path / "spread").mkdir()
    monkeypatch.chdir(tmp_path / "spread")  # relative locations, as they are typed
    assert walk(".", os.path.relpath(pool), model, RAY) == expected


@dataclass
class Slow:
    """Write a file a second or so."""

    out: str

    def setup(self):
        """Nothing to prepare."""

    def __call__(self, item):
        time.sleep(1)
        node = ray.get_runtime_context().get_node_id()
        Path(self.out, f"{item}.{node}").write_text(str(item))
        return {"rows": 1}


def test_a_node_that_dies_in_mid_stage_costs_no_item(tmp_path):
    from ray.cluster_utils import Cluster

    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    doomed = nodes.add_node(num_cpus=2)
    nodes.add_node(num_cpus=1)
    ray.init(address=nodes.address, log_to_driver=False, runtime_env=SEEN)
    try:
        lost = doomed.node_id

        def strike():
            while not list(tmp_path.glob(f"*.{lost}")):
                time.sleep(0.05)
            nodes.remove_node(doomed, allow_graceful=False)

        striker = threading.Thread(target=strike)
        striker.start()
        outcome = run_stage("slow", Slow(str(tmp_path)), list(range(16)), Job(engine="ray", workers=4, quiet=True))
        striker.join()
        assert len(outcome.done) == 16 and not outcome.failed
        used = {path.suffix for path in tmp_path.iterdir()}
        assert f".{lost}" in used and len(used) == 3
        assert {path.stem for path in tmp_path.iterdir()} == {str(item) for item in range(16)}
    finally:
        ray.shutdown()
        nodes.shutdown()
