"""What this processor computes in, for both programs."""

from __future__ import annotations


def bf16_instructions() -> str:
    """Name the instructions by which this processor multiplies in bf16, or nothing where it, or torch, has none."""
    import torch

    kinds = ("amx_tile", "avx512_bf16")
    return next((kind for kind in kinds if getattr(torch.cpu, f"_is_{kind}_supported", bool)()), "")
