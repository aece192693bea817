"""The optimisation loop: AdamW, linear warm-up, then a cosine to zero (or a plateau first), one process or several.

The loss of a step is the sum over its supervised tokens, in all micro-batches of all processes, divided by their
number. Gradients are summed across processes explicitly, once per step: the trained part is usually small, and a
process whose samples have no image then needs no special case (sharding.py is for a large trained part). Each
micro-batch seeds its own dropout, so that a resumed run repeats an undisturbed one.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from train.config import Stage
from train.data.batches import Batch, Collator, Passes, Plan, shared_memory_advice
from train.data.sources import check_bad
from train.dist import Runtime, StopSignal, sum_gradients
from train.errors import CheckpointError, Interrupted, TrainError
from train.model.attention import upload
from train.model.compose import Composed
from train.model.forward import hidden_states, token_losses, tower_features
from train.run import checkpoint, sharding
from train.run.base import check_base
from train.run.cache import FeatureCache
from train.run.flops import Cost, peak_flops
from train.run.losses import SampleLosses
from train.run.memory import OutOfMemory, out_of_memory
from train.run.optimizer import make_optimizer, schedule
from train.run.recorder import Recorder
from train.run.validation import Validation

log = logging.getLogger("train")


@dataclass
class Training:
    """One running stage."""

    composed: Composed
    stage: Stage
    trainable: Mapping[str, nn.Parameter]
    plan: Plan
    collator: Collator
    runtime: Runtime
    out: Path
    skipped: dict[int, str]  # sample index -> reason, found so far
    features: FeatureCache | None = None
    sample_losses: SampleLosses | None = None
    validation: Validation | None = None
    base: Mapping[str, object] = field(default_factory=dict)  # what the run depends on (base.py)
    cost: Cost = field(init=False)
    _told_grace: bool = field(init=False, default=False)
    _halved: bool = field(init=False, default=False)

    def run(self) -> None:
        """Train from the last checkpoint, or from the start, to the end.

        Raises: Interrupted after a signal, with a checkpoint written; TrainError for a loss that is not a number.
        """
        for _ in self.steps():
            pass

    def steps(self) -> Iterator[int]:
        """Train like `run`, but yield the number of steps done after each step."""
        optimizer = make_optimizer(self.stage, self.trainable, fused=self.runtime.device.type == "cuda")
        start = self._resume(optimizer)
        if start >= self.plan.steps:
            return
        self.cost = Cost.of(self.composed, self.stage)
        peak = peak_flops(self.runtime.device, self.runtime.dtype, self.stage.peak_tflops)
        recorder = Recorder(
            *(self.out, start, self.plan.steps, self.runtime.rank == 0, self.stage.tracker),
            settings=dataclasses.asdict(self.stage),
        )
        since: list[float] = []  # losses since the last checkpoint
        with StopSignal() as stop, recorder, checkpoint.Writer() as writer:
            batches = self.batches(start)
            for step in range(start, self.plan.steps):
                began = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - began
                outcome = None
                try:
                    outcome = self._step(step, micro_batches, optimizer, stop)
                except OutOfMemory:
                    if not self._may_halve():
                        raise
                if outcome is None:  # not in the handler: its error keeps the failed pass's tensors alive
                    self._halve_passes(optimizer)
                    # The workers hold the old plan, and batches made by it.
                    batches = self.batches(step)
                    outcome = self._step(step, next(batches), optimizer, stop)
                row, stopping = outcome
                seconds = time.perf_counter() - began
                if peak:
                    row["mfu"] = row["tflop"] * 1e12 / (seconds * peak * self.runtime.world)
                row["peak_memory_gb"] = self.runtime.peak_memory_gb()
                since.append(row["loss"])
                done = step + 1
                due = done == self.plan.steps or done % self.stage.save_every == 0
                # A stop leaves no time to validate; and if its checkpoint could be the best, a stopped run would
                # choose among other weights than an undisturbed one.
                state = {"loss": sum(since) / len(since)} if due else {}
                if due and self.validation is not None:
                    row["val_loss"] = state["val_loss"] = self._validate()
                recorder.write({**row, "data_wait_s": waited, "step_s": seconds})
                if due or stopping:
                    self._save(done, optimizer, state, writer)
                    since.clear()
                    self._tell_grace(seconds, writer)
                if stopping and done < self.plan.steps:
                    writer.wait()
                    self.runtime.barrier()  # a rank that exits before the checkpoint is complete would end the others
                    raise Interrupted(f"stopped by a signal after step {done}, saved; the same command resumes")
                yield done
            writer.wait()

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """Yield this rank's micro-batches of each step; warn first if shared memory may not hold them."""
        runtime, workers = self.runtime, self.stage.num_workers
        if workers and self.collator.decode and os.path.isdir("/dev/shm"):
            size, free = self.composed.vision.image_bytes, shutil.disk_usage("/dev/shm").free
            if advice := shared_memory_advice(self.plan, workers, runtime.world, size, free):
                log.warning("%s", advice)
        passes = Passes(self.plan, self.collator, runtime.rank, runtime.world)
        return passes.steps(start, self.plan.steps, workers, runtime.device.type == "cuda")

    def _step(
        self, step: int, micro_batches: list[Batch], optimizer: torch.optim.Optimizer, stop: StopSignal
    ) -> tuple[dict[str, float], bool]:
        own = [len(b.targets_s) for b in micro_batches]
        counts = [sum(own), sum(b.num_tokens for b in micro_batches), sum(b.ids_bl.numel() for b in micro_batches)]
        counts += [sum(len(b.skipped) for b in micro_batches)]
        useful = sum(self.cost.flops(b, cached=self.features is not None) for b in micro_batches)
        supervised, tokens, padded, skipped, flops = self.runtime.sum_over_ranks([*map(float, counts), useful])
        left_out = self._note_skipped(micro_batches) if skipped else {}
        weights = None
        if self.stage.loss_norm == "microbatch":
            weights = group_weights(self.plan, step, left_out, self.stage.norm_samples)
        share = self._passes(step, micro_batches, max(1.0, supervised), weights)
        # The one wait for the device in a step: nothing before it asks for a value.
        mine, norm = torch.stack([share, self._clip_gradients().double()]).tolist()
        # Read this late so that a signal during the passes ends the run after this step, not after the next.
        loss, stopping = self.runtime.sum_over_ranks([mine, float(stop.received)])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse_nan(step, micro_batches, loss, norm)
        factor = schedule(step, self.plan.steps, self.stage)
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = parameter_group["peak_lr"] * factor
        try:
            with out_of_memory(self.stage):
                optimizer.step()
        except OutOfMemory as error:  # some weights may have changed, and other ranks have gone on: no retry
            raise TrainError(str(error)) from None
        optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "loss": loss, "lr": self.stage.lr * factor, "grad_norm": norm}
        row |= {"tokens": int(tokens), "supervised": int(supervised), "padding": 1 - tokens / max(1.0, padded)}
        row["tflop"] = flops / 1e12
        return row, stopping > 0

    def _passes(
        self, step: int, micro_batches: list[Batch], normaliser: float, weights: dict[int, float] | None
    ) -> Tensor:
        """Add the gradients of this rank's micro-batches; return their share f64 of the step's loss, on the device.

        Raises: OutOfMemory in every rank if it happened in one; in a sharded model, whose ranks wait for each other
        within a pass, only in that one.
        """
        device, failed = self.runtime.device, ""
        shares = [torch.zeros((), dtype=torch.float64, device=device)]
        try:
            if self.features is not None:
                self.features.expect(batch.images for batch in micro_batches if batch.images and len(batch.targets_s))
            with out_of_memory(self.stage):
                for i, batch in enumerate(micro_batches):
                    if len(batch.targets_s) or sharding.is_sharded(self.composed):
                        torch.manual_seed(
                            (self.stage.seed * 1_000_003 + step) * 1_009 + i * self.runtime.world + self.runtime.rank
                        )
                        shares.append(self._backward(step, batch, normaliser, weights))
        except OutOfMemory as error:
            if sharding.is_sharded(self.composed):
                raise
            failed = str(error)  # keep only the words: the error itself keeps the pass's tensors alive
        if self.runtime.sum_over_ranks([float(bool(failed))])[0]:
            raise OutOfMemory(failed or "another process ran out of memory: lower micro_tokens")
        return torch.stack(shares).sum()

    def _backward(self, step: int, batch: Batch, normaliser: float, weights: dict[int, float] | None) -> Tensor:
        """Add the gradients of a micro-batch; return its share f64 of the step's loss, on the device.

        weights: per sample, the weight of each of its tokens; None: 1 / normaliser for all.
        """
        weights_s, device = None, self.runtime.device
        if weights is not None:
            weights_s = upload([weights[i] * normaliser for i in batch.owners_s.tolist()], torch.float32, device)
        batch = batch.to(device)
        with self.runtime.autocast():
            losses, objective = sharding.run_gathered(self.composed, self._losses, batch, weights_s)
        if objective.requires_grad:  # not if only the projector is trained and the batch is text
            (objective / normaliser).backward()  # type: ignore[no-untyped-call]
        if self.sample_losses is not None:
            self.sample_losses.note(step, batch.owners_s, losses)
        return (losses if weights_s is None else losses * weights_s).sum().double() / normaliser

    def _losses(self, batch: Batch, weights_s: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the losses f32 [s], detached, and their weighted sum, with a graph."""

        def total(losses: Tensor) -> Tensor:
            return losses.sum() if weights_s is None or not len(weights_s) else (losses * weights_s).sum()

        if not sharding.is_sharded(self.composed):
            losses = self.token_losses(batch)
            return losses.detach(), total(losses)
        given = batch if len(batch.targets_s) else sharding.placeholder_batch(self.runtime.device)
        losses = self.token_losses(given, sharding.zero_for_unused(self.composed, given))
        weight = self.runtime.world if len(batch.targets_s) else 0  # FSDP averages gradients
        return losses.detach()[: len(batch.targets_s)], total(losses) * weight

    def token_losses(self, batch: Batch, zero: Tensor | float = 0.0) -> Tensor:
        """Return the loss f32 [s] of each supervised position; `zero` is added to what the language model reads."""
        feats = self.image_features(batch)
        row = batch.documents, batch.supervised_s, batch.shown_p, zero, batch.trees
        hidden = hidden_states(self.composed, batch.ids_bl, batch.positions_bl, feats, *row)
        return token_losses(self.composed.model, hidden.flatten(0, 1)[batch.supervised_s], batch.targets_s)

    def image_features(self, batch: Batch) -> Tensor | None:
        """Return the tower's features [n, tokens, width] of a batch's images, computed or cached; None without any."""
        if batch.pixels_nchw is not None:
            return tower_features(self.composed, batch.pixels_nchw, tuned=self.stage.tune_tower)
        if self.features is not None and batch.images:
            return self.features.get(batch.images)
        return None

    def _clip_gradients(self) -> Tensor:
        """Sum the gradients over the ranks and clip them; return their norm before clipping, on the device."""
        parameters = list(self.trainable.values())
        for parameter in parameters:
            if parameter.grad is None:  # the projector's, if all samples are text
                parameter.grad = torch.zeros_like(parameter)
        if self.runtime.world > 1 and not sharding.is_sharded(self.composed):
            sum_gradients(p.grad for p in parameters if p.grad is not None)
        norm = nn.utils.clip_grad_norm_(parameters, self.stage.clip or math.inf)
        return checkpoint.full_tensor(norm)

    def _note_skipped(self, micro_batches: list[Batch]) -> dict[int, str]:
        """Record which samples of a step are broken; return those of all ranks with the reasons."""
        found = {index: reason for batch in micro_batches for index, reason in batch.skipped.items()}
        found = {index: reason for part in self.runtime.gather(found) for index, reason in part.items()}
        new = {index: reason for index, reason in sorted(found.items()) if index not in self.skipped}
        self.skipped |= new
        if new:
            index, reason = next(iter(new.items()))
            log.warning("skipped %d sample(s), e.g. %s (%s)", len(new), self.collator.source.name(index), reason)
            check_bad(self.collator.source, self.skipped, self.stage.max_bad_share)
        return found

    def _refuse_nan(self, step: int, micro_batches: list[Batch], loss: float, norm: float) -> None:
        from safetensors.torch import save_file

        name = f"not-a-number-{step + 1:06d}-{self.runtime.rank}"
        indices = sorted({int(i) for batch in micro_batches for i in batch.owners_s})
        path = self.out / f"{name}.json"
        path.write_text(json.dumps([self.collator.source.name(i) for i in indices], indent=1), encoding="utf-8")
        tensors = {
            f"{i}.{key}": value.cpu().contiguous()
            for i, batch in enumerate(micro_batches)
            for key, value in vars(batch).items()
            if isinstance(value, Tensor)
        }
        save_file(tensors, self.out / f"{name}.safetensors")
        what = f"the loss of step {step + 1} is {loss}"
        if math.isfinite(loss):
            what = f"the gradient of step {step + 1} is {norm}, at a loss of {loss:.4f}"
        raise TrainError(
            f"{what}; its batch is saved in {name}.safetensors, its samples are listed in {path}; try a lower lr"
        )

    def _resume(self, optimizer: torch.optim.Optimizer) -> int:
        """Resume from the newest checkpoint that the first rank sees; return the number of steps done.

        Raises: CheckpointError if another rank does not see it.
        """
        folder = self.out / "checkpoints"
        newest = checkpoint.latest(folder)
        name = self.runtime.broadcast(newest and newest.name)
        if name is None:
            return 0
        path = folder / name
        blind = [rank for rank, seen in enumerate(self.runtime.gather(path.is_dir())) if not seen]
        if blind:
            raise CheckpointError(f"rank {blind[0]} does not see {path}; give an --out that every node can read")
        state = checkpoint.restore(path, self.trainable, optimizer)
        self.runtime.first(lambda: check_base(state.get("base", {}), self.base, "the base", path))
        self.skipped |= {int(index): reason for index, reason in state["skipped"].items()}
        if self.sample_losses is not None:
            self.sample_losses.restore(path)
        log.info("resuming from %s", path)
        return int(state["step"])

    def _validate(self) -> float:
        assert self.validation is not None

        def losses(batch: Batch) -> Tensor:
            with self.runtime.autocast():
                return sharding.run_gathered(self.composed, self._losses, batch.to(self.runtime.device), None)[0]

        return self.validation.loss(self.composed.model, losses)

    def _save(
        self, step: int, optimizer: torch.optim.Optimizer, losses: dict[str, float], writer: checkpoint.Writer
    ) -> None:
        state = {"skipped": {str(i): r for i, r in sorted(self.skipped.items())}, "base": self.base, **losses}
        state["micro_tokens"] = self.stage.micro_tokens
        writer.wait()
        self.runtime.barrier()  # the first rank may have waited for a slow disk, for longer than NCCL would
        extra = self.sample_losses.gather(self.runtime) if self.sample_losses is not None else {}
        tensors = checkpoint.collect(self.trainable, optimizer, keep=self.runtime.rank == 0)
        if self.runtime.rank == 0:
            folder, keep = self.out / "checkpoints", self.stage.keep_last
            writer.submit(lambda: checkpoint.save(folder, step, {**tensors, **extra}, state, keep))

    def _may_halve(self) -> bool:
        """Return whether a step that ran out of memory may be retried: once per run.

        Never in a sharded model: the other ranks wait within a pass for the one that failed, so the run ends.
        """
        return not (self._halved or sharding.is_sharded(self.composed))

    def _halve_passes(self, optimizer: torch.optim.Optimizer) -> None:
        """Halve `micro_tokens`, in all ranks, and free what the failed step left behind."""
        self._halved = True
        optimizer.zero_grad(set_to_none=True)
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()
        size = max(1, self.stage.micro_tokens // 2)
        log.warning("out of memory; continuing with micro_tokens = %s instead of %s", size, self.stage.micro_tokens)
        self.stage = self.plan.stage = dataclasses.replace(self.stage, micro_tokens=size)

    def _tell_grace(self, step_s: float, writer: checkpoint.Writer) -> None:
        if writer.seconds and not self._told_grace:
            size = 12.0 * sum(p.numel() for p in self.trainable.values())
            if advice := checkpoint.shutdown_advice(step_s, writer.seconds, size):
                log.warning("%s", advice)
                self._told_grace = True


def group_weights(plan: Plan, step: int, left_out: Collection[int], size: int) -> dict[int, float]:
    """Return the weight of a supervised token of each sample under `loss_norm = "microbatch"`.

    The published scripts took `size` samples per device and pass, and averaged the means of the passes: if G groups of
    a step have a label, a token of group g has weight 1 / (G * tokens of g). A sample in several groups gets the mean
    of its weights. left_out: samples of the step whose pixels are broken.
    """
    samples = plan.samples(step)
    groups = [samples[at : at + size] for at in range(0, len(samples), size)]
    counts = [sum(int(plan.measured.supervised[i]) for i in group if i not in left_out) for group in groups]
    filled, found = sum(count > 0 for count in counts), defaultdict[int, list[float]](list)
    for group, count in zip(groups, counts, strict=True):
        for i in group:
            found[i].append(1 / (count * filled) if count else 0.0)
    return {i: sum(values) / len(values) for i, values in found.items()}
