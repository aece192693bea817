"""What `curate demo` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class DemoOptions:
    """What the demo renders; see `curate.demo.render.render`."""

    rows: Annotated[int, "Samples in the pool."] = 12_000
    seed: int = 0
    shards: Annotated[int, "Tars in the pool."] = 6
    dirt: Annotated[str, "dirty, half or clean: how many faults are planted."] = "dirty"
    instruct: int = 3_000
    tests: int = 4
    caption_tests: int = 0
