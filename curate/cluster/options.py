"""What `curate cluster` may be asked for. Imports nothing heavy: the command line reads it for its help."""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class ClusterOptions:
    """What is made. k 0: from the rows; sample 0: from k; centroids: a .npy to assign to instead of fitting.

    refit: if clusters exist and the rows have changed since, the centroids are fitted again, not kept.
    """

    k: Annotated[int, "Number of clusters (0: from the number of rows)."] = 0
    iters: Annotated[int, "Iterations of k-means."] = 20
    sample: Annotated[int, "Rows to fit on (0: from k)."] = 0
    centroids: Annotated[str, "Assign to the centroids in this .npy instead of fitting."] = ""
    floor: Annotated[float, "Lowest cosine kept as a near-duplicate edge."] = 0.80
    neighbours: Annotated[int, "Compare across this many nearest clusters, 1 or 2."] = 1
    refit: Annotated[bool, "If rows have changed, fit the centroids anew.", "--refit"] = False
    seed: int = 0
