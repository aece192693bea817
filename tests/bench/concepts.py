"""Questions to stored vectors, beside what they cannot do without: reading the vectors, and one product.

    python tests/bench/concepts.py [--rows 1000000] [--dim 512] [--concepts 20000] [--matched ROWS] [--keep DIR]

Draws f16 embeddings onto disk as scale.py does and times, in one process and in turns, each after the files were read
once: reading all vectors (each block copied out of the mapped file and summed), `find` (one text, 50 rows), a column
`prompt` of two texts, and the concepts that images show (five of 20,000 drawn texts) beside the bare f32 product of the
same vectors. --matched takes the first rows alone for the last, which costs hours at a million on two cores; both sides
of its ratio grow with the rows. Reports medians of the ratios. On a busy machine only ratios say something. Writes
results/concepts.json.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "bench"), str(ROOT)]

from scale import draw  # noqa: E402

from curate.ask import find, matches, prompts  # noqa: E402
from curate.select.pool import Pool  # noqa: E402
from curate.storage import manifest  # noqa: E402
from curate.vectors.exact import widen  # noqa: E402

ROUNDS = 3


def texts(number, dim, seed=0):
    x = np.random.default_rng(seed).standard_normal((number, dim), np.float32) * np.arange(1, dim + 1) ** -0.5
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def read_all(embedded):
    """Copy every vector out of its file: what any pass over the vectors costs at least."""
    total = 0
    for _, _, x_nd, _ in find.blocks(embedded):
        total += int(np.array(x_nd).view(np.uint16)[:, 0].sum())
    return total


def ask_column(embedded, pool, rows, asked):
    return prompts.in_blocks(pool.vectors, rows, lambda x: prompts.text_shares(x @ asked.T))


def bare_product(pool, rows, concepts):
    """Multiply the rows with the concepts in the panels that matching takes, and do nothing with the result."""
    across = np.ascontiguousarray(concepts.T)
    for first in range(0, len(rows), matches.READ_ROWS):
        x_nd = widen(pool.vectors(rows[first : first + matches.READ_ROWS]))
        for part in matches._panels(len(x_nd), len(concepts)):
            x_nd[part] @ across


def timed(work):
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def beside(floor, others, rounds):
    """Time the floor and others in turns. Returns the floor's seconds, and each other's, all of the rounds."""
    seconds = {"floor": [], **{name: [] for name in others}}
    for _ in range(rounds):
        for name, work in {"floor": floor, **others}.items():
            seconds[name].append(timed(work))
    return seconds


def ratios(seconds):
    floor = np.array(seconds["floor"])
    return {name: round(float(np.median(np.array(took) / floor)), 3) for name, took in seconds.items()}


def main():
    """Draw, measure and write results/concepts.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--concepts", type=int, default=20_000)
    parser.add_argument("--matched", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--keep", default="")
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
    (ROOT / "tests" / "bench" / "results" / "concepts.json").write_text(json.dumps(result, indent=1) + "\n")


def measure(given, embedded):
    pool = Pool(embedded)
    good = np.flatnonzero(pool.status_rows("ok"))
    one, two, many = (texts(number, given.dim) for number in (1, 2, given.concepts))
    none = np.empty((0, given.dim), np.float32)
    read_all(embedded)
    reading = beside(
        lambda: read_all(embedded),
        {
            "find": lambda: find.nearest(embedded, one, none, 50),
            "prompt": lambda: ask_column(embedded, pool, good, two),
        },
        given.rounds,
    )
    some = good[: given.matched or len(good)]

    def match():
        cut = matches.read_cut(pool.vectors, some, many)
        matches.match(pool.vectors, some, many, cut, 5)

    matching = beside(lambda: bare_product(pool, some, many), {"concepts": match}, given.rounds)
    words = [f"--{name} {getattr(given, name)}" for name in ("rows", "dim", "concepts", "matched", "rounds")]
    return {
        "command": f"python tests/bench/concepts.py {' '.join(words)}",
        "date": str(date.today()),
        "versions": manifest.versions("numpy", "pyarrow"),
        "times_of_reading": ratios(reading),
        "times_of_product": ratios(matching) | {"rows": len(some)},
        "seconds": {"reading": reading, "matching": matching},
    }


if __name__ == "__main__":
    main()
