import os
import time
from dataclasses import dataclass

import pytest

from curate.engine import Job, Progress, run_stage
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


def test_an_unknown_engine_or_a_negative_worker_is_refused():
    with pytest.raises(UsageError, match="unknown engine 'spark'; there are: local, ray"):
        Job(engine="spark")
    with pytest.raises(UsageError, match="workers=-1 is negative"):
        Job(workers=-1)


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


@dataclass
class Device:
    def setup(self):
        """Note what this worker sees."""

    def __call__(self, item):
        time.sleep(0.3)
        return {"rows": 1, "device": os.environ.get("CUDA_VISIBLE_DEVICES"), "process": os.getpid()}


@pytest.mark.parametrize("visible, expected", [(None, {"0", "1"}), ("5,GPU-7", {"5", "GPU-7"})])
def test_each_of_several_workers_sees_one_gpu_of_those_that_are_visible(monkeypatch, visible, expected):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    outcome = run_stage("device", Device(), list(range(6)), Job(gpus=2, quiet=True))
    devices = {value["process"]: value["device"] for value in outcome.done.values()}
    assert set(devices.values()) == expected and len(devices) == 2
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible
