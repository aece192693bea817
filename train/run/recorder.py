"""Metrics of each step: metrics.jsonl, TensorBoard, the progress line on stderr, and a tracker if one is named."""

from __future__ import annotations

import importlib
import json
import logging
import time
from pathlib import Path
from typing import Any, Self

from train.errors import UsageError
from train.folder import whole_file

PROGRESS_EVERY_S = 5.0
CURVES = ("loss", "val_loss", "lr", "grad_norm", "padding", "tokens_per_s", "supervised_per_s")
SPEEDS = ("data_wait_s", "mfu", "peak_memory_gb")
log = logging.getLogger("train")


class Recorder:
    """Record steps as they are done; a resumed run first drops lines of steps that it will repeat."""

    def __init__(self, out: Path, start: int, steps: int, active: bool, tracker: str, settings: dict[str, Any]) -> None:
        self.out, self.start, self.steps, self.active = out, start, steps, active
        self.busy_s = self.shown = 0.0
        self.tracker = open_tracker(tracker, out, settings) if active and tracker else None

    def __enter__(self) -> Self:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter

            path = self.out / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines()[: self.start] if path.exists() else []
            with whole_file(path) as file:
                file.write("".join(line + "\n" for line in lines).encode())
            self.file = path.open("a", encoding="utf-8")
            self.board = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.start)  # type: ignore[no-untyped-call]
        return self

    def write(self, row: dict[str, float]) -> None:
        """Record one step."""
        if not self.active:
            return
        step, seconds = int(row["step"]), row["step_s"]
        self.busy_s += seconds
        row["tokens_per_s"], row["supervised_per_s"] = row["tokens"] / seconds, row["supervised"] / seconds
        row["eta_s"] = self.busy_s / (step - self.start) * (self.steps - step)
        self.file.write(json.dumps({k: round(v, 8) if isinstance(v, float) else v for k, v in row.items()}) + "\n")
        self.file.flush()
        curves = {key: row[key] for key in (*CURVES, *SPEEDS) if key in row}
        for key, value in curves.items():
            self.board.add_scalar(key, value, step)  # type: ignore[no-untyped-call]
        if self.tracker is not None:
            self.tracker.log(curves, step=step)
        if "val_loss" in row:
            log.info("step %d/%d  validation loss %.4f", step, self.steps, row["val_loss"])
        now = time.monotonic()
        if now - self.shown >= PROGRESS_EVERY_S or step == self.steps:
            self.shown = now
            log.info(
                "step %d/%d  loss %.4f  lr %.2e  %s tokens/s  wait %.0f%%  ETA %.0f s",
                *(step, self.steps, row["loss"], row["lr"], f"{row['tokens_per_s']:,.0f}"),
                *(100 * row["data_wait_s"] / seconds, row["eta_s"]),
            )

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.file.close()
            self.board.close()  # type: ignore[no-untyped-call]
        if self.tracker is not None:
            self.tracker.finish()


def open_tracker(name: str, out: Path, settings: dict[str, Any]) -> Any:
    """Start a run of trackio or wandb, which share an interface.  Raises: UsageError where it is not installed."""
    try:
        tracker = importlib.import_module(name)
    except ImportError:
        raise UsageError(f"tracker = {name!r} is not installed; type: pip install {name}") from None
    tracker.init(project="train", name="-".join(out.resolve().parts[-2:]), config=settings)
    return tracker
