"""Run the benchmarks that need no data, model or GPU of yours, or those named: `python -m tests.bench [NAME …]`.

Each is a script of its own that compares a stage with its floor in one run, prints a table and writes a JSON.
"""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ALONE = ("cluster", "concepts", "dedup", "many_shards", "mix", "scale", "select_memory", "training")


def main() -> int:
    """Run the named scripts, or those of `ALONE`; returns the number that failed."""
    names = sys.argv[1:] or ALONE
    failed = 0
    for name in names:
        sys.stdout.write(f"\n== {name}\n")
        sys.stdout.flush()
        failed += subprocess.run([sys.executable, HERE / f"{name}.py"], cwd=HERE.parent.parent).returncode != 0
    return failed


if __name__ == "__main__":
    sys.exit(main())
