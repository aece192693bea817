"""SIGTERM as schedulers and torchrun send it: to the whole process group, the loader's workers among them."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from test_loop import LONG, REPO, assert_same_weights, losses, run

from train.__main__ import main
from train.dist import StopSignal
from train.run.checkpoint import latest, shutdown_advice


def wait_for_steps(metrics, num):
    deadline = time.monotonic() + 120
    while (not metrics.exists() or metrics.read_text().count("\n") < num) and time.monotonic() < deadline:
        time.sleep(0.01)


def assert_stopped_and_saved(out):
    assert not (out / "manifest.json").exists()
    saved = int(latest(out / "checkpoints").name.removeprefix("step-"))
    assert 0 < saved < 400 and saved == (out / "metrics.jsonl").read_text().count("\n")
    return saved


def test_a_signal_to_the_group_saves_and_the_run_goes_on(world, tmp_path):
    """The workers must outlive the signal, or the step in progress fails for want of data."""
    settings = ("finetune.steps=400", "finetune.workers=2", "finetune.save_every=1000")
    out = tmp_path / "run"

    def in_own_group():
        os.setsid()
        main(lambda: run(world, out, *settings))

    process = multiprocessing.get_context("fork").Process(target=in_own_group)
    process.start()
    wait_for_steps(out / "metrics.jsonl", 5)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 143
    saved = assert_stopped_and_saved(out)
    curve = losses(out)
    state = json.loads((latest(out / "checkpoints") / "state.json").read_text())
    assert state["step"] == saved
    shutil.copytree(out, tmp_path / "copy")
    again = multiprocessing.get_context("fork").Process(target=main, args=(lambda: run(world, out, *settings),))
    again.start()
    wait_for_steps(out / "metrics.jsonl", saved + 3)
    again.kill()
    again.join(60)
    assert losses(out)[:saved] == curve and len(losses(out)) >= saved + 3, "it goes on behind what was saved"


def test_two_ranks_under_torchrun_save_when_it_is_told_to_stop(world, tmp_path):
    """torchrun signals each rank's group and kills what is left 30 seconds later."""
    out = tmp_path / "run"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "train"]
    words += ["finetune", "--config", world / "config.toml", "--data", world / "mixed", "--out", out]
    for setting in ("steps=400", "workers=1", "save_every=1000"):
        words += ["--set", f"finetune.{setting}"]
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            words, env=environment, cwd=tmp_path, stderr=said, stdout=said, start_new_session=True
        )
        wait_for_steps(out / "metrics.jsonl", 5)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(60) != 0
    assert_stopped_and_saved(out)
    assert "stopped by a signal after step" in (tmp_path / "said").read_text()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_in_mid_step_ends_the_run_after_that_step(world, tmp_path, monkeypatch, workers):
    """The signal is looked for when the loss is known too, so that no second step is made in the grace time."""
    from train.errors import Interrupted
    from train.run import loop

    made, backward = [], loop.Training._backward

    def signalled(self, step, *given):
        made.append(step)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, step, *given)

    monkeypatch.setattr(loop.Training, "_backward", signalled)
    with pytest.raises(Interrupted, match="after step 3, saved"):
        run(world, tmp_path / "run", f"finetune.workers={workers}")
    assert made == [0, 1, 2] and latest(tmp_path / "run" / "checkpoints").name == "step-000003"
    monkeypatch.setattr(loop.Training, "_backward", backward)
    run(world, tmp_path / "run", f"finetune.workers={workers}")
    assert len(losses(tmp_path / "run")) == 6


def test_a_checkpoint_that_does_not_fit_the_grace_time_says_what_it_needs():
    assert shutdown_advice(20.0, 9.0, 1e9) == ""
    told = shutdown_advice(step_s=4.0, save_s=88.0, size_bytes=30e9)
    assert "30.0 GB" in told and "88 s" in told and "--shutdown-timeout 120" in told


def test_signals_are_noted_and_handlers_restored():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    assert signal.getsignal(signal.SIGTERM) == before


def test_killed_runs_share_the_bits_of_long_ones(world, tmp_path):
    """A stop under workers, resumed, equals the undisturbed run."""
    run(world, tmp_path / "undisturbed", *LONG)
    out = tmp_path / "run"

    def in_own_group():
        os.setsid()
        main(lambda: run(world, out, *LONG, "finetune.workers=1"))

    process = multiprocessing.get_context("fork").Process(target=in_own_group)
    process.start()
    wait_for_steps(out / "metrics.jsonl", 3)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode in (0, 143)
    run(world, out, *LONG, "finetune.workers=1")
    assert losses(out) == losses(tmp_path / "undisturbed")
    assert_same_weights(out, tmp_path / "undisturbed")


def test_sigterm_outside_of_training_ends_in_a_line_and_leaves_nothing_unpacked(tmp_path):
    """While lengths are measured, in eval and export: what is unpacked beside takes as much disk as the data."""
    work = "import time\nfrom train.__main__ import main\nfrom train.data import scratch\n"
    work += "main(lambda: (scratch.fresh('.tar'), print('ready', flush=True), time.sleep(60)))"
    environment = {**os.environ, "PYTHONPATH": str(REPO), "TMPDIR": str(tmp_path)}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", work], env=environment, **streams) as process:
        assert process.stdout.readline() == "ready\n" and any(tmp_path.iterdir())
        process.terminate()
        said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (143, "stopped\n") and not any(tmp_path.iterdir())
