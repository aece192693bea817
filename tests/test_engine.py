import errno
import io
import multiprocessing
import os
import random
import signal
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing import context
from pathlib import Path

import pytest
import warm_workers

from curate import progress
from curate.engine import Job, advance, cores, cores_each, helpers, run, run_stage
from curate.errors import ShardError, UsageError
from curate.processes import WorkerDied
from curate.progress import Progress


@pytest.fixture(autouse=True)
def spawned(monkeypatch):
    """Workers begin with nothing here, as they do for a user."""
    monkeypatch.setitem(context._concrete_contexts, "spawn", warm_workers.SPAWN)


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


def test_an_item_that_kills_its_workers_fails_by_name_and_costs_no_other():
    outcome = run_stage("square", Square(), [5, 0, 1, 2, 6, 7, 8, 9, 10], Job(quiet=True), workers=2)
    assert set(outcome.done) == {0, 1, 2, 6, 7, 8, 9, 10}
    assert "died 3 times" in outcome.failed[5] and outcome.passing == {5}


@pytest.mark.parametrize("workers", [1, 2])
def test_small_items_worked_in_groups_fail_each_by_itself(workers):
    items = [0, 1, 3, 4, 5, 6, 7, 8][: 8 if workers == 2 else 4]  # 5 kills its worker
    outcome = run_stage("square", Square(), items, Job(quiet=True), workers=workers, group=3, around=nullcontext)
    assert list(outcome.done) == [item for item in items if item not in (3, 4, 5)]
    assert outcome.rows == sum(outcome.done) and set(outcome.failed) == set(items) - set(outcome.done)
    assert outcome.failed[3] == "three is broken" and (workers == 1 or "died 3 times" in outcome.failed[5])


@contextmanager
def ends_full():
    yield
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_group_that_cannot_be_ended_is_worked_item_by_item():
    outcome = run_stage("square", Square(), [0, 1, 2], Job(quiet=True), workers=1, group=2, around=ends_full)
    assert list(outcome.done) == [0, 1, 2]


@dataclass
class Mortal:
    """Die at an item the first few times that it comes."""

    folder: str
    deaths: int

    def setup(self):
        """Nothing to prepare."""

    def __call__(self, item):
        died = Path(self.folder, str(item))
        times = len(died.read_text()) if died.exists() else 0
        if times < self.deaths:
            died.write_text("x" * (times + 1))
            os.kill(os.getpid(), signal.SIGKILL)
        return {"rows": 1}


def test_an_item_whose_worker_is_killed_twice_is_done_by_the_third(tmp_path):
    outcome = run_stage("mortal", Mortal(str(tmp_path), 2), [1, 2, 3], Job(quiet=True), workers=2)
    assert set(outcome.done) == {1, 2, 3} and not outcome.failed


def fetch(size):
    return b"x" * size


def start_dying(size):
    if size:
        os.kill(os.getpid(), signal.SIGKILL)


def test_helpers_killed_at_any_moment_are_replaced_and_nobody_waits_for_them():
    pool, rng = helpers(2, start_dying, (0,)), random.Random(3)
    waiting = [pool.submit(fetch, 20_000_000) for _ in range(30)]  # more than a pipe holds: death comes in mid-write
    ended = []
    try:
        for number, future in enumerate(waiting):
            ended.append(future.exception(timeout=120))
            if number < 10:
                time.sleep(0.02 * rng.random())
                if alive := multiprocessing.active_children():  # none while the next are being started
                    rng.choice(alive).kill()
    finally:
        pool.shutdown(cancel_futures=True)
    assert {type(error) for error in ended} <= {type(None), WorkerDied} and ended.count(None) >= 25
    assert not multiprocessing.active_children()


def test_helpers_that_die_at_their_start_say_so():
    pool = helpers(2, start_dying, (1,))
    with pytest.raises(WorkerDied, match="died 3 times"):
        pool.submit(fetch, 1).result(timeout=60)
    pool.shutdown()


@dataclass
class Unready:
    def setup(self):
        raise UsageError("the weights are gone")

    def __call__(self, item):
        return {}


def test_a_worker_that_cannot_be_set_up_says_why():
    outcome = run_stage("unready", Unready(), [1, 2, 3], Job(quiet=True), workers=2)
    assert outcome.failed == dict.fromkeys([1, 2, 3], "the weights are gone")


@pytest.mark.parametrize("group", [1, 4])
def test_a_stage_without_items_sets_nothing_up(group):
    """A model is not loaded where shards have only gone, or where a slice has none left."""
    outcome = run_stage("unready", Unready(), [], Job(quiet=True), group=group)
    assert not outcome.done and not outcome.failed


def test_an_unknown_engine_or_a_negative_worker_is_refused():
    with pytest.raises(UsageError, match="unknown engine 'spark'; there are: local, ray"):
        Job(engine="spark")
    with pytest.raises(UsageError, match="workers=-1 is negative"):
        Job(workers=-1)


def test_slices_part_the_items():
    items = list(range(10))
    parts = [Job(part=(rank, 3)).share(items) for rank in range(3)]
    assert sorted(sum(parts, [])) == items and Job().share(items) == items


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_leaves_one_line_elsewhere_than_in_a_terminal(capsys):
    line = Progress("embed", 2)
    line.update(1, 10)
    line.update(2, 20, 1)
    line.close()
    line.close()
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "2/2 shards  20 rows" in printed and "1 failed" in printed


def test_progress_tells_every_ten_seconds_without_a_word_from_anyone(capsys, monkeypatch):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.02)
    line = Progress("embed", 2)
    line.within("a", 4)
    deadline = time.monotonic() + 60
    told = ""
    while told.count("\n") < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
        told += capsys.readouterr().err
    line.close()
    assert told.splitlines()[1].startswith("embed    0/2 shards  4 rows") and "ETA unknown" in told


def test_progress_in_a_terminal_leaves_its_last_state_once(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    line = Progress("embed", 2)
    line.update(1, 10)
    line.write("embed: 00001: [a word] failed")
    line.update(2, 20, 1)
    line.close()
    bar, _, rest = screen.getvalue().rpartition("\x1b[1A\x1b[2K")  # one line up, and that line erased
    assert "[a word] failed" in bar and "━" in bar
    assert rest.startswith("embed    2/2 shards  20 rows") and rest.count("\n") == 1


def test_rows_within_an_item_count_towards_rate_and_remaining_time():
    line = Progress("embed", 4, quiet=True)
    line.update(1, 100)
    line.started -= 10
    assert "100 rows  10 rows/s  ETA 30 s" in line.text()
    line.within("b", 50)
    line.within("c", 50)
    assert "200 rows  20 rows/s  ETA 10 s" in line.text()
    line.end("b")
    line.end("c")
    line.update(3, 300)
    assert "300 rows  30 rows/s  ETA 3 s" in line.text()


@dataclass
class Rows:
    def setup(self):
        """Nothing to prepare."""

    def __call__(self, item):
        for _ in range(3):
            advance(10)
            time.sleep(0.6)
        return {"rows": 30}


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_told_while_their_item_is_at_work(workers):
    told = []
    reports = list(run(Rows(), ["a", "b"], workers=workers, note=lambda item, rows: told.append((item, rows))))
    assert len(reports) == 2
    for item in ("a", "b"):
        rows = [number for name, number in told if name == item]
        assert rows == sorted(rows) and rows[-1] == 30 and len(rows) == 3


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
    outcome = run_stage("device", Device(), list(range(6)), Job(gpus=2, quiet=True), gpu=True)
    devices = {value["process"]: value["device"] for value in outcome.done.values()}
    assert set(devices.values()) == expected and len(devices) == 2
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == visible


def test_names_behind_the_gpus_that_are_seen_are_given_to_no_worker(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6,-1,7")  # of which torch counts two
    outcome = run_stage("device", Device(), list(range(8)), Job(gpus=2, quiet=True), workers=4, gpu=0.5)
    assert {value["device"] for value in outcome.done.values()} == {"5", "6"}


def test_a_stage_that_uses_no_gpu_gets_a_worker_a_core_and_sees_all_of_them(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,6")
    monkeypatch.setattr("curate.engine.cores", lambda: 3)
    outcome = run_stage("device", Device(), list(range(6)), Job(gpus=1, quiet=True))
    assert {value["device"] for value in outcome.done.values()} == {"5,6"}
    assert len({value["process"] for value in outcome.done.values()}) == 3


@dataclass
class Share:
    def setup(self):
        self.share = cores_each()

    def __call__(self, item):
        return {"rows": 1, "share": self.share}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_share_the_cores_of_the_machine_that_they_run_on(workers):
    outcome = run_stage("share", Share(), [1, 2], Job(quiet=True), workers=workers)
    assert {value["share"] for value in outcome.done.values()} == {max(1, cores() // workers)}
