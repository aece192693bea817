import os
import time
from dataclasses import dataclass

import pytest

from curate.engine import Job, Progress, run, run_stage
from curate.errors import ShardError, UsageError


@dataclass
class Square:
    ready: bool = False

    def setup(self):
        self.ready = True

    def __call__(self, item):
        assert self.ready
        if item == 3:
            raise ShardError("three is broken")
        if item == 4:
            raise ValueError("four\nis worse")
        if item == 5:
            os._exit(9)
        time.sleep(0.01 * (10 - item))
        return {"rows": item, "square": item * item, "process": os.getpid()}


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_is_reported_once_whatever_becomes_of_it(workers):
    outcome = run_stage("square", Square(), [0, 1, 2, 3, 4, 6], Job(quiet=True), workers=workers)
    assert {item: value["square"] for item, value in outcome.done.items()} == {0: 0, 1: 1, 2: 4, 6: 36}
    assert list(outcome.done) == [0, 1, 2, 6] and outcome.rows == 9
    assert outcome.failed == {3: "three is broken", 4: "ValueError: four"}
    assert len({value["process"] for value in outcome.done.values()}) == workers


def test_a_worker_that_dies_fails_its_items_by_name():
    outcome = run_stage("square", Square(), list(range(5, 12)), Job(quiet=True), workers=2)
    assert set(outcome.done) | set(outcome.failed) == set(range(5, 12))
    assert "died" in outcome.failed[5]


@dataclass
class Unready:
    def setup(self):
        raise UsageError("the weights are gone")

    def __call__(self, item):
        return {}


def test_a_worker_that_cannot_be_set_up_says_why():
    outcome = run_stage("unready", Unready(), [1, 2, 3], Job(quiet=True), workers=2)
    assert outcome.failed == dict.fromkeys([1, 2, 3], "the weights are gone")


def test_an_unknown_engine_is_refused():
    with pytest.raises(UsageError, match="local, ray"):
        list(run(Square(), [1], engine="spark"))


def test_slices_part_the_items():
    items = list(range(10))
    parts = [Job(part=(rank, 3)).share(items) for rank in range(3)]
    assert sorted(sum(parts, [])) == items and Job().share(items) == items


def test_progress_prints_whole_lines_elsewhere_than_in_a_terminal(capsys):
    line = Progress("embed", 2)
    line.update(1, 10)
    line.update(2, 20, 1)
    line.close()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "2/2 shards  20 rows" in printed and "1 failed" in printed


def test_ray_actors_report_what_a_loop_reports():
    ray = pytest.importorskip("ray", reason="needs the extra: pip install 'data-curate[ray]'")
    places = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")]
    here = os.pathsep.join(filter(None, places))
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
    outcome = run_stage("square", Square(), [0, 1, 2, 3, 4, 6], Job(engine="ray", quiet=True), workers=2)
    assert {item: value["square"] for item, value in outcome.done.items()} == {0: 0, 1: 1, 2: 4, 6: 36}
    assert outcome.failed == {3: "three is broken", 4: "ValueError: four"}
    ray.shutdown()
