"""Checkpoints of an unfinished run, and the weights of a finished one.

`checkpoints/step-000200/`: weights.safetensors (trained parameters, fp32, by name), optimizer.safetensors (moments
by name) and state.json (step, names, digests of the files, samples skipped so far, mean loss since the one before).
A checkpoint is written under a hidden name and renamed, so that it is complete or absent. It holds no random state,
since each micro-batch sets its own seed. Sharded tensors are gathered before they are written, so that a run can resume
with another number of ranks. The first rank writes 12 bytes per trained parameter: weight and AdamW's moments, in fp32.

The finished weights of a run: projector.safetensors (llava-hf names), adapter/ (PEFT's own format, where LoRA was
trained), weights.safetensors (whatever else was trained, by parameter name). Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from train.errors import CheckpointError
from train.folder import digest_file
from train.model.weights import write_tensors

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
MAGNITUDE = "lora_magnitude_vector"
PROJECTOR = "model.multi_modal_projector."
GRACE_S = 30.0  # between SIGTERM and SIGKILL: torchrun's default (--shutdown-timeout), Slurm's and Kubernetes' too
# PEFT writes DoRA's magnitudes without `.weight`.
_LORA = re.compile(rf"^(.*\.(?:lora_[AB]|{MAGNITUDE}))\.default\.weight$")
_STEP = re.compile(r"^step-(\d{6,})$")


def full_tensor(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor, return any other as it is; a collective, so every rank must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def collect(
    trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, *, keep: bool
) -> dict[str, dict[str, Tensor]]:
    """Gather weights and moments by file and name; a collective.

    keep: whether this rank copies them to CPU memory; other ranks get empty tables.
    """
    weights, moments = dict(trainable), {}
    for name, parameter in trainable.items():
        for kind, value in optimizer.state.get(parameter, {}).items() if optimizer is not None else ():
            if isinstance(value, Tensor):
                moments[f"{kind}/{name}"] = value
    files: dict[str, dict[str, Tensor]] = {WEIGHTS: {}, OPTIMIZER: {}}
    for file, tensors in zip(files.values(), (weights, moments), strict=True):
        for key, tensor in tensors.items():
            value = full_tensor(tensor.detach())
            if keep:
                file[key] = value.to("cpu", copy=True).contiguous()  # training goes on while it is written
    return files


def save(
    folder: Path, step: int, files: Mapping[str, Mapping[str, Tensor]], state: dict[str, Any], keep_last: int
) -> Path:
    """Write the checkpoint of a step; delete all but the last `keep_last` and the one of the lowest loss.

    files: tensors by file and name, as `collect` returns them.
    state: may hold `loss`, the mean since the previous checkpoint, and `val_loss`, which takes precedence; without
    either, the checkpoint never counts as the one of the lowest loss.
    """
    path, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    for half in folder.glob(".step-*.partial"):  # left by a killed run, perhaps at a step that is not saved again
        shutil.rmtree(half, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, tensors in files.items():
        write_tensors(tensors, partial / name)
    digests = {name: digest_file(partial / name) for name in files}
    body = {**state, "step": step, "trainable": sorted(files[WEIGHTS]), "files": digests}
    (partial / "state.json").write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    steps = _steps(folder)
    best = min(steps, key=lambda step: (_loss(step), step))
    for old in steps[:-keep_last]:
        if old != best:
            shutil.rmtree(old)
    return path


class Writer:
    """Write checkpoints in a thread, one at a time, while training goes on with its own copy of the tensors."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[float] | None = None
        self.seconds = 0.0  # duration of the last write

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def submit(self, write: Callable[[], Any]) -> None:
        """Start a write, after the previous one has ended.  Raises: whatever that one raised."""
        self.wait()

        def timed() -> float:
            began = time.perf_counter()
            write()
            return time.perf_counter() - began

        self._pending = self._thread.submit(timed)

    def wait(self) -> None:
        """Wait for the current write.  Raises: whatever it raised, such as OSError for a full disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self.seconds = pending.result()


def shutdown_advice(step_s: float, save_s: float, size_bytes: float) -> str:
    """Say what a stop needs if a step and a checkpoint take longer than GRACE_S; else return ""."""
    if step_s + save_s <= GRACE_S:
        return ""
    needed = math.ceil(1.2 * (step_s + save_s) / 30) * 30
    return (
        f"a checkpoint of {size_bytes / 1e9:.1f} GB takes {save_s:.0f} s and a step {step_s:.0f} s, more than the "
        f"{GRACE_S:.0f} s that torchrun and most schedulers leave after SIGTERM; type torchrun --shutdown-timeout "
        f"{needed} (torch 2.9 has no such option), or a stop loses the steps since the last checkpoint"
    )


def _loss(path: Path) -> float:
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return float(state.get("val_loss", state["loss"]))
    except (OSError, ValueError, KeyError, RecursionError):
        return math.inf


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def pass_size(folder: Path) -> int:
    """Return the tokens per pass at the newest checkpoint; 0 if there is none, or if an old version wrote it.

    With dropout a step depends on how it is split, so a run resumes with passes of the same size.
    """
    newest = latest(folder)
    try:
        return int(json.loads((newest / "state.json").read_text(encoding="utf-8"))["micro_tokens"]) if newest else 0
    except (OSError, ValueError, KeyError, RecursionError):  # `restore` reports what is wrong with it
        return 0


def restore_best(folder: Path, trainable: Mapping[str, Tensor]) -> tuple[int, float]:
    """Load the weights of the checkpoint of the lowest loss; return its step and that loss."""
    best = min(_steps(folder), key=lambda path: (_loss(path), path))
    weights = load_file(best / WEIGHTS)
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(_share(weights[name], parameter))
    return int(best.name.removeprefix("step-")), _loss(best)


def restore(path: Path, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into parameters and optimizer and return its state.

    Raises: CheckpointError when it is corrupt or was written for other parameters.
    """
    advice = "delete that folder to go on from the one before it, or start over with --overwrite"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        broken = [name for name, digest in state["files"].items() if digest_file(path / name) != digest]
        if broken:
            raise CheckpointError(f"{path}/{broken[0]} is corrupt (its digest differs); {advice}")
        weights, moments = load_file(path / WEIGHTS), load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from None
    if state["trainable"] != sorted(trainable):
        odd = sorted(set(state["trainable"]) ^ set(trainable))[0]
        raise CheckpointError(f"{path} was written for other parameters ({odd} is on one side only); {advice}")
    with torch.no_grad():
        for name, parameter in trainable.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointError(f"{path}: {name} is {list(weights[name].shape)}, not {list(parameter.shape)}")
            parameter.copy_(_share(weights[name], parameter))
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        parameter = trainable[name]
        if kind == "step":  # the fused kernel reads the step count on the device
            optimizer.state[parameter][kind] = value.to(parameter.device) if optimizer.defaults["fused"] else value
        else:
            optimizer.state[parameter][kind] = _share(value.to(parameter.device), parameter)
    return dict(state)


def _share(value: Tensor, like: Tensor) -> Tensor:
    """Shard a full tensor in the same way as another one."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def save_trained(out: Path, trained: Mapping[str, Tensor], lora_config: Any | None) -> None:
    """Write the finished weights of a run."""
    projector, adapter, rest = {}, {}, {}
    for name, tensor in trained.items():
        value, lora = tensor.detach().cpu().contiguous(), _LORA.match(name)
        if name.startswith(PROJECTOR):
            projector[name.removeprefix("model.")] = value
        elif lora:
            adapter[f"base_model.model.{lora.group(1)}{'' if MAGNITUDE in name else '.weight'}"] = value
        else:
            rest[name] = value
    write_tensors(projector, out / "projector.safetensors")
    if adapter:
        assert lora_config is not None
        lora_config.save_pretrained(out / "adapter")
        write_tensors(adapter, out / "adapter" / "adapter_model.safetensors")
    if rest:
        write_tensors(rest, out / "weights.safetensors")


def load_trained(out: Path) -> dict[str, Tensor]:
    """Read the finished weights of a run by parameter name.  Raises: CheckpointError."""
    trained: dict[str, Tensor] = {}
    files = {"projector.safetensors": "model.", "adapter/adapter_model.safetensors": "", "weights.safetensors": ""}
    for file, prefix in files.items():
        if (out / file).is_file():
            try:
                tensors = load_file(out / file)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{out / file} cannot be read ({error}); train again with --overwrite") from None
            for name, tensor in tensors.items():
                lora = re.match(rf"^base_model\.model\.(.*\.(?:lora_[AB]|{MAGNITUDE}))(?:\.weight)?$", name)
                trained[f"{lora.group(1)}.default.weight" if lora else prefix + name] = tensor
    if not any(name.startswith(PROJECTOR) for name in trained):
        raise CheckpointError(f"{out} has no projector.safetensors: it is not a finished run")
    return trained


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if _STEP.match(p.name) and p.is_dir())
