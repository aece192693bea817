"""Runs that are disturbed from outside: processes killed one by one, disks that fill, folders that go away.

tests/bench/kills.py does the same at length, on two engines.
"""

import errno
import gzip
import os
import random
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from curate.engine import Job, run_stage
from curate.errors import RunError
from house import CLIP, PATIENCE_S, ROOT, Command, curate, fingerprint, tree, until


@dataclass
class Failing:
    """Fail at item 3 with an error of the file system; count what was tried in a folder."""

    folder: str
    error: OSError
    move: str = ""

    def setup(self):
        """Nothing to prepare."""

    def __call__(self, item):
        Path(self.folder, f"tried-{item}").touch()
        if item == 3:
            if self.move:
                os.rename(self.move, self.move + ".away")
                os.mkdir(self.move)
                return {"rows": 1}
            raise self.error
        return {"rows": 1}


def stage(tmp_path, error, workers, **more):
    task = Failing(str(tmp_path), error, **more)
    return run_stage("emit", task, list(range(500)), Job(workers=workers, quiet=True), places=(str(tmp_path / "out"),))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE, errno.ENOTCONN])
def test_an_error_of_the_place_ends_a_stage_at_once(tmp_path, code, workers):
    if workers == 2 and code != errno.ENOSPC:
        return
    with pytest.raises(RunError, match=f"emit: 3: .*{os.strerror(code)}") as refused:
        stage(tmp_path, OSError(code, os.strerror(code)), workers)
    assert refused.value.exit_code == 1 and "resumes" in str(refused.value)
    assert len(list(tmp_path.glob("tried-*"))) < 20


def test_a_file_that_cannot_be_made_ends_a_stage_and_one_that_cannot_be_read_does_not(tmp_path):
    denied = os.strerror(errno.EACCES)
    with pytest.raises(RunError, match="Permission denied"):
        stage(tmp_path, PermissionError(errno.EACCES, denied, str(tmp_path / "new.tmp")), 1)
    with pytest.raises(RunError, match="No such file"):
        stage(tmp_path, FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "gone" / "a.tar")), 1)
    (tmp_path / "a.tar").touch()
    assert len(stage(tmp_path, PermissionError(errno.EACCES, denied, str(tmp_path / "a.tar")), 1).done) == 499
    outcome = stage(tmp_path, FileNotFoundError(errno.ENOENT, "No such file", str(tmp_path / "b.tar")), 1)
    assert list(outcome.failed) == [3] and not outcome.passing
    outcome = stage(tmp_path, OSError(errno.EIO, "Input/output error"), 1)
    assert list(outcome.failed) == [3] and outcome.passing == {3}


def test_a_directory_that_is_another_than_before_ends_a_stage(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match=r"out no longer exists \(a lost mount\?\)"):
        stage(tmp_path, OSError(), 1, move=str(tmp_path / "out"))
    assert len(list(tmp_path.glob("tried-*"))) == 4


@pytest.fixture(scope="module")
def pool(tmp_path_factory, demo):
    """Eight small shards, and what an undisturbed run makes of them."""
    from curate.demo.render import render

    home = tmp_path_factory.mktemp("disturbed")
    render(home / "demo", rows=240, seed=5, shards=8, dirt="dirty", instruct=0, tests=0)
    curate(*words(home, home / "whole" / "emb"))
    return home


def words(home, out, *more):
    return ["embed", home / "demo" / "pool", out, "--model", CLIP, *more]


def test_a_run_one_by_one_of_whose_processes_are_killed_ends_right(pool):
    typed = words(pool, pool / "killed" / "emb", "--workers", "2", "--decoders", "1")
    rng, struck = random.Random(7), 0
    running = Command("curate", *typed, cwd=ROOT)

    def strike():
        nonlocal struck
        others = tree(running.pid)
        if struck < 4 and len(others) > 4 and rng.random() < 0.2:
            os.kill(rng.choice(others), signal.SIGKILL)
            struck += 1
        return running.poll() is not None

    try:
        until(strike, 0.05)
        assert running.returncode == 0, running.stderr
    finally:
        running.kill()
    assert struck and fingerprint(pool / "killed" / "emb") == fingerprint(pool / "whole" / "emb")
    until(lambda: not tree(running.pid))


def test_a_disk_that_fills_ends_the_run_with_one_line_and_the_rerun_goes_on(pool):
    limits = {"RLIMIT_FSIZE": 10_000}
    ended = curate(*words(pool, pool / "limited" / "emb"), check=False, limits=limits)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: embed: ") and "File too large" in last and "resumes" in last
    assert ended.stderr.count("File too large") == 1, "no other shard was tried"
    curate(*words(pool, pool / "limited" / "emb"))
    assert fingerprint(pool / "limited" / "emb") == fingerprint(pool / "whole" / "emb")


@pytest.fixture
def small_disk(pool):
    """A file system of 60 kB, where this process may mount one."""
    place = pool / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    made = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=60k", "none", place], capture_output=True)
    if not made or made.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", "-l", place], check=False, capture_output=True)


def test_a_full_file_system_ends_the_run_and_room_lets_it_go_on(pool, small_disk):
    ended = curate(*words(pool, small_disk / "emb", "--workers", "2"), check=False)
    assert ended.returncode == 1 and "No space left on device" in ended.stderr and "Traceback" not in ended.stderr
    assert ended.stderr.count("No space left") == 1
    subprocess.run(["mount", "-o", "remount,size=50m", small_disk], check=True)
    curate(*words(pool, small_disk / "emb"))
    assert fingerprint(small_disk / "emb") == fingerprint(pool / "whole" / "emb")


UNPACKS = """
import os, signal, sys
from curate.storage.tar import local_tar
with local_tar(sys.argv[1]) as path:
    print(open(path, "rb").read() == b"as it was" * 999, *os.listdir(os.environ["TMPDIR"]), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_of_what_a_killed_process_has_unpacked_nothing_stays(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"as it was" * 999))
    (tmp_path / "here").mkdir()
    words = [sys.executable, "-c", UNPACKS, tmp_path / "a.tar.gz"]
    here = {**os.environ, "TMPDIR": str(tmp_path / "here")}
    told = subprocess.run(words, cwd=ROOT, env=here, capture_output=True, text=True)
    assert (told.returncode, told.stdout.split()[0]) == (-signal.SIGKILL, "True"), told.stderr
    assert not list((tmp_path / "here").iterdir())


CARRIES_OUT = """
import signal, sys
from curate.run import stages
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background of a script ignores it
from pipelines.terminal import stoppable
TRAINER = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(time.sleep(1) or print('saved')))"
with stoppable():
    stages._carry_out([sys.executable, "-c", TRAINER + "; print('begun', flush=True); time.sleep(600)"])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pipeline_that_is_stopped_lets_its_trainer_save(number):
    with subprocess.Popen([sys.executable, "-c", CARRIES_OUT], cwd=ROOT, stdout=-1, stderr=-1, text=True) as running:
        assert running.stdout.readline() == "begun\n"
        running.send_signal(number)
        try:
            assert running.communicate(timeout=PATIENCE_S)[0] == "saved\n"
        finally:
            running.kill()


def test_a_trainer_ends_with_the_pipeline_that_is_killed():
    code = "import sys; from curate.run.stages import _carry_out; _carry_out([sys.executable, '-m', 'train', 'work'])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdin=-1, stdout=-1) as running:
        running.stdin.write(b'["no-such-verb"]\n')
        running.stdin.flush()
        assert running.stdout.readline()  # it is up, and waits for more
        running.kill()
        ready, _, _ = select.select([running.stdout], [], [], PATIENCE_S)
        assert ready and running.stdout.read() == b"", "the trainer goes on"
