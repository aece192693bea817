"""What a run has learnt, on disk.

`checkpoints/step-000200/`: weights.safetensors (what learns, fp32, by parameter name), optimizer.safetensors (moments
by name) and state.json (step, names, digests of both files, samples skipped so far). Written beside its place and
renamed, so that a checkpoint is whole or absent. It holds no random state: each micro-batch seeds its own.

The finished weights of a run: projector.safetensors (llava-hf names), adapter/ (PEFT's own format, where LoRA was
trained), weights.safetensors (whatever else was trained, by parameter name). Nothing here is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.errors import CheckpointError

PROJECTOR = "model.multi_modal_projector."
_LORA = re.compile(r"^(.*\.lora_[AB])\.default\.weight$")
_STEP = re.compile(r"^step-(\d{6,})$")


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file that others may read, as far as the umask lets them (the library makes it private)."""
    save_file(dict(tensors), path, metadata={"format": "pt"})
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def save(
    folder: Path,
    step: int,
    trainable: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write the checkpoint of a step and delete all but the last `keep_last`."""
    path, partial = folder / f"step-{step:06d}", folder / f".step-{step:06d}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {name: p.detach().cpu().contiguous() for name, p in trainable.items()}
    write_tensors(weights, partial / "weights.safetensors")
    moments = {
        f"{kind}/{name}": value.detach().cpu().contiguous()
        for name, parameter in trainable.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    write_tensors(moments, partial / "optimizer.safetensors")
    files = {name: _digest(partial / name) for name in ("weights.safetensors", "optimizer.safetensors")}
    body = {**state, "step": step, "trainable": sorted(trainable), "files": files}
    (partial / "state.json").write_text(json.dumps(body, indent=1, sort_keys=True), encoding="utf-8")
    for file in partial.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(path, ignore_errors=True)
    partial.rename(path)
    for old in _steps(folder)[:-keep_last]:
        shutil.rmtree(old)
    return path


def latest(folder: Path) -> Path | None:
    """Return the newest checkpoint, or None."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def restore(path: Path, trainable: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Load a checkpoint into parameters and optimizer and return its state.

    Raises: CheckpointError when it is corrupt or was written for other parameters.
    """
    advice = "delete that folder to go on from the one before it, or start over with --overwrite"
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        broken = [name for name, digest in state["files"].items() if _digest(path / name) != digest]
        if broken:
            raise CheckpointError(f"{path}/{broken[0]} is corrupt (its digest differs); {advice}")
        weights, moments = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {advice}") from None
    if state["trainable"] != sorted(trainable):
        odd = sorted(set(state["trainable"]) ^ set(trainable))[0]
        raise CheckpointError(f"{path} was written for other parameters ({odd} is on one side only); {advice}")
    with torch.no_grad():
        for name, parameter in trainable.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointError(f"{path}: {name} is {list(weights[name].shape)}, not {list(parameter.shape)}")
            parameter.copy_(weights[name])
    for key, value in moments.items():
        kind, _, name = key.partition("/")
        parameter = trainable[name]
        device = "cpu" if kind == "step" else parameter.device
        optimizer.state[parameter][kind] = value.to(device)
    return dict(state)


def save_trained(out: Path, trained: Mapping[str, Tensor], lora_config: Any | None) -> None:
    """Write the finished weights of a run."""
    projector, adapter, rest = {}, {}, {}
    for name, tensor in trained.items():
        value, lora = tensor.detach().cpu().contiguous(), _LORA.match(name)
        if name.startswith(PROJECTOR):
            projector[name.removeprefix("model.")] = value
        elif lora:
            adapter[f"base_model.model.{lora.group(1)}.weight"] = value
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
                lora = re.match(r"^base_model\.model\.(.*\.lora_[AB])\.weight$", name)
                trained[f"{lora.group(1)}.default.weight" if lora else prefix + name] = tensor
    if not any(name.startswith(PROJECTOR) for name in trained):
        raise CheckpointError(f"{out} has no projector.safetensors: it is not a finished run")
    return trained


def _steps(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if _STEP.match(p.name) and p.is_dir())


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
