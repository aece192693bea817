"""Read tensors by name, and nothing else, from the files that models are published in, and write such files."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from pipelines.terminal import first_line
from train.errors import CheckpointError


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of safetensors files, or of pickles that hold only tensors.  Raises: CheckpointError."""
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
        except pickle.UnpicklingError:  # its text advises loading without weights_only
            raise CheckpointError(f"{file} cannot be read as weights alone: it is no table of tensors") from None
        except (OSError, RuntimeError, SafetensorError, EOFError) as error:
            reason = first_line(error)
            raise CheckpointError(f"{file} cannot be read as weights alone ({reason})") from None


def write_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file with the permissions of the umask (the library would make it private).

    Raises: OSError.
    """
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written ({error})") from None
    let_read(path)


def write_shards(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the weights of a model as on a hub, in files of 5 GB with an index, with the permissions of the umask.

    Raises: OSError.
    """
    from huggingface_hub import save_torch_state_dict

    try:
        save_torch_state_dict(dict(tensors), folder, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(f"{folder} cannot be written ({error})") from None
    let_read(*folder.glob("*.safetensors"))


def let_read(*paths: Path) -> None:
    """Give files that a library has made private the permissions of the umask."""
    umask = os.umask(0)
    os.umask(umask)
    for path in paths:
        path.chmod(0o666 & ~umask)
