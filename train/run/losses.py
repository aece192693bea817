"""What each sample cost when it was last learnt from: `RUN/losses/`, a sidecar of the data for `curate select`.

One `{stem}.arrow` for each shard, a row a sample in the shard's order (for a JSON: one file, a row a record):
`key` string · `loss` f32, the mean over its supervised tokens, null where it was never learnt from · `tokens` i32, the
supervised tokens · `step` i32, the optimiser step at which that was. `manifest.json` is written last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from train.data.sources import Source
from train.dist import Place
from train.folder import MANIFEST, digest_file, whole_file, write_json

FILE = "losses.safetensors"  # in a checkpoint


class SampleLosses:
    """The last loss of every sample; the first process has all of them after `gather`."""

    def __init__(self, num: int) -> None:
        self.loss = np.full(num, np.nan, np.float32)
        self.tokens, self.step = np.zeros(num, np.int32), np.zeros(num, np.int32)
        self._new: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []

    def note(self, step: int, owners_s: Tensor, losses_s: Tensor) -> None:
        """Note the losses of a micro-batch: each supervised token's, and whose it is."""
        samples, inverse, counts = np.unique(owners_s.numpy(), return_inverse=True, return_counts=True)
        sums = torch.zeros(len(samples), dtype=torch.float64, device=losses_s.device)
        sums.index_add_(0, torch.from_numpy(inverse).to(losses_s.device), losses_s.double())
        self._new.append((step + 1, samples, sums.cpu().numpy() / counts, counts))

    def gather(self, place: Place) -> dict[str, dict[str, Tensor]]:
        """Take in what all processes noted; return the checkpoint's file."""
        for part in place.gather(self._new):
            for step, samples, losses, counts in part:
                self.loss[samples], self.tokens[samples], self.step[samples] = losses, counts, step
        self._new = []
        arrays = {"loss": self.loss, "tokens": self.tokens, "step": self.step}
        return {FILE: {name: torch.from_numpy(array) for name, array in arrays.items()}}

    def restore(self, checkpoint: Path) -> None:
        """Go on from a checkpoint."""
        for name, tensor in load_file(checkpoint / FILE).items():
            getattr(self, name)[:] = tensor.numpy()

    def write(self, folder: Path, source: Source) -> None:
        """Write the sidecar."""
        import pyarrow as pa

        folder.mkdir(exist_ok=True)
        shards: dict[str, dict[str, Any]] = {}
        for stem, start, stop in source.extents():
            span = slice(start, stop)
            table = pa.table(
                {
                    "key": pa.array([source.key(i) for i in range(start, stop)], pa.string()),
                    "loss": pa.array(self.loss[span], pa.float32(), mask=np.isnan(self.loss[span])),
                    "tokens": pa.array(self.tokens[span], pa.int32()),
                    "step": pa.array(self.step[span], pa.int32()),
                }
            )
            path = folder / f"{stem}.arrow"
            with whole_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
            shards[stem] = {"rows": stop - start, "digest": digest_file(path)}
        body: dict[str, Any] = {"format": 1, "command": "losses", "options": {}, "inputs": {}, "shards": shards}
        write_json(folder / MANIFEST, body)
