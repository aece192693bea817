"""Steps that keep an exact number of rows: at random, or shared evenly among groups.

A step with a budget says how many rows there were where they do not suffice, and names who would come next.
"""

import numpy as np

from curate.errors import UsageError, unknown
from curate.frame import Count, Frame, Group, Verdict, shortage
from curate.quotas import position_in_group, water_fill

KEEPS = ("near", "far", "random", "max:COLUMN", "min:COLUMN")


def sample(frame: Frame, number: int, n: Count, seed: int | None = None) -> Verdict:
    """Keep n rows at random, each as likely as the other."""
    lots = frame.random(number) if seed is None else np.random.default_rng(seed).random(len(frame.good))
    rows = np.flatnonzero(frame.alive)
    order = rows[np.argsort(lots[rows], kind="stable")]
    wanted = frame.count(n)
    return Verdict(frame.mask(order[:wanted]), shortage(wanted, len(order)), order[wanted:])


def balance(frame: Frame, number: int, column: Group, n: Count) -> Verdict:
    """Keep exactly n rows, as evenly over the groups as their sizes allow, at random inside each (water-filling)."""
    rows = np.flatnonzero(frame.alive)
    groups = frame.group(column)[rows]
    lots = frame.random(number)[rows]
    wanted = min(frame.count(n), len(rows))
    names, place, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    quotas, level = water_fill(sizes, wanted, np.random.default_rng([frame.seed, number, 1]))
    position = position_in_group(place, lots)
    left = position >= quotas[place]
    facts = {"groups": len(names), "level": level, "groups_taken_whole": int((sizes <= quotas).sum())}
    return Verdict(
        frame.mask(rows[~left]),
        facts | shortage(frame.count(n), wanted),
        rows[left][np.lexsort((lots[left], position[left]))],
    )


def cap(frame: Frame, number: int, column: Group, n: int, keep: str = "random") -> Verdict:
    """Keep at most n rows of each group: at random, or those with the highest `max:column` or lowest `min:column`."""
    if n < 1:
        raise UsageError(f"cap({column}, {n}): at least one row of a group must stay.")
    rows = np.flatnonzero(frame.alive)
    groups = np.unique(frame.group(column)[rows], return_inverse=True)[1]
    return Verdict(frame.mask(rows[position_in_group(groups, preference(frame, keep, number)[rows]) < n]))


def preference(frame: Frame, keep: str, number: int) -> np.ndarray:
    """Return a number for each row, the smallest being the one to keep. Raises: UsageError for an unknown policy."""
    if keep == "random":
        return frame.random(number)
    if keep in ("near", "far"):
        closeness = frame.column("centroid_similarity")
        return -closeness if keep == "near" else closeness
    extreme, _, column = keep.partition(":")
    if extreme in ("max", "min") and column:
        values = frame.column(column).astype(np.float64)
        return -values if extreme == "max" else values
    raise unknown("policy keep=", keep, KEEPS)
