"""Encode every sample once before the first step, without decoding images: its length, and whether it can be used.

The ranks share the work, in spans of 2,048 samples. The result is stored beside the runs, so that a second run on the
same data, a resumed run, or one with other options can read it back:

    RUN/../.measured/{digest}.npz    12 bytes per sample; the newest eight are kept

The digest covers all that a length depends on: the data's digests, the tokenizer and its chat template, the template,
the image tokens, the cut at max_length, and the code that reads and encodes.
"""

from __future__ import annotations

import hashlib
import logging
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines import record_forms, records, samples
from train.data.batches import load
from train.data.encoder import Encoder
from train.data.prompts import Rejected
from train.data.sources import Measured, Source, encode, loses_turns
from train.dist import Runtime, cores_of_a_rank
from train.folder import whole_file

KEPT = 8  # files of lengths beside the runs
COUNTS = ("num_truncated", "num_thinking", "num_shortened", "num_unread", "num_trees")
SPAN = 2048  # samples that a worker measures at a time
log = logging.getLogger("train")


class Spans(torch.utils.data.Dataset[Measured]):
    """Span number -> `Measured` of the span's samples."""

    def __init__(self, source: Source, encoder: Encoder, max_length: int) -> None:
        self.source, self.encoder, self.max_length = source, encoder, max_length

    def __len__(self) -> int:
        return -(-len(self.source) // SPAN)

    def __getitem__(self, number: int) -> Measured:
        first = number * SPAN
        n = min(SPAN, len(self.source) - first)
        out = Measured(np.zeros(n, np.int32), np.zeros(n, np.int32), np.zeros(n, np.int32), 0, {})
        for i in range(n):
            try:
                record, encoded = encode(self.source, self.encoder, first + i, self.max_length)
            except Rejected as reason:
                out.reasons[first + i] = str(reason)
                continue
            out.lengths[i], out.images[i] = len(encoded.ids), encoded.num_images
            out.supervised[i] = int((encoded.labels[1:] >= 0).sum())
            out.num_truncated += encoded.truncated
            out.num_thinking += encoded.thinks
            out.num_shortened += encoded.shortened
            out.num_unread += loses_turns(record)
            out.num_trees += bool(encoded.tree)
        return out


def measure(
    source: Source, encoder: Encoder, max_length: int, workers: int = 0, runtime: Runtime | None = None
) -> Measured:
    """Measure all samples, in worker processes if there are many, and shared among the ranks of a runtime."""
    parts = spread(Spans(source, encoder, max_length), workers, runtime)
    lengths, supervised, images = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("lengths", "supervised", "images")
    )
    reasons = {index: reason for part in parts for index, reason in part.reasons.items()}
    truncated, *others = (sum(getattr(part, name) for part in parts) for name in COUNTS)
    return Measured(lengths, supervised, images, truncated, reasons, *others)


def spread(spans: Any, workers: int, runtime: Runtime | None) -> list[Any]:
    """Return all items of a dataset, computed by the ranks in turn; a collective."""
    rank, world = (runtime.rank, runtime.world) if runtime is not None else (0, 1)
    own = list(load(spans, range(rank, len(spans), world), workers if len(spans) > 1 else 0, False))
    everyone = runtime.gather(own) if runtime is not None else [own]
    return [everyone[n % world][n // world] for n in range(len(spans))]


def spare_workers() -> int:
    """Return how many worker processes this rank may start before training; 0 if it has only one core."""
    workers = min(16, cores_of_a_rank())
    return workers if workers > 1 else 0


def measure_once(
    source: Source, encoder: Encoder, max_length: int, folder: Path, runtime: Runtime, data_digest: str
) -> Measured:
    """Measure all samples, or read the stored result from `folder`; the same in every rank.

    data_digest: the digest of the data and its images that the first rank computed.
    """
    path = folder / f"{_digest(encoder, max_length, runtime.broadcast(data_digest))}.npz"
    found: Measured | None = runtime.first(lambda: _read(path, len(source)))
    if found is None:
        found = measure(source, encoder, max_length, spare_workers(), runtime)
        if runtime.rank == 0:
            _keep(found, path)
    return found


def _digest(encoder: Encoder, max_length: int, data_digest: str) -> str:
    tokenizer = encoder.tokenizer
    seen = [data_digest, max_length, encoder.template, encoder.image_token, encoder.tokens_per_image]
    seen += [encoder.trees, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    digest = hashlib.blake2b(repr(seen).encode(errors="replace"), digest_size=16)
    readers = (record_forms.__file__, records.__file__, samples.__file__)
    for file in (*sorted(Path(__file__).parent.glob("*.py")), *map(Path, readers)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _keep(measured: Measured, path: Path) -> None:
    """Store what was measured and delete all but the newest files; if that fails, the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(measured, path)
        for old in sorted(path.parent.glob("*.npz"), key=lambda file: file.stat().st_mtime)[:-KEPT]:
            old.unlink()
    except OSError as error:
        log.info("sample lengths cannot be saved in %s (%s)", path.parent, error.strerror)


def _write(measured: Measured, path: Path) -> None:
    with whole_file(path) as file:
        np.savez(
            file,
            **{name: getattr(measured, name) for name in ("lengths", "supervised", "images", *COUNTS)},
            rejected=np.array(list(measured.reasons), np.int64),
            reasons=np.array(list(measured.reasons.values()), str),
        )


def _read(path: Path, num: int) -> Measured | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        reasons = dict(zip(found["rejected"].tolist(), found["reasons"].tolist(), strict=True))
        lengths, supervised, images = (found[name] for name in ("lengths", "supervised", "images"))
        truncated, *others = (int(found[name]) for name in COUNTS)
        measured = Measured(lengths, supervised, images, truncated, reasons, *others)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return measured if len(measured.lengths) == num else None
