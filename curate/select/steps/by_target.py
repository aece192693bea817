"""Steps that compare the pool with another set of images: its EMB, made by the same model, or a list of its uids."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.select.frame import CLUSTER_FIRST, Directory, File, Frame, Verdict
from curate.select.steps import pair_scores
from curate.vectors import kmeans


def exclude(frame: Frame, number: int, directory: Directory, threshold: float = 0.95) -> Verdict:
    """Drop the rows whose image has cosine > threshold to an image of another EMB, or the same bytes (its uid)."""
    if not -1 < threshold < 1:
        raise UsageError(f"exclude({directory!r}, {threshold}): expected a cosine below 1, such as 0.95.")
    rows = np.flatnonzero(frame.alive)
    uids: list[np.ndarray] = [np.empty(0, np.int64)]

    def targets() -> Iterator[np.ndarray]:
        for vectors, names in frame.foreign(directory):
            uids.append(names)
            yield vectors

    near = pair_scores.norm_sim(frame.vectors, rows, targets()) > threshold
    own = frame.group("uid")[rows]
    same = np.isin(own, np.concatenate(uids)) & (own >= 0)  # below: no uid is known
    facts = {"compared_with": sum(map(len, uids)), "near": int(near.sum()), "same_bytes": int(same.sum())}
    return Verdict(frame.mask(rows[~near & ~same]), facts)


def image_based(frame: Frame, number: int, directory: Directory) -> Verdict:
    """Keep the clusters that are the nearest to at least one image of another EMB (DataComp's image-based filter)."""
    if frame.centroids is None:
        raise UsageError("image_based() needs clusters; this directory has none.", CLUSTER_FIRST)
    centroids = frame.centroids()
    wanted = np.zeros(len(centroids), bool)
    facts: dict[str, Any] = {"clusters": len(centroids), "compared_with": 0}
    for vectors, _ in frame.foreign(directory):
        wanted[kmeans.assign(vectors, centroids)[0]] = True
        facts["compared_with"] += len(vectors)
    cluster = frame.group("cluster")
    keep = frame.alive & (cluster >= 0)
    keep[keep] = wanted[cluster[keep]]
    return Verdict(keep, {**facts, "clusters_kept": int(wanted.sum())})


def subset(frame: Frame, number: int, file: File) -> Verdict:
    """Keep the rows whose uid a DataComp subset file lists (npy of u8,u8)."""
    listed = frame.listed(file)
    return Verdict(frame.alive & listed, {"listed": int(listed.sum())})
