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
from curate.errors import RunError, UsageError, unknown
from curate.select.select import SelectOptions, select
from house import ROOT, fingerprint, until

ray = pytest.importorskip("ray", reason="needs the extra: pip install 'data-curate[ray]'")
RAY = Job(engine="ray", workers=2, quiet=True)
LOOKS = {"initial_delay_ms": 500, "period_ms": 500, "failure_threshold": 3}
SEEN = {"env_vars": {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}}


NO_ROOM = "Ray has not started a worker yet, 0 of 2 CPUs are free: waiting until it does"


class Held:
    """An actor of other work, which keeps its core."""

    def sits(self):
        return True


@pytest.fixture(scope="module")
def nodes():
    """Two nodes of a core each. One that is gone is missed within seconds; one that is slow has half a minute."""
    from ray.cluster_utils import Cluster

    system = {f"health_check_{name}": value for name, value in LOOKS.items()}
    system["worker_niceness"] = 0  # at 15, as it is else, they get next to nothing beside other tests
    head = {"num_cpus": 1, "include_dashboard": False, "no_monitor": True, "_system_config": system}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False, runtime_env=SEEN)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def walk(home, pool, model, job):
    embed(pool, f"{home}/emb", EmbedOptions(model), job)
    cluster(f"{home}/emb", f"{home}/clu", ClusterOptions(k=3, floor=0.5), job)
    select(f"{home}/clu", f"{home}/sel", SelectOptions(steps=("sample(20)",)), replace(job, engine="local"))
    emit(f"{home}/sel", f"{home}/out", EmitOptions(shard_size=7), job)
    return fingerprint(*(Path(home) / name for name in ("emb", "clu", "sel", "out")))


def test_actors_report_what_a_loop_reports(nodes):
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


def test_gpus_are_those_of_the_cluster_and_reserved_by_stages_that_use_them_alone(nodes, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # by which conftest.py hides GPUs, these too
    job = Job(engine="ray", quiet=True)
    node = nodes.add_node(num_cpus=2, num_gpus=2)
    try:
        until(lambda: gpus(job) == 2)
        assert job.gpus == 0
        assert ask(lambda: ray.get_runtime_context().get_accelerator_ids()["GPU"], job)[0] in ("0", "1")
        used = run_stage("device", Device(), list(range(4)), job, gpu=True)
        assert {value["device"] for value in used.done.values()} <= {"0", "1"}
        spared = run_stage("device", Device(), list(range(4)), RAY, workers=3)  # the other nodes have room for two
        assert not {value["device"] for value in spared.done.values()} & {"0", "1"}
    finally:
        nodes.remove_node(node)
    until(lambda: gpus(job) == 0)


def test_a_refusal_from_where_the_workers_run_is_told_in_its_own_words(nodes):
    def refuse():
        raise unknown("precision", "fp61", ("bf16", "fp16"))

    with pytest.raises(UsageError) as found:
        ask(refuse, RAY)
    assert (str(found.value), found.value.hint) == (
        "unknown precision 'fp61'; there are: bf16, fp16.  hint: did you mean 'fp16'?",
        "did you mean 'fp16'?",
    )


def test_a_cluster_without_room_is_waited_for_and_said_in_one_line(nodes, monkeypatch, capsys):
    """Other work holds every core: a driver that only waits would look as if it hung."""
    monkeypatch.setattr("curate.engine.RAY_ROOM_S", 1.0)
    loud = replace(RAY, quiet=False)

    def crowd_out(work):
        taken = [ray.remote(num_cpus=1)(Held).remote() for _ in range(2)]
        ray.get([each.sits.remote() for each in taken])
        threading.Timer(4.0, lambda: [ray.kill(each) for each in taken]).start()
        answer, told = work(), capsys.readouterr().err
        assert [line for line in told.splitlines() if line.startswith("Ray")] == [NO_ROOM]
        return answer

    assert crowd_out(lambda: ask(lambda: 7, loud)) == 7
    assert len(crowd_out(lambda: run_stage("square", Square(), [0, 1, 2], loud)).done) == 3
    monkeypatch.setattr("curate.engine.RAY_ROOM_S", 60.0)
    assert ask(lambda: 7, loud) == 7 and "Ray" not in capsys.readouterr().err


def test_an_item_that_kills_its_actor_fails_by_name_and_the_others_go_on(nodes):
    outcome = run_stage("square", Square(), [0, 5, 1, 2, 6, 7], RAY)
    assert set(outcome.done) == {0, 1, 2, 6, 7} and "died" in outcome.failed[5]


def test_two_actors_leave_the_bytes_of_a_local_run(nodes, tmp_path, monkeypatch):
    model = tiny_clip.write(tmp_path / "model")
    pool = write_pool(tmp_path / "pool", [f"{number:05d}" for number in range(4)], 9)
    (tmp_path / "local").mkdir()
    expected = walk(tmp_path / "local", pool, model, Job(workers=1, quiet=True))
    (tmp_path / "spread").mkdir()
    monkeypatch.chdir(tmp_path / "spread")  # relative locations, as they are typed
    assert walk(".", os.path.relpath(pool), model, RAY) == expected


@dataclass
class Slow:
    """Write a file, and take a while."""

    out: str

    def setup(self):
        """Nothing to prepare."""

    def __call__(self, item):
        time.sleep(0.4)
        node = ray.get_runtime_context().get_node_id()
        Path(self.out, f"{item}.{node}").write_text(str(item))
        return {"rows": 1}


def test_a_node_that_dies_in_mid_stage_costs_no_item(nodes, tmp_path):
    doomed = nodes.add_node(num_cpus=2)
    lost = doomed.node_id

    def strike():
        until(lambda: list(tmp_path.glob(f"*.{lost}")))
        nodes.remove_node(doomed, allow_graceful=False)

    striker = threading.Thread(target=strike)
    striker.start()
    outcome = run_stage("slow", Slow(str(tmp_path)), list(range(16)), Job(engine="ray", workers=4, quiet=True))
    striker.join()
    assert len(outcome.done) == 16 and not outcome.failed
    used = {path.suffix for path in tmp_path.iterdir()}
    assert f".{lost}" in used and len(used) == 3
    assert {path.stem for path in tmp_path.iterdir()} == {str(item) for item in range(16)}
