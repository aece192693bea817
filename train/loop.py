"""The optimisation loop: AdamW, linear warm-up and cosine to zero, one process or one of several under torchrun.

The loss of a step is the sum over its supervised tokens, in all micro-batches of all processes, divided by their
number. Gradients are summed across processes by hand, once a step: what learns is small, and a process whose samples
have no image then needs no special case. Each micro-batch seeds its own dropout, so that a resumed run repeats an
undisturbed one.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train import checkpoint
from train.batches import Batch, Collator, Images, Plan, Steps, load
from train.checkpoint import PROJECTOR
from train.config import Stage
from train.data import check_bad
from train.errors import Interrupted, TrainError
from train.flops import Cost, peak_flops, peak_memory_gb
from train.model import Composed, hidden_states, token_losses, tower_features

FEATURE_CHUNK = 64  # images whose cached features are computed together; fixed, so that resuming repeats them
PROGRESS_EVERY_S = 5.0
CURVES = ("loss", "lr", "grad_norm", "padding", "tokens_per_s", "supervised_per_s", "data_wait_s")
log = logging.getLogger("train")


@dataclass(frozen=True)
class Place:
    """Where this process runs and how it computes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products and of frozen weights
    rank: int
    world: int
    reason: str

    @classmethod
    def find(cls, precision: str, workers: int) -> Self:
        """Choose device, precision and threads, and join the other processes where torchrun started several."""
        world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        if not cuda and "OMP_NUM_THREADS" not in os.environ:
            # Threads that wait for a core which decodes make each matrix product wait: measured 4 times slower.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world - workers))
        if world > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        bf16 = precision == "bf16" or (precision == "auto" and cuda and torch.cuda.is_bf16_supported())
        why = f"{precision} was asked for" if precision != "auto" else "the GPU has it" if bf16 else "no GPU with bf16"
        reason = f"{device}, {'bf16 with fp32 masters' if bf16 else 'fp32'} ({why}), {world} process(es)"
        return cls(device, torch.bfloat16 if bf16 else torch.float32, rank, world, reason)

    def autocast(self) -> Any:
        """Return the context of the forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.dtype == torch.bfloat16 else nullcontext()

    def total(self, values: list[float]) -> list[float]:
        """Sum numbers over all processes."""
        if self.world == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return [float(x) for x in tensor]


class StopSignal:
    """Note SIGTERM and SIGINT, so that the step in progress can end and be saved."""

    def __init__(self) -> None:
        self.received = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        def note(_number: int, _frame: FrameType | None) -> None:
            self.received = True

        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclass
class Training:
    """One stage under way."""

    composed: Composed
    stage: Stage
    trainable: Mapping[str, nn.Parameter]
    plan: Plan
    collator: Collator
    place: Place
    out: Path
    skipped: dict[int, str]  # sample index -> reason, found so far
    features: FeatureCache | None = None
    cost: Cost = field(init=False)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end.

        Raises: Interrupted after a signal, with a checkpoint written; TrainError for a loss that is not a number.
        """
        optimizer = make_optimizer(self.stage, self.trainable)
        start = self._resume(optimizer)
        if start >= self.plan.steps:
            return
        self.cost = Cost.of(self.composed, self.stage)
        peak = peak_flops(self.place.device, self.place.dtype, self.stage.peak_tflops)
        dataset = Steps(self.plan, self.collator, self.place.rank, self.place.world)
        cuda = self.place.device.type == "cuda"
        batches = iter(load(dataset, range(start, self.plan.steps), self.stage.workers, cuda))
        with StopSignal() as stop, Recorder(self.out, start, self.plan.steps, self.place.rank == 0) as recorder:
            for step in range(start, self.plan.steps):
                began = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - began
                row, stopping = self._step(step, micro_batches, optimizer, stop.received)
                seconds = time.perf_counter() - began
                if peak:
                    row["mfu"] = row["tflop"] * 1e12 / (seconds * peak * self.place.world)
                row["peak_memory_gb"] = peak_memory_gb(self.place.device)
                recorder.write({**row, "data_wait_s": waited, "step_s": seconds})
                done = step + 1
                if stopping or done == self.plan.steps or done % self.stage.save_every == 0:
                    self._save(done, optimizer)
                if stopping and done < self.plan.steps:
                    raise Interrupted(f"stopped by a signal after step {done}, saved; the same command goes on")

    def _step(
        self, step: int, micro_batches: list[Batch], optimizer: torch.optim.Optimizer, stop: bool
    ) -> tuple[dict[str, float], bool]:
        own = [len(b.targets_s) for b in micro_batches]
        counts = [sum(own), sum(b.num_tokens for b in micro_batches), sum(b.ids_bl.numel() for b in micro_batches)]
        counts += [sum(len(b.skipped) for b in micro_batches), int(stop), sum(n > 0 for n in own)]
        cached = self.features is not None
        useful = sum(self.cost.flops(b, cached=cached) for b in micro_batches)
        totals = self.place.total([*map(float, counts), useful])
        supervised, tokens, padded, skipped, stopping, filled, flops = totals
        if skipped:
            self._note_skipped(micro_batches)
        loss = 0.0
        for i, batch in enumerate(micro_batches):
            if len(batch.targets_s):
                torch.manual_seed((self.stage.seed * 1_000_003 + step) * 1_009 + i * self.place.world + self.place.rank)
                share = supervised if self.stage.loss_norm == "token" else len(batch.targets_s) * filled
                loss += self._backward(batch, share)
        loss = self.place.total([loss])[0]
        if not math.isfinite(loss):
            self._refuse_nan(step, micro_batches, loss)
        self._sum_gradients()
        parameters = list(self.trainable.values())
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.clip or math.inf)
        factor = schedule(step, self.plan.steps, self.stage.warmup)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = parameter_group["peak_lr"] * factor
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": loss, "lr": self.stage.lr * factor, "grad_norm": float(norm)}
        row |= {"tokens": int(tokens), "supervised": int(supervised), "padding": 1 - tokens / max(1.0, padded)}
        row["tflop"] = flops / 1e12
        return row, stopping > 0

    def _backward(self, batch: Batch, normaliser: float) -> float:
        try:
            batch = batch.to(self.place.device)
            with self.place.autocast():
                loss = self.token_losses(batch).sum() / normaliser
            loss.backward()  # type: ignore[no-untyped-call]
        except torch.OutOfMemoryError:
            raise TrainError(
                f"out of memory with {batch.ids_bl.numel():,} positions at once; lower micro_tokens "
                f"(now {self.stage.micro_tokens:,}), or set model.gradient_checkpointing = true"
            ) from None
        return float(loss.detach())

    def token_losses(self, batch: Batch) -> Tensor:
        """Return the loss f32 [s] of each supervised position."""
        feats = None
        if self.features is not None and batch.images:
            feats = self.features.get(batch.images).to(self.place.device)
        elif batch.pixels_nchw is not None:
            feats = tower_features(self.composed, batch.pixels_nchw, tuned=self.stage.tune_tower)
        hidden = hidden_states(self.composed, batch.ids_bl, batch.positions_bl, feats)
        return token_losses(self.composed.model, hidden.flatten(0, 1)[batch.supervised_s], batch.targets_s)

    def _sum_gradients(self) -> None:
        for parameter in self.trainable.values():
            if parameter.grad is None:  # text alone gives the projector none
                parameter.grad = torch.zeros_like(parameter)
        if self.place.world > 1:
            gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
            flat = torch.cat([g.reshape(-1) for g in gradients])
            dist.all_reduce(flat)
            for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))

    def _note_skipped(self, micro_batches: list[Batch]) -> None:
        found = {index: reason for batch in micro_batches for index, reason in batch.skipped.items()}
        if self.place.world > 1:
            everyone: list[dict[int, str]] = [{}] * self.place.world
            dist.all_gather_object(everyone, found)
            found = {index: reason for part in everyone for index, reason in part.items()}
        new = {index: reason for index, reason in sorted(found.items()) if index not in self.skipped}
        self.skipped |= new
        if new:
            index, reason = next(iter(new.items()))
            log.warning("skipped %d sample(s), e.g. %s (%s)", len(new), self.collator.source.name(index), reason)
            check_bad(self.collator.source, self.skipped, self.stage.max_bad_share)

    def _refuse_nan(self, step: int, micro_batches: list[Batch], loss: float) -> None:
        indices = sorted({int(i) for batch in micro_batches for i in batch.owners_s})
        path = self.out / f"not-a-number-{step + 1:06d}-{self.place.rank}.json"
        path.write_text(json.dumps([self.collator.source.name(i) for i in indices], indent=1), encoding="utf-8")
        raise TrainError(f"the loss of step {step + 1} is {loss}; its samples are listed in {path}; try a lower lr")

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        path = checkpoint.latest(self.out / "checkpoints")
        if path is None:
            return 0
        state = checkpoint.restore(path, self.trainable, optimizer)
        self.skipped |= {int(index): reason for index, reason in state["skipped"].items()}
        log.info("going on from %s", path)
        return int(state["step"])

    def _save(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        if self.place.rank == 0:
            state = {"skipped": {str(i): r for i, r in sorted(self.skipped.items())}}
            folder = self.out / "checkpoints"
            checkpoint.save(folder, step, self.trainable, optimizer, state, self.stage.keep_last)
        if self.place.world > 1:
            dist.barrier()


class FeatureCache:
    """The frozen tower's features of every image, computed once, in sample order and in chunks of fixed size."""

    def __init__(self, training: Training) -> None:
        plan, vision = training.plan, training.composed.vision
        tower = training.composed.model.model.vision_tower
        samples = [int(i) for i in plan.usable if plan.measured.images[i] and int(i) not in training.skipped]
        total = int(plan.measured.images[samples].sum()) if samples else 0
        shape = (total, vision.tokens_per_image, tower.config.hidden_size)
        self.table = torch.empty(shape, dtype=training.place.dtype)
        self.at: dict[int, tuple[int, int]] = {}
        filled, pending = 0, []
        loader = load(Images(training.collator), samples, training.stage.workers, False)
        for index, (pixels, reason) in zip(samples, loader, strict=True):
            if pixels is None:
                training.skipped[index] = training.collator.skip[index] = reason
                continue
            self.at[index] = (filled, filled + len(pixels))
            filled += len(pixels)
            pending.append(pixels)
            if sum(map(len, pending)) >= FEATURE_CHUNK:
                self._flush(training, pending, filled)
                pending = []
        if pending:
            self._flush(training, pending, filled)
        check_bad(training.collator.source, training.skipped, training.stage.max_bad_share)
        training.collator.decode = False

    def _flush(self, training: Training, pending: list[Tensor], end: int) -> None:
        pixels = torch.cat(pending).to(training.place.device)
        with training.place.autocast():
            out = tower_features(training.composed, pixels)
        self.table[end - len(pixels) : end] = out.to(self.table.dtype).cpu()

    def get(self, images: list[int]) -> Tensor:
        """Return [n, tokens, width] for images given by sample, one entry an image, those of a sample side by side."""
        rows = [row for i in dict.fromkeys(images) for row in range(*self.at[i])]
        if len(rows) != len(images):  # one sample twice in a batch
            seen: dict[int, int] = {}
            rows = []
            for i in images:
                first, last = self.at[i]
                rows.append(first + seen.get(i, 0) % (last - first))
                seen[i] = seen.get(i, 0) + 1
        return self.table[rows]


def cache_features(training: Training) -> None:
    """Keep the tower's features in memory where the stage allows it, they fit, and each is used at least once."""
    stage, plan = training.stage, training.plan
    if not stage.cache_features_mb or stage.tune_tower:
        return
    tokens, width = training.composed.vision.tokens_per_image, training.composed.model.config.vision_config.hidden_size
    megabytes = int(plan.measured.images.sum()) * tokens * width * training.place.dtype.itemsize / 1e6
    if megabytes > stage.cache_features_mb:
        log.info("features are not cached: %.0f MB, cache_features_mb = %d", megabytes, stage.cache_features_mb)
    elif plan.num_samples >= len(plan.usable):
        training.features = FeatureCache(training)
        log.info("features of %d images cached (%.0f MB)", len(training.features.table), megabytes)


class Recorder:
    """metrics.jsonl, TensorBoard and the progress line; lines behind the resumed step are dropped first."""

    def __init__(self, out: Path, start: int, steps: int, active: bool) -> None:
        self.out, self.start, self.steps, self.active = out, start, steps, active
        self.busy_s = self.shown = 0.0

    def __enter__(self) -> Self:
        if self.active:
            from torch.utils.tensorboard import SummaryWriter

            path = self.out / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines()[: self.start] if path.exists() else []
            partial = path.with_name(".metrics.partial")
            partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            partial.replace(path)
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
        for key in (*CURVES, "mfu", "peak_memory_gb"):
            if key in row:
                self.board.add_scalar(key, row[key], step)  # type: ignore[no-untyped-call]
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


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the factor on the learning rate of a step, counted from 0: a linear rise, then a cosine to zero."""
    rise = math.ceil(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def make_optimizer(stage: Stage, trainable: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
    """Build AdamW with the projector (and tower) at `projector_lr`, decay on matrices only."""
    groups = []
    for in_projector in (True, False):
        for matrix in (True, False):
            near = (PROJECTOR, "model.vision_tower.")
            parameters = [
                p for n, p in trainable.items() if n.startswith(near) == in_projector and (p.ndim >= 2) == matrix
            ]
            lr = (stage.projector_lr or stage.lr) if in_projector else stage.lr
            decay = stage.weight_decay if matrix else 0.0
            if parameters:
                groups.append({"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=stage.betas)
