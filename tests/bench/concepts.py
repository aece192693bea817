"""Questions to stored vectors, compared with what they need at least: reading the vectors, and one product.

    python tests/bench/concepts.py [--rows 1000000] [--dim 512] [--concepts 20000] [--matched ROWS]
        [--cold] [--keep DIR] [--out NAME]

Draws f16 embeddings onto disk as scale.py does and times, in one process and in turns: reading all vectors (512 rows at
a time, copied from the mapped file into a buffer that stays in the processor's cache: the minimum),
`find` of one text and of four (50 rows each), a column `prompt` of two texts, a linear head; and the concepts that
images show (five of 20,000 drawn texts) beside the bare f32 product of the same vectors. The files are in memory, or
with --cold are dropped from it before each pass, which then reads the disk.
--matched uses only the first rows for the concepts, as a million take hours on two cores; both sides of the
ratio grow with the rows. Reports the medians of the ratios of one round and the ratio of the least times, by the clock
and by processor time (of all threads, the one that reads ahead included): on a busy machine the clock says little.
Writes results/NAME.json: concepts, with --cold concepts_cold.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT)]

from scale import draw  # noqa: E402

from curate.ask import find, heads, matches, prompts, reading  # noqa: E402
from curate.select.pool import Pool  # noqa: E402
from curate.storage import manifest  # noqa: E402
from curate.vectors import narrow  # noqa: E402
from curate.vectors.exact import widen  # noqa: E402

ROUNDS = 3


def texts(number, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((number, dim), np.float32) * np.arange(1, dim + 1) ** -0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def read_all(embedded, dim):
    """Copy every vector out of its file: what any pass over the vectors costs at least."""
    kept = threading.local()

    def copy(x_nd):  # into one buffer: nobody looks at the rows
        if not hasattr(kept, "buffer"):
            kept.buffer = np.empty((narrow.PART, dim), np.float16)
        for first in range(0, len(x_nd), narrow.PART):
            part = x_nd[first : first + narrow.PART]
            np.copyto(kept.buffer[: len(part)], part)

    for _ in reading.scored(embedded, copy):
        pass


def column(embedded, score):
    return np.concatenate([scores for _, scores in reading.scored(embedded, score)])


def bare_product(pool, rows, concepts):
    """Multiply the rows with the concepts in the panels that matching takes, and do nothing with the result."""
    across = np.ascontiguousarray(concepts.T)
    buffer = matches.panel_buffer(min(len(rows), matches.READ_ROWS), len(concepts))
    for first in range(0, len(rows), matches.READ_ROWS):
        x_nd = widen(pool.vectors(rows[first : first + matches.READ_ROWS]))
        for part in matches._panels(len(x_nd), len(concepts)):
            np.matmul(x_nd[part], across, out=buffer[: part.stop - part.start])


def drop(embedded):
    """Drop the files from memory, so that they are read from the disk."""
    for stem in embedded.stems:
        with open(embedded.path(f"{stem}.arrow"), "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def beside(floor, others, rounds, before=lambda: None):
    """Time the floor and the others in turns: for each, a list of (clock, processor time) in seconds."""
    found = {"floor": [], **{name: [] for name in others}}
    for _ in range(rounds):
        for name, work in {"floor": floor, **others}.items():
            before()
            started, spent = time.perf_counter(), time.process_time()
            work()
            found[name].append((time.perf_counter() - started, time.process_time() - spent))
    return {name: np.round(taken, 4).tolist() for name, taken in found.items()}


def ratios(seconds):
    taken = {name: np.array(each) for name, each in seconds.items()}
    floor = taken.pop("floor")
    found = {}
    for place, name in enumerate(("clock", "processor")):
        own = floor[:, place]
        for each, all_of in taken.items():
            x = all_of[:, place]
            told = {"median": round(float(np.median(x / own)), 2), "least": round(float(x.min() / own.min()), 2)}
            found.setdefault(each, {})[name] = told
    return found


def main():
    """Draw, measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--concepts", type=int, default=20_000)
    parser.add_argument("--matched", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--keep", default="")
    parser.add_argument("--out", default="")
    given = parser.parse_args()
    home = Path(given.keep or tempfile.mkdtemp())
    try:
        if not (home / "emb" / "manifest.json").exists():
            draw(home / "emb", given.rows, given.dim, 2)
        result = measure(given, manifest.open_input(str(home / "emb")))
    finally:
        if not given.keep:
            shutil.rmtree(home)
    print(json.dumps(result, indent=1))
    name = given.out or ("concepts_cold" if given.cold else "concepts")
    (ROOT / "tests" / "bench" / "results" / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(given, embedded):
    one, two, four, many = (texts(number, given.dim) for number in (1, 2, 4, given.concepts))
    none = np.empty((0, given.dim), np.float32)
    head = heads.Head(((one, np.zeros(1, np.float32)),), "none", "none", ())
    asked = {
        "find": lambda: find.nearest(embedded, one, none, 50),
        "find 4 texts": lambda: find.nearest(embedded, four, none, 50),
        "prompt": lambda: column(embedded, lambda x: prompts.text_shares(x, two)),
        "head": lambda: column(embedded, head.apply),
    }
    read_all(embedded, given.dim)
    before = (lambda: drop(embedded)) if given.cold else lambda: None
    seconds = beside(lambda: read_all(embedded, given.dim), asked, given.rounds, before)
    numbers = [f"--{name} {getattr(given, name)}" for name in ("rows", "dim", "concepts", "matched", "rounds")]
    words = " ".join([*numbers, *(["--cold"] if given.cold else [])])
    words += f" --out {given.out}" if given.out else ""
    result = {
        "command": f"python tests/bench/concepts.py {words}",
        "date": str(date.today()),
        "versions": manifest.versions("numpy", "pyarrow", "torch"),
        "busy": os.getloadavg()[0],
        "rows": sum(embedded.rows.values()),
        "times_of_reading": ratios(seconds),
        "seconds": {"reading": seconds},
    }
    if not given.cold:
        result |= match_beside_product(given, embedded, many, result["seconds"])
    return result


def match_beside_product(given, embedded, concepts, seconds):
    pool = Pool(embedded)
    rows = np.flatnonzero(pool.status_rows("ok"))[: given.matched or None]
    cut = matches.read_cut(pool.vectors, rows, concepts)  # a sample of 4,096 rows, whatever the pool
    work = {"concepts": lambda: matches.match(pool.vectors, rows, concepts, cut, 5)}
    seconds["matching"] = beside(lambda: bare_product(pool, rows, concepts), work, given.rounds)
    return {"times_of_product": ratios(seconds["matching"]) | {"rows": len(rows), "columns": len(concepts)}}


if __name__ == "__main__":
    main()
