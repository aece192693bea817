"""What a pool shows about itself: where its near-duplicates end, and what share of its pairs do not belong together.

The threshold. The cosine above which two pictures are copies depends on the embedder: one sees the scene and puts two
kitchens at .95, another sees colours. The pixels know better, by their perceptual hashes of 64 bits: copies differ in
few bits, look-alikes (different pictures that the embedder finds similar) mostly in more than FAR_BITS = 24. Of the
linked pairs near a cosine, let far(cosine) be the share that differ in more bits than that; since at least
FAR_LOOKALIKES = 2/3 of look-alikes do, and hardly any copies, far / (2/3) estimates the share of look-alikes there. It
falls as the cosine rises, and is fitted accordingly (isotonic regression on bins even in log(1 - cosine), one standard
error added). From the cosine where it falls below one half, a pair whose pixels agree is a copy; from where it falls
below one in a hundred, any pair is.

If hardly any pair has hashes, the cosines alone decide, provided that look-alikes and copies are apart (cosine_gap).

The share of mismatched pairs. If a share p of the pairs is no better than shuffled ones, then at least p q of all
scores lie below the shuffled scores' quantile q: the least of share-below(q) / q over several q bounds p from above.
How much right pairs add there is read off their other side, since their scores are symmetric about their middle, and
far above it there are hardly any others.

Both come from what clustering stored, the edges of the near-duplicate forest and the scores of shuffled pairs, without
reading the embeddings. O(m log m) time for m edges or scores.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from curate.select.steps.cosine_gap import find_gap
from curate.select.steps.linked_pairs import PairRule

TIMID = 0.999
COPY_BITS = 8  # at most: near-duplicates by their pixels, whatever the embedder says
NEAR_BITS = 16  # at most: 95 % of near-duplicates, crops and borders among them; 2 to 5 % of look-alikes
FAR_BITS = 24  # more: 1 % of near-duplicates, at least two thirds of look-alikes
FAR_LOOKALIKES = 2 / 3
DOUBT = 0.5  # share of look-alikes up to which pixels decide a pair
CERTAIN = 0.01  # share of look-alikes up to which the cosine alone decides
BLIND = 0.9  # mismatched share above which real pairs score like shuffled ones, so that their order says nothing
NUM_BINS = 240
LEAST_COPIES = 10
LEVELS = np.array([10, 20, 30, 40, 50])  # quantiles of the shuffled scores, in percent
ERRORS = 3.0  # standard errors on either side of the interval, since it is the least of five that is taken
LEAST_KNOWN = 0.1  # least share of linked pairs with known pixels for these to represent all


@dataclass(frozen=True)
class Evidence:
    """The rule for pairs that was derived from the pool, and why."""

    rule: PairRule
    reason: str
    pairs: int
    pixel_copies: int
    confidence: float | None = None  # share of the pairs above a gap in the cosines that are not look-alikes

    @property
    def threshold(self) -> float:
        """The cosine above which pairs are near-duplicates if their pixels agree."""
        return self.rule.threshold

    def facts(self) -> dict[str, Any]:
        """Return what the funnel prints."""
        facts = {"why": self.reason, "linked_pairs": self.pairs, "pixel_twins": self.pixel_copies}
        anyhow = {"anyhow_above": self.rule.anyhow} if self.rule.anyhow < math.inf else {}
        sure = {} if self.confidence is None else {"confidence": round(self.confidence, 4)}
        return facts | {"most_bits": self.rule.bits} | anyhow | sure


def pixel_rule(threshold: float, anyhow: float, bits: int) -> PairRule:
    """Link pairs whose pixels agree above the threshold; if pixels are unknown, the cosine alone must suffice."""
    return PairRule(threshold, anyhow, bits, max(threshold, min(anyhow, TIMID)))


def find_threshold(similarity: np.ndarray, bits: np.ndarray, floor: float, rows: int = 0) -> Evidence:
    """Find the cosine above which linked images are more likely than not near-duplicates, from their pixels.

    similarity: f32 [m], the near-duplicate forest's edges. bits: u8 [m], differing bits of their perceptual hashes, 255
    where unknown. rows: of the pool; 0 stands for one more than there are edges. The numbers come from photographs
    embedded by an ImageNet classifier, by a descriptor of colours and gradients and by the demo's CLIP, and from the
    demo's pools of three degrees of dirt. If fewer than a tenth of the pairs have known hashes, see cosine_gap. Without
    evidence that there are any duplicates, only pairs above 0.999 whose hashes differ in at most 8 bits count as such.
    """
    from scipy.optimize import isotonic_regression

    known = bits <= 64
    if known.sum() < LEAST_KNOWN * len(known):
        return _by_cosines(similarity, bits, floor, max(rows, len(similarity) + 1))
    similarity, bits = similarity[known], bits[known]
    pairs, copies = len(similarity), int((bits <= COPY_BITS).sum())
    cautious = pixel_rule(max(TIMID, floor), math.inf, COPY_BITS)
    if copies < LEAST_COPIES:
        what = "no perceptual hashes" if not pairs else f"only {copies} pixel twins"
        return Evidence(cautious, f"timid: {what} among the linked pairs", pairs, copies)
    edges = 1 - np.logspace(np.log10(1 - floor), -6, NUM_BINS + 1)
    place = np.clip(np.searchsorted(edges, similarity, side="right") - 1, 0, NUM_BINS - 1)
    count = np.bincount(place, minlength=NUM_BINS)
    full = np.flatnonzero(count)
    far = np.bincount(place, weights=bits > FAR_BITS, minlength=NUM_BINS)[full]
    falling = isotonic_regression(far / count[full], weights=count[full], increasing=False)
    weight = np.repeat(falling.weights, np.diff(falling.blocks))
    share = (falling.x * weight + 1) / (weight + 2)
    at_most = (share + np.sqrt(share * (1 - share) / weight)) / FAR_LOOKALIKES
    likely, certain = (full[at_most <= limit] for limit in (DOUBT, CERTAIN))
    if not len(likely):
        why = "timid: most linked pairs differ in their pixels at any cosine"
        return Evidence(cautious, why, pairs, copies)
    anyhow = float(edges[certain[0]]) if len(certain) else math.inf
    why = f"above it most linked pairs are duplicates; those of at most {NEAR_BITS} differing bits are taken"
    return Evidence(pixel_rule(float(edges[likely[0]]), anyhow, NEAR_BITS), why, pairs, copies)


def _by_cosines(similarity: np.ndarray, bits: np.ndarray, floor: float, rows: int) -> Evidence:
    """Read the threshold off a gap in the cosines; if there is none, only nearly equal pictures are duplicates."""
    copies = int((bits <= COPY_BITS).sum())
    gap = find_gap(similarity, rows, floor)
    if gap is None or gap.threshold >= TIMID:
        why = "timid: no perceptual hashes, and no gap in the cosines between look-alikes and copies"
        return Evidence(pixel_rule(max(TIMID, floor), math.inf, COPY_BITS), why, len(similarity), copies)
    why = (
        f"no perceptual hashes; a gap in the cosines: of the {gap.pairs:,} linked pairs above it "
        f"some {math.ceil(gap.look_alikes):,} may be look-alikes"
    )
    rule = PairRule(gap.threshold, math.inf, NEAR_BITS, gap.threshold)
    return Evidence(rule, why, len(similarity), copies, 1 - gap.look_alikes / gap.pairs)


def mismatch_share(scores: np.ndarray, shuffled: np.ndarray) -> tuple[float, dict[str, Any]]:
    """Estimate the share of pairs whose caption is not the image's.

    scores: f32 [n], clip_scores. shuffled: the 0 … 100 % quantiles of the scores of shuffled pairs, 101 values.
    If a share pi of the pairs is no better than shuffled ones, at least pi q of all pairs lie below the shuffled pairs'
    quantile q: the least of share-below / q over several q bounds pi from above, and the bound is tighter the fewer
    real pairs score that low. (The median alone, q = 1/2, gave .15 for a clean toy pool with an embedder so weak that a
    pair outscored a shuffled one in only 84 % of the cases; the least ratio gave .03.) Returns pi and the figures,
    among them an interval, `share_from` and `share_to` (pipelines/LOG.md says how often it holds the planted share).
    """
    if not len(scores):
        return 0.0, {"shuffled_median": float(shuffled[50])}
    below = np.array([np.count_nonzero(scores <= np.float64(level)) for level in shuffled[LEVELS]]) / len(scores)
    ratios = below / (LEVELS / 100)
    share = float(min(1.0, ratios.min()))
    low, high = _share_interval(scores, shuffled[LEVELS], below, share)
    facts = {"shuffled_median": float(shuffled[50]), "share_from": low, "share_to": high}
    if share > BLIND:
        return 0.0, facts | {"why": f"{share:.0%} look mismatched: this embedder cannot tell, so none is dropped"}
    return share, facts


def _share_interval(scores: np.ndarray, levels: np.ndarray, below: np.ndarray, share: float) -> tuple[float, float]:
    """Bound the mismatched share from both sides. below: f64, the share of the scores up to each of the levels.

    From above: the least ratio plus ERRORS standard errors. From below: the same less what right pairs add, whose
    scores are symmetric about their middle, the score that half of them, (1 - share) / 2 of all, exceed.
    """
    errors = np.sqrt(np.maximum(below, 1 / len(scores)) * (1 - below) / len(scores)) / (LEVELS / 100)
    high = (below / (LEVELS / 100) + ERRORS * errors).min()
    found = np.array([share])
    for _ in range(8):  # a few rounds settle it
        place = min(len(scores) - 1, round((1 - (1 - float(np.median(found))) / 2) * len(scores)))
        middle = float(np.partition(scores, place)[place])
        right = np.array([np.count_nonzero(scores >= 2 * middle - level) for level in levels]) / len(scores)
        found = np.clip((below - right) / (LEVELS / 100), 0, 1)
    low = (found - ERRORS * errors).min()
    return float(max(0.0, min(low, share))), float(min(1.0, max(high, share)))
