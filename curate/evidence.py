"""What a pool says about itself: where its near-duplicates end, and what share of its pairs do not belong together.

Both are read off facts that clustering stored, so that they cost no look at the embeddings.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

TIMID = 0.999
TWIN_BITS = 8
BLIND = 0.9  # beyond it real pairs score as shuffled ones do, and their order says nothing
NUM_BINS = 240
LEAST_TWINS = 10


@dataclass(frozen=True)
class Evidence:
    """A threshold, and why. twins: linked pairs that are near-duplicates by their pixels, too.

    timid: there is no evidence of near-duplicates as a kind; only pairs that are pixel twins, too, may be merged.
    """

    threshold: float
    reason: str
    pairs: int
    twins: int
    timid: bool = False

    def facts(self) -> dict[str, Any]:
        """Return what the funnel prints."""
        return {"why": self.reason, "linked_pairs": self.pairs, "pixel_twins": self.twins}


def find_threshold(similarity: np.ndarray, bits: np.ndarray, floor: float) -> Evidence:
    """Find the cosine above which linked images are more likely than not near-duplicates by their pixels.

    similarity: f32 [m], the near-duplicate forest's edges. bits: u8 [m], differing bits of their perceptual hashes, 255
    where unknown. The share of pixel twins is fitted as a rising function of similarity (isotonic, on bins even in
    log(1 - cosine)); the threshold is where it passes one half. Without evidence: 0.999, timidly.
    """
    from scipy.optimize import isotonic_regression

    known = bits <= 64
    similarity, twin = similarity[known], bits[known] <= TWIN_BITS
    pairs, twins = len(similarity), int(twin.sum())
    if twins < LEAST_TWINS:
        what = "no perceptual hashes" if not pairs else f"only {twins} pixel twins"
        return Evidence(max(TIMID, floor), f"timid: {what} among the linked pairs", pairs, twins, timid=True)
    edges = 1 - np.logspace(np.log10(1 - floor), -6, NUM_BINS + 1)
    place = np.clip(np.searchsorted(edges, similarity, side="right") - 1, 0, NUM_BINS - 1)
    count = np.bincount(place, minlength=NUM_BINS)
    full = np.flatnonzero(count)
    share = np.bincount(place, weights=twin, minlength=NUM_BINS)[full] / count[full]
    rising = isotonic_regression(share, weights=count[full])
    error = np.sqrt(rising.x * (1 - rising.x) / np.repeat(rising.weights, np.diff(rising.blocks)))
    passing = full[rising.x - error >= 0.5]
    if not len(passing):
        return Evidence(max(TIMID, floor), "timid: pixel twins are nowhere the majority", pairs, twins, timid=True)
    return Evidence(float(edges[passing[0]]), "above it most linked pairs are pixel twins", pairs, twins)


def mismatch_share(scores: np.ndarray, shuffled: np.ndarray) -> tuple[float, dict[str, Any]]:
    """Estimate the share of pairs whose caption is not the image's.

    scores: f32 [n], clip_scores. shuffled: the 0 … 100 % quantiles of the scores of shuffled pairs, 101 values.
    If a share pi of the pairs is as good as shuffled, at least pi q of all pairs lie below the shuffled pairs' quantile
    q: the least of share-below / q over several q bounds pi from above, the more tightly the fewer real pairs reach so
    low. (The median alone, q = 1/2, called .15 of a clean toy pool mismatched once the embedder was so weak that a pair
    outscored a shuffled one in 84 % of the cases only; the least ratio called .03.) Returns pi and the figures.
    """
    if not len(scores):
        return 0.0, {"shuffled_median": float(shuffled[50])}
    levels = np.array([10, 20, 30, 40, 50])
    below = np.searchsorted(np.sort(scores), shuffled[levels], side="right") / len(scores)
    ratios = below / (levels / 100)
    share = float(min(1.0, ratios.min()))
    facts = {"shuffled_median": float(shuffled[50]), "share_by_median": float(min(1.0, ratios[-1]))}
    if share > BLIND:
        return 0.0, facts | {"why": f"{share:.0%} look mismatched: this embedder cannot tell, so none is dropped"}
    return share, facts
