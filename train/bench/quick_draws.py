"""Fresh weights in seconds: speed does not depend on their values."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

BLOCK = 1 << 20


@contextmanager
def quick_draws() -> Iterator[None]:
    """Within this context, large CPU tensors are filled with repeated copies of a million random numbers.

    torch draws on one thread, and transformers draws each layer twice: 40 seconds for a model of 2.8 B. Copying uses
    all threads.
    """
    normal, uniform = torch.Tensor.normal_, torch.Tensor.uniform_
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(BLOCK, generator=generator), torch.rand(BLOCK, generator=generator)

    def filled(tensor: Tensor, block: Tensor, otherwise: Callable[[], Tensor]) -> Tensor:
        if tensor.numel() <= BLOCK or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return otherwise()
        with torch.no_grad():
            for part in tensor.view(-1).split(64 * BLOCK):  # type: ignore[no-untyped-call]
                whole = len(part) // BLOCK
                part[: whole * BLOCK].view(whole, BLOCK).copy_(block)
                part[whole * BLOCK :].copy_(block[: len(part) - whole * BLOCK])
        return tensor

    def normal_(tensor: Tensor, mean: float = 0, std: float = 1, *, generator: torch.Generator | None = None) -> Tensor:
        return filled(tensor, drawn[0] * std + mean, lambda: normal(tensor, mean, std, generator=generator))

    def uniform_(tensor: Tensor, low: float = 0, up: float = 1, *, generator: torch.Generator | None = None) -> Tensor:
        return filled(tensor, drawn[1] * (up - low) + low, lambda: uniform(tensor, low, up, generator=generator))

    with mock.patch.multiple(torch.Tensor, normal_=normal_, uniform_=uniform_):
        yield
