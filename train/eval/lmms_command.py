"""Benchmarks other than the papers': their names are passed to lmms-eval, if it is installed.

lmms-eval runs them in a process of its own, through the model that this package registers (lmms.py), and writes its
results to `OUT/lmms`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from train.config import Eval
from train.errors import TrainError, UsageError, did_you_mean
from train.eval.tasks import TASKS

log = logging.getLogger("train")


def part_tasks(tasks: str) -> tuple[list[str], list[str]]:
    """Split a list of names into the papers' benchmarks and those of lmms-eval.

    Raises: UsageError if there is no name, and for a name that is not ours if lmms-eval is not installed, or under
    torchrun.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--tasks {tasks!r} names no benchmark; known: {', '.join(TASKS)}")
    others = [name for name in names if name not in TASKS]
    if others and importlib.util.find_spec("lmms_eval") is None:
        raise UsageError(
            f"unknown task {others[0]!r}{did_you_mean(others[0], TASKS)}; lmms-eval may know it: pip install lmms-eval"
        )
    if others and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError(f"{others[0]} is one of lmms-eval's tasks, which run in one process; type it without torchrun")
    return [name for name in names if name in TASKS], others


def hand_over(model: Path, tasks: Sequence[str], out: Path, options: Eval) -> None:
    """Let lmms-eval answer and score; its output is shown.  Raises: TrainError if it fails."""
    words = [sys.executable, "-m", "lmms_eval", "--model", "data_curate", "--model_args", f"pretrained={model}"]
    words += ["--tasks", ",".join(tasks), "--batch_size", str(options.batch_size), "--output_path", str(out / "lmms")]
    words += ["--limit", str(options.limit)] if options.limit else []
    log.info("handed to lmms-eval: %s", " ".join(words[1:]))
    done = subprocess.run(words, check=False)
    if done.returncode:
        raise TrainError(f"lmms-eval ended with exit code {done.returncode}; its output above says why")
