"""One of several processes does a piece of work, whatever happens to the others."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from curate.storage import claim


def work_once(folder, pause_s, dead_s):
    """Leave a mark for each time the work was begun, and a file once it is done."""
    claim.DEAD_S, claim.BEAT_S, claim.POLL_S = dead_s, 0.1, 0.05
    folder = Path(folder)

    def work():
        (folder / f"begun-{os.getpid()}").touch()
        time.sleep(pause_s)
        (folder / "done").touch()

    claim.once(str(folder / ".claim"), (folder / "done").exists, work)
    (folder / f"returned-{os.getpid()}").touch()


def start(folder, pause_s=0.5, dead_s=60.0):
    child = multiprocessing.get_context("spawn").Process(target=work_once, args=(str(folder), pause_s, dead_s))
    child.start()
    return child


def wait_for(folder, pattern):
    while not (found := list(folder.glob(pattern))):
        time.sleep(0.01)
    return found


def test_of_five_processes_one_does_the_work_and_all_return(tmp_path):
    children = [start(tmp_path) for _ in range(5)]
    for child in children:
        child.join()
        assert child.exitcode == 0
    assert len(list(tmp_path.glob("begun-*"))) == 1 and len(list(tmp_path.glob("returned-*"))) == 5
    assert not list(tmp_path.glob(".claim*"))


@pytest.mark.parametrize("how, dead_s", [(signal.SIGKILL, 60.0), (signal.SIGSTOP, 1.0)])
def test_the_work_of_a_process_that_is_killed_or_stands_still_is_taken_over(tmp_path, how, dead_s):
    first = start(tmp_path, pause_s=600)
    wait_for(tmp_path, "begun-*")
    os.kill(first.pid, how)
    if how == signal.SIGKILL:
        first.join()
    second = start(tmp_path, pause_s=0.1, dead_s=dead_s)
    second.join()
    assert second.exitcode == 0 and (tmp_path / f"begun-{second.pid}").exists()
    os.kill(first.pid, signal.SIGKILL) if how == signal.SIGSTOP else None
    first.join()


def test_work_that_fails_is_free_for_the_next(tmp_path):
    place, made = str(tmp_path / ".claim"), []

    def fail():
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        claim.once(place, lambda: bool(made), fail)
    claim.once(place, lambda: bool(made), lambda: made.append(1))
    assert made == [1] and not list(tmp_path.iterdir())


def test_a_claim_at_a_url_is_one_too(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "REMOTE_SETTLE_S", 0.01)
    made = []
    claim.once("memory://claims/.claim", lambda: bool(made), lambda: made.append(1))
    assert made == [1] and not claim._read("memory://claims/.claim")
