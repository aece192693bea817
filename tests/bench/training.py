"""A training step against the published scripts' semantics, on the small model: `python -m train bench`, recorded."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from train.__main__ import app  # noqa: E402

if __name__ == "__main__":
    app(["bench", "--out", str(Path(__file__).parent / "results" / "training.json")])
