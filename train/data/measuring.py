"""Encode every sample once before the first step, without decoding images: its length, and whether it can be used."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from train.data.batches import load
from train.data.prompts import Encoder, Rejected
from train.data.sources import Measured, Source, encode
from train.dist import Runtime
from train.folder import MEASURED, whole_file

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
                _, encoded = encode(self.source, self.encoder, first + i, self.max_length)
            except Rejected as reason:
                out.reasons[first + i] = str(reason)
                continue
            out.lengths[i], out.images[i] = len(encoded.ids), encoded.num_images
            out.supervised[i] = int((encoded.labels[1:] >= 0).sum())
            out.num_truncated += encoded.truncated
        return out


def measure(source: Source, encoder: Encoder, max_length: int, workers: int = 0) -> Measured:
    """Measure all samples, in worker processes where there are many."""
    spans = Spans(source, encoder, max_length)
    parts = list(load(spans, range(len(spans)), workers if len(spans) > 1 else 0, False))
    lengths, supervised, images = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("lengths", "supervised", "images")
    )
    reasons = {index: reason for part in parts for index, reason in part.reasons.items()}
    return Measured(lengths, supervised, images, sum(part.num_truncated for part in parts), reasons)


def measure_once(source: Source, encoder: Encoder, max_length: int, out: Path, runtime: Runtime) -> Measured:
    """Measure in the first rank, or read what an interrupted run measured; return it in every rank."""
    answer: list[Measured | None] = [None]
    if runtime.rank == 0:
        answer = [_read(out / MEASURED, len(source))]
        if answer[0] is None:
            workers = min(16, os.cpu_count() or 1)
            answer = [measure(source, encoder, max_length, workers if workers > 1 else 0)]
            assert answer[0] is not None
            _write(answer[0], out / MEASURED)
    found: Measured | None = runtime.broadcast(answer[0])
    assert found is not None
    return found


def _write(measured: Measured, path: Path) -> None:
    with whole_file(path) as file:
        np.savez(
            file,
            **{name: getattr(measured, name) for name in ("lengths", "supervised", "images", "num_truncated")},
            rejected=np.array(list(measured.reasons), np.int64),
            reasons=np.array(list(measured.reasons.values()), str),
        )


def _read(path: Path, num: int) -> Measured | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in file.files}
        reasons = dict(zip(found["rejected"].tolist(), found["reasons"].tolist(), strict=True))
        lengths, supervised, images = (found[name] for name in ("lengths", "supervised", "images"))
        measured = Measured(lengths, supervised, images, int(found["num_truncated"]), reasons)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return measured if len(measured.lengths) == num else None
