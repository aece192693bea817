"""Steps that keep the rows that best represent their cluster, exactly as many as the budget."""

from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.select.frame import CLUSTER_FIRST, Count, Fetch, Frame, Verdict, shortage
from curate.select.steps import coverage
from curate.select.steps.coverage import Chosen

SHARES = ("proportional", "even")


def typical(frame: Frame, number: int, n: Count, neighbours: int = 5, share: str = "proportional") -> Verdict:
    """Keep the n most typical rows, from each cluster by its size (PreSel) or evenly (share="even", TypiClust).

    A row is typical if its nearest neighbours in its cluster are near.
    """
    if share not in SHARES or neighbours < 1:
        raise UsageError(
            f"typical: share={share!r}, neighbours={neighbours}; expected {' or '.join(SHARES)}, 1 or more."
        )
    fetch, groups, wanted, rng = _clusters(frame, number, n, "typical")
    return _verdict(frame, n, coverage.most_typical(fetch, groups, wanted, neighbours, rng, even=share == "even"))


def coincide(frame: Frame, number: int, n: Count, temperature: float = 0.1, sigma: float = 1.0) -> Verdict:
    """Keep n rows: more from sparse clusters that lie near others, and within each by kernel herding (COINCIDE)."""
    if temperature <= 0 or sigma <= 0:
        raise UsageError(f"coincide: temperature={temperature}, sigma={sigma}; expected both above 0.")
    fetch, groups, wanted, rng = _clusters(frame, number, n, "coincide")
    return _verdict(frame, n, coverage.coincide(fetch, groups, wanted, rng, temperature=temperature, sigma=sigma))


def _clusters(frame: Frame, number: int, n: Count, name: str) -> tuple[Fetch, np.ndarray, int, np.random.Generator]:
    if "cluster" not in frame.groups:
        raise UsageError(f"{name} needs clusters; this directory has none.", CLUSTER_FIRST)
    groups = np.where(frame.alive, frame.group("cluster"), -1)
    wanted = min(frame.count(n), int((groups >= 0).sum()))
    return frame.vectors, groups, wanted, np.random.default_rng([frame.seed, number])


def _verdict(frame: Frame, n: Count, chosen: Chosen) -> Verdict:
    facts: dict[str, Any] = chosen.facts | shortage(frame.count(n), len(chosen.rows))
    return Verdict(frame.mask(chosen.rows), facts, chosen.reserve)
