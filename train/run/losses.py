"""The loss of each sample when it was last trained on: `RUN/losses/`, a sidecar of the data for `curate select`.

The loss of sample i is the mean cross-entropy over its supervised tokens, before the optimiser step that used it. Each
rank records its own micro-batches: losses f32 [s] and the sample i64 [s] that each belongs to become one mean per
sample (a segmented mean, O(s)). `gather` merges the ranks' records when a checkpoint is written. Memory: 12 bytes per
sample.

One `{stem}.arrow` per shard, with a row per sample in the shard's order (for a JSON: one file, with a row per record):
`key` string · `loss` f32, the mean over its supervised tokens, null if it was never trained on · `tokens` i32, its
number of supervised tokens · `step` i32, the optimiser step of that loss. `manifest.json` is written last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from train.data.sources import Source
from train.dist import Runtime
from train.folder import MANIFEST, digest_file, whole_file, write_json
from train.model.attention import send

FILE = "losses.safetensors"  # in a checkpoint


class SampleLosses:
    """The last loss of every sample; every rank has all of them after `gather`."""

    def __init__(self, num: int) -> None:
        self.loss = np.full(num, np.nan, np.float32)
        self.tokens, self.step = np.zeros(num, np.int32), np.zeros(num, np.int32)
        self._new: list[tuple[int, np.ndarray, Tensor, np.ndarray]] = []

    def note(self, step: int, owners_s: Tensor, losses_s: Tensor) -> None:
        """Record a micro-batch: the sample index of each supervised token, i64 [s] on the CPU, and its loss f32 [s]."""
        samples, inverse, counts = np.unique(owners_s.numpy(), return_inverse=True, return_counts=True)
        sums = torch.zeros(len(samples), dtype=torch.float64, device=losses_s.device)
        sums.index_add_(0, send(torch.from_numpy(inverse), losses_s.device), losses_s.double())
        self._new.append((step + 1, samples, sums, counts))  # read when a checkpoint is written: reading waits

    def gather(self, runtime: Runtime) -> dict[str, dict[str, Tensor]]:
        """Merge what all ranks recorded; return the file for the checkpoint. A collective."""
        own = [(step, samples, sums.cpu().numpy() / counts, counts) for step, samples, sums, counts in self._new]
        for part in runtime.gather(own):
            for step, samples, losses, counts in part:
                self.loss[samples], self.tokens[samples], self.step[samples] = losses, counts, step
        self._new = []
        arrays = {"loss": self.loss, "tokens": self.tokens, "step": self.step}
        return {FILE: {name: torch.tensor(array) for name, array in arrays.items()}}

    def restore(self, checkpoint: Path) -> None:
        """Restore the losses from a checkpoint."""
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
