"""One pass over all image vectors of a directory's embeddings, in row order.

Several threads read and score one block each, ahead of the caller. Inside them PyTorch and its libraries keep to one
thread: on blocks this small, threads that wait for one another cost ten times the work.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from curate.embed.encoder import single_threaded
from curate.engine import cores
from curate.storage import sidecar
from curate.storage.manifest import Artefact
from curate.storage.ranges import map_ahead

BLOCK = 1 << 13  # rows
MOST_THREADS, AHEAD = 8, 3  # blocks that are read before their turn, for each thread


@dataclass(frozen=True)
class Block:
    """Rows of a stem from `first` on. x_nd: f16 [m, d], mapped where they can be; good: bool [m], has a vector."""

    stem: str
    first: int
    x_nd: np.ndarray
    good: np.ndarray


def scored(embedded: Artefact, score: Callable[[np.ndarray], np.ndarray]) -> Iterator[tuple[Block, np.ndarray]]:
    """Yield all blocks in row order with score(x_nd) of each. score: called in several threads."""
    import torch

    def work(block: Block) -> tuple[Block, np.ndarray]:
        return block, score(block.x_nd)

    threads = min(MOST_THREADS, cores())
    begin = partial(torch.set_num_threads, 1)  # each thread has a number of its own
    with single_threaded(), ThreadPoolExecutor(threads, initializer=begin) as workers:
        yield from map_ahead(workers, work, _blocks(embedded), AHEAD * threads)


def _blocks(embedded: Artefact) -> Iterator[Block]:
    for stem in embedded.stems:
        first = 0
        for batch in embedded.batches(stem, ["image_embedding"]):
            column = batch.column("image_embedding")
            x_nd, good = sidecar.vectors(column), np.asarray(column.is_valid())
            for start in range(0, len(x_nd), BLOCK):
                stop = start + BLOCK
                yield Block(stem, first + start, x_nd[start:stop], good[start:stop])
            first += len(x_nd)
