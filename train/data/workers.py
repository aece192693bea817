"""How many processes decode ahead for a rank: `workers`, by default "auto"."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from typing import Literal

from train.config import Stage
from train.data.batches import Plan, shared_memory_advice
from train.dist import cores_of_a_rank, ranks_here

MOST_WORKERS = 8
log = logging.getLogger("train")


def choose_workers(asked: int | Literal["auto"], *, gpu: bool) -> int:
    """Return how many processes decode for a rank; their number does not change what they decode.

    `auto` depends on the hardware, never on a timing. With a GPU it is one process for each core of the rank but one,
    at most MOST_WORKERS: a picture takes 5 ms (400 px) to 9 ms (640 x 480), so that 8 of them decode 900 to 1,600 a
    second, where a card trains on some 50 with Phi-2 and on a few hundred with a language model of 0.5 B. Without a GPU
    it is 1: each further one would take a core from the model.
    """
    if asked != "auto":
        return asked
    return min(MOST_WORKERS, max(1, cores_of_a_rank() - 1)) if gpu else 1


def resolve(stage: Stage, plan: Plan, image_bytes: int, world: int, *, gpu: bool) -> Stage:
    """Return a stage with its number of workers, and log how it was chosen.

    `auto` is lowered, to one at the least, until the pictures decoded ahead fit into /dev/shm.
    image_bytes: size of a decoded image.
    """
    workers, why = choose_workers(stage.workers, gpu=gpu), "as asked"
    if stage.workers == "auto":
        why = f"auto: {cores_of_a_rank()} core(s) per rank" if gpu else "auto: without a GPU"
        free = shutil.disk_usage("/dev/shm").free // ranks_here() if os.path.isdir("/dev/shm") else None
        while free is not None and workers > 1 and shared_memory_advice(plan, workers, world, image_bytes, free):
            workers, why = workers - 1, f"auto: as many as fit into {free / 1e9:.1f} GB of /dev/shm"
    log.info("%d decoding process(es) per rank (%s)", workers, why)
    return dataclasses.replace(stage, workers=workers)
