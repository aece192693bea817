"""Tensors by name from the files that models are published in, and nothing else from them."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.errors import CheckpointError


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of safetensors files, or of pickles of nothing but tensors.  Raises: CheckpointError."""
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118  (the handle is no dict)
                        yield name, tensors.get_tensor(name)
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
                if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
                    raise CheckpointError(f"{file} does not hold a table of tensors by name")
                yield from state.items()
        except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{file} cannot be read as weights alone ({reason})") from None
