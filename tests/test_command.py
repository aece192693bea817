"""What a verb says and how it ends when shards fail."""

import os
import subprocess
import sys

import numpy as np
import pytest
import typer
from warm import Command

from curate import command
from curate.command import Run
from curate.engine import Job
from house import ROOT, curate


def source(folder, *, broken=("b",), good=("a",), vectors=None):
    """Published embeddings: one file a part, of which some are no arrays."""
    folder.mkdir()
    for name in good:
        np.save(folder / f"{name}.npy", np.eye(4, 8, dtype=np.float32) if vectors is None else vectors)
    for name in broken:
        (folder / f"{name}.npy").write_bytes(b"not an array")
    return folder


def ended(folder, *more, **options):
    return curate("import", folder, folder.parent / "emb", "--layout", "npy", *more, check=False, **options)


def test_a_lasting_fault_is_not_to_be_tried_again_and_its_traceback_is_there_for_who_asks(tmp_path):
    folder = source(tmp_path / "npy")
    plain = ended(folder)
    assert plain.returncode == 1 and "Traceback" not in plain.stderr
    assert "1 shard(s) failed: b; `curate show" in plain.stderr and "again" not in plain.stderr
    told = ended(folder, "--verbose")
    assert told.returncode == 1 and told.stderr.count("Traceback") >= 1 and "layouts.py" in told.stderr
    log = tmp_path / "curate.log"
    kept = ended(folder, env={**os.environ, "CURATE_LOG": str(log)})
    assert "Traceback" not in kept.stderr and "layouts.py" in log.read_text()


def test_a_traceback_crosses_from_a_worker(tmp_path):
    told = ended(source(tmp_path / "npy", broken=("b", "c")), "--workers", "2", "--verbose")
    assert told.returncode == 1 and told.stderr.count("Traceback") >= 2


def test_a_total_failure_says_that_nothing_was_made(tmp_path):
    told = ended(source(tmp_path / "npy", good=()))
    assert told.returncode == 1 and told.stdout.startswith("import: made nothing")


def test_a_verb_of_which_no_row_is_usable_ends_with_one(tmp_path):
    folder = source(tmp_path / "npy", broken=(), vectors=np.zeros((3, 8), np.float32))
    for _ in range(2):  # and so does the command that finds it finished
        told = ended(folder)
        assert told.returncode == 1 and "no row of" in told.stderr and "3 bad embedding" in told.stderr


@pytest.mark.parametrize(
    "passing, expected",
    [
        ({"a", "b"}, "2 shard(s) failed: a, b; run the same command again to retry"),
        ({"a"}, "2 shard(s) failed: a, b; `curate show out` says why; for 1 of them, running again may help"),
        (set(), "2 shard(s) failed: a, b; `curate show out` says why"),
    ],
)
def test_a_retry_is_advised_where_it_may_help(passing, expected, capsys):
    with pytest.raises(typer.Exit) as end:
        Run("emit", Job(passing=passing)).make("out", lambda job: {"failed": {"a": "no", "b": "no"}})
    assert end.value.exit_code == 1 and capsys.readouterr().err.strip() == expected


def test_commands_of_tests_start_with_both_programs_imported(tmp_path):
    (tmp_path / "look.py").write_text("import sys\nprint(*({'curate.command', 'train.data.prompts'} - {*sys.modules}))")
    looked = Command(tmp_path / "look.py", cwd=tmp_path)
    assert (looked.wait(), looked.stdout.split()) == (0, [])


INTERRUPTED = """
import sys
from {program}
from {module} import {place}
def stop(*_, **__):
    raise KeyboardInterrupt
{place}.{function} = stop
sys.argv = {argv}
main()
"""
BEGINS = """
import os, signal
from curate.processes import Processes
def held_back():
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
if __name__ == "__main__":
    with Processes(os.getpid, [()]) as processes:
        print(processes.submit(held_back).result(), held_back())
"""


@pytest.mark.parametrize(
    "program, module, place, function, argv",
    [
        ("curate.cli import main", "curate.report", "show_steps", "step_lines", ["curate", "steps"]),
        ("train.__main__ import main", "train", "config", "load", ["train", "check"]),
        ("curate.cli import main", "typer.core", "TyperGroup", "make_context", ["curate", "steps"]),
    ],
)
def test_ctrl_c_is_answered_in_one_line(program, module, place, function, argv):
    code = INTERRUPTED.format(program=program, module=module, place=place, function=function, argv=argv)
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 130 and told.stderr.startswith("stopped") and told.stderr.count("\n") == 1, told.stderr


SIGNALLED = """
import os, signal, sys
from curate.cli import main
from curate.report import show_steps
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError
if "term" in sys.argv:
    show_steps.step_lines = stop
else:
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
sys.argv = ["curate", "steps"]
main()
"""


@pytest.mark.parametrize(
    "when, code, said", [("term", 143, "stopped; run the same command again to resume\n"), ("last", -2, "")]
)
def test_sigterm_is_answered_as_ctrl_c_is_and_neither_is_a_traceback_at_the_end(when, code, said):
    told = subprocess.run([sys.executable, "-c", SIGNALLED, when], cwd=ROOT, capture_output=True, text=True)
    assert (told.returncode, told.stderr) == (code, said)


def test_a_reader_that_has_gone_is_no_failure():
    reader, writer = os.pipe()
    os.close(reader)
    told = subprocess.run([sys.executable, "-m", "curate", "steps"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (told.returncode, told.stderr) == (0, b"")


@pytest.mark.parametrize("program", ["curate", "train"])
def test_closed_streams_are_no_failure(program, tmp_path):
    verb = {"curate": f"select {tmp_path}/none {tmp_path}/x", "train": f"export {tmp_path}/none --out {tmp_path}/x"}
    line = f"exec {sys.executable} -m {program} {verb[program]} >&- 2>&-"
    assert subprocess.run(["sh", "-c", line], cwd=ROOT).returncode == 2  # the request was wrong, which nobody hears


def test_ctrl_c_does_not_reach_a_process_that_is_about_to_start(tmp_path):
    """It would end in a traceback of Python's own: what tells it to pay no heed is not imported yet."""
    (tmp_path / "begins.py").write_text(BEGINS)
    told = subprocess.run([sys.executable, "begins.py"], cwd=tmp_path, capture_output=True, text=True)
    assert told.stdout == "True False\n", told.stderr


def test_names_that_command_a_terminal_are_printed_without_their_commands(tmp_path):
    """Escapes, an order of writing, and bytes that are no UTF-8: in lines of faults, of failures and of errors."""
    folder = tmp_path / "in\x1b[31m\u202e"
    folder.mkdir()
    for name in ("a.jpg", "b\nc.jpg", "d\x1b]0;title\x07.md", "\x9b31m.md"):
        (folder / name).write_bytes(b"x")
    for out in ("pool\x1b[2J", "pool\udcff"):
        told = curate("pack", folder, tmp_path / out)
        assert told.returncode == 0 and "files passed over: .md" in told.stderr
        refused = curate("pack", tmp_path / "none\x1b[1m", tmp_path / out, check=False)
        assert refused.returncode == 2 and refused.stderr.startswith("error: ")
        for text in (told.stdout, told.stderr, refused.stderr):
            assert all(letter.isprintable() for line in text.split("\n") for letter in line)


def test_gpus_are_counted_where_any_driver_is(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr(command, "DRIVERS", [str(tmp_path / "none"), str(tmp_path / "dxg")])
    assert command._gpus() == 0
    (tmp_path / "dxg").touch()
    assert command._gpus() == 3
