"""What `curate report` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class ReportOptions:
    """What the page shows. seed: which examples are drawn."""

    seed: int = 0
    title: Annotated[str, "Heading of the page [the directory's name]."] = ""
