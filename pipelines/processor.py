"""Which precisions this processor computes in, and how many cores there are, for both programs."""

from __future__ import annotations

import os


def cores() -> int:
    """Count the processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bf16_instructions() -> str:
    """Name the instructions by which this processor multiplies in bf16; "" if it, or torch, has none."""
    import torch

    kinds = ("amx_tile", "avx512_bf16")
    return next((kind for kind in kinds if getattr(torch.cpu, f"_is_{kind}_supported", bool)()), "")


def gpu_has_bf16() -> bool:
    """Say whether this GPU multiplies in bf16. Older ones claim to, but emulate it, far slower than fp32."""
    import torch

    return bool(torch.cuda.is_bf16_supported(including_emulation=False))
