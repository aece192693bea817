"""What `curate demo` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class DemoOptions:
    """What the demo renders; see `curate.demo.render.render`."""

    rows: Annotated[int, "Samples in the pool."] = 12_000
    seed: int = 0
    shards: Annotated[int, "Tars in the pool."] = 6
    dirt: Annotated[str, "dirty, half, clean or legible: which faults are planted."] = "dirty"
    instruct: Annotated[int, "Pictures with questions to tune on, and as many texts without a picture."] = 3_000
    tests: Annotated[int, "Held-out pictures per concept, with a question of each kind."] = 4
    caption_tests: Annotated[int, "Held-out pictures per concept for which only the caption is asked."] = 0
