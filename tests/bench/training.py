"""A training step against the published scripts' semantics, on the small model: `python -m train bench`, recorded."""

import argparse
import os
import platform
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.storage import manifest  # noqa: E402
from train.bench.step import (  # noqa: E402
    bench,  # noqa: E402
    table,  # noqa: E402
)
from train.folder import write_json  # noqa: E402


def main() -> None:
    """Measure, print, and write results/training_step.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "training_step.json")
    given = parser.parse_args()
    result = bench(None, given.steps, 0)
    print(f"{result['model']}\n{table(result)}")
    head = {"command": " ".join(["python tests/bench/training.py", *sys.argv[1:]]), "date": date.today().isoformat()}
    head["hardware"] = f"{platform.machine()}, {os.cpu_count()} cores, {processor()}"
    write_json(given.out, {**head, "versions": manifest.versions("torch", "transformers", "peft"), **result})


def processor() -> str:
    """Name the processor, where /proc knows."""
    known = Path("/proc/cpuinfo")
    lines = known.read_text().splitlines() if known.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")


if __name__ == "__main__":
    main()
