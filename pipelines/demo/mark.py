"""Mark keys of a demo by its truth, in place of a person: 30 pictures of printed words, 30 of objects.

python pipelines/demo/mark.py DEMO MARKED.tsv
"""

import random
import sys
from pathlib import Path

import pyarrow as pa


def main() -> None:
    """Write `key TAB label` lines."""
    demo, out = map(Path, sys.argv[1:3])
    rows = pa.ipc.open_file(str(demo / "truth.arrow")).read_all().to_pylist()
    draw = random.Random(0)
    printed = draw.sample([row["key"] for row in rows if row["fault"] == "cheater"], 30)
    objects = draw.sample([row["key"] for row in rows if row["fault"] in ("clean", "swapped")], 30)
    out.write_text("".join(f"{key}\tprinted\n" for key in printed) + "".join(f"{key}\tobject\n" for key in objects))


if __name__ == "__main__":
    main()
