"""Pools and vectors that gpu.py makes up, so that it needs no data."""

import io
import tarfile
from pathlib import Path
from typing import Any

DISTINCT = 256


def drawn_pool(folder: Path, shards: int, rows: int) -> Path:
    """Write shards of JPEGs of 400 x 300: soft colours with some noise, which compress like photographs.

    The first DISTINCT of a shard are drawn, which takes 7 ms each; then they come again. All shards are one file.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    (folder / "pool").mkdir()
    first, drawn = folder / "pool" / "00000.tar", []
    for _ in range(min(rows, DISTINCT)):
        soft = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize((400, 300))
        noisy = np.asarray(soft, np.int16) + rng.integers(-12, 13, (300, 400, 3))
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        drawn.append(out.getvalue())
    with tarfile.open(first, "w") as tar:
        for row in range(rows):
            caption = " ".join(f"word{n}" for n in rng.integers(0, 500, 10)).encode()
            for name, data in ((f"{row:05d}.jpg", drawn[row % len(drawn)]), (f"{row:05d}.txt", caption)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    for number in range(1, shards):
        (folder / "pool" / f"{number:05d}.tar").hardlink_to(first)
    return folder / "pool"


def unit_rows(rows: int, dim: int, group: int, on: str) -> Any:
    """Draw unit rows f16 around a centre for every `group` of them; some are nearly copies."""
    import torch

    torch.manual_seed(0)
    parts = []
    for _ in range(0, rows, group):
        near = torch.randn(dim, device=on) + 1.5 * torch.randn(group, dim, device=on)
        near[1::50] = near[::50][: len(near[1::50])] + 0.1 * torch.randn(len(near[1::50]), dim, device=on)
        parts.append(torch.nn.functional.normalize(near, dim=1).half().cpu())
    return torch.cat(parts)[:rows].numpy()
