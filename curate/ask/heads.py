"""Linear heads and small MLPs over the image vector: published predictors of aesthetic, NSFW or watermark scores.

A head is a safetensors file; nothing is unpickled. Its matrices are applied in the order of their names, y = x W' + b,
with the activation that the file's metadata names between them. Layouts that are read:

    weight [k, d], bias [k]                     a linear head; LAION's first aesthetic predictor, `curate probe`
    layers.0.weight, layers.2.weight, …         LAION's aesthetic MLP (improved-aesthetic-predictor): no activation,
                                                dropouts off; any prefix and numbering will do
    mean [d], scale [d]                         subtracted from the vector, and divided by, before the first matrix

Metadata, all of it optional: `activation` (relu, gelu or none), `output` (sigmoid, softmax or none), `classes` (a JSON
list of names). LAION's predictors were trained on unit vectors, which is how vectors are stored here.
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.storage import paths
from curate.vectors.narrow import PART, products

ACTIVATIONS = ("none", "relu", "gelu")
OUTPUTS = ("none", "sigmoid", "softmax")
MAX_BYTES = 1 << 30
CONVERT = "convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), OUT)"


@dataclass(frozen=True)
class Head:
    """A head as arrays.

    layers: (weight f32 [k, d], bias f32 [k]) in order; classes: names of the last layer's rows.
    """

    layers: tuple[tuple[np.ndarray, np.ndarray], ...]
    activation: str
    output: str
    classes: tuple[str, ...]

    def apply(self, x_nd: np.ndarray) -> np.ndarray:
        """Score unit vectors, f16 [n, d]. Returns f32 [n, k]."""
        scores = np.empty((len(x_nd), len(self.layers[-1][1])), np.float32)
        step = PART if len(self.layers) > 1 else max(1, len(x_nd))  # so that values between layers stay in the cache
        for first in range(0, len(x_nd), step):
            scores[first : first + step] = self._apply(x_nd[first : first + step])
        return scores

    def _apply(self, x_nd: np.ndarray) -> np.ndarray:
        import torch

        functions = {"none": lambda y: y, "relu": torch.relu, "gelu": torch.nn.functional.gelu}
        functions |= {"sigmoid": torch.sigmoid, "softmax": lambda y: torch.softmax(y, dim=1)}
        (weight, bias), *others = self.layers
        x = torch.from_numpy(products(x_nd, weight) + bias)
        for weight, bias in others:
            x = functions[self.activation](x)
            x = torch.nn.functional.linear(x, torch.from_numpy(weight), torch.from_numpy(bias))
        return np.asarray(functions[self.output](x))


def read_head(location: str, dim: int) -> Head:
    """Read a head for vectors of `dim` dimensions. Raises: UsageError for another kind of file, width or activation."""
    if not paths.exists(location):
        raise UsageError(f"{location} does not exist; expected a head as a .safetensors file.")
    if not location.endswith(".safetensors") or paths.size(location) > MAX_BYTES:
        raise UsageError(f"{location} is not a .safetensors file of at most 1 GB.", CONVERT)
    tensors, told = _read(location)
    layers = []
    for name in sorted((name for name in tensors if name.endswith("weight")), key=_order):
        weight = tensors[name]
        bias = tensors.get(name.removesuffix("weight") + "bias", np.zeros(len(weight), np.float32))
        if weight.ndim != 2 or bias.shape != weight.shape[:1]:
            raise UsageError(f"{location}: {name} has the shape {weight.shape}; expected a matrix with its bias.")
        layers.append((weight, bias))
    widths = [dim, *(len(weight) for weight, _ in layers)]
    if not all(len(weight) and np.isfinite(weight).all() and np.isfinite(bias).all() for weight, bias in layers):
        raise UsageError(f"{location} has an empty matrix, or one with NaN or infinite numbers.")
    if not layers or [weight.shape[1] for weight, _ in layers] != widths[:-1]:
        shapes = ", ".join(f"{weight.shape[0]} x {weight.shape[1]}" for weight, _ in layers) or "no matrix"
        raise UsageError(f"{location} has {shapes}; expected a first matrix of {dim} columns, the vectors' width.")
    activation, output = told.get("activation", "none"), told.get("output", "none")
    if activation not in ACTIVATIONS or output not in OUTPUTS:
        raise UsageError(f"{location}: activation={activation}, output={output}; expected {ACTIVATIONS} and {OUTPUTS}.")
    classes = _classes(location, told.get("classes", "[]"), widths[-1])
    mean, scale = tensors.get("mean", np.zeros(dim, np.float32)), tensors.get("scale", np.ones(dim, np.float32))
    if mean.shape != (dim,) or scale.shape != (dim,) or not np.isfinite([mean, scale]).all() or not scale.all():
        raise UsageError(f"{location}: mean and scale must be {dim} finite numbers each, no scale 0.")
    weight, bias = layers[0]  # W ((x - mean) / scale) + b is another W' x + b'
    wide = weight / scale.astype(np.float64)
    layers[0] = wide.astype(np.float32), (bias - wide @ mean).astype(np.float32)
    return Head(tuple(layers), activation, output, classes)


def _classes(location: str, text: str, number: int) -> tuple[str, ...]:
    """Read the names of the last layer's rows, all or none. Raises: UsageError."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        names = text
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) not in (0, number):
        raise UsageError(f"{location} names its classes {text[:60]}; expected a JSON list of {number} names, or none.")
    return tuple(names)


def _order(name: str) -> list[int | str]:
    """Return a key that sorts layers.10 after layers.2."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _read(location: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read the tensors of a safetensors file as f32, and its metadata."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = paths.read_bytes(location)
    try:
        tensors = {name: value.float().numpy() for name, value in load(data).items()}
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{location} is not a readable safetensors file: {error}", CONVERT) from None
    return tensors, dict(header.get("__metadata__", {}))


def write_head(location: str, weight: np.ndarray, bias: np.ndarray, about: Mapping[str, Any]) -> None:
    """Write a linear head, f32 [k, d] and [k], atomically. about: for the metadata; what is not text becomes JSON."""
    from safetensors.numpy import save

    told = {key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in about.items()}
    tensors = {"weight": np.ascontiguousarray(weight, np.float32), "bias": np.ascontiguousarray(bias, np.float32)}
    with paths.atomic_write(location) as file:
        file.write(save(tensors, told))
