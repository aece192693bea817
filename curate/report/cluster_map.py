"""The clusters in the report: how large they are before and after, a map of them, and which ones to show.

In: `CLU/centroids.npy`, the `cluster` column and who was kept. Out: charts, and which clusters are shown: giants,
middle and tail. The map is the plane in which the centroids, each weighted by its rows, vary most (principal
components). In very large pools only every n-th shard is counted; of very many clusters the largest and every n-th of
the others are drawn; the page says so.
"""

from typing import Any

import numpy as np
from markupsafe import Markup

from curate.report import charts
from curate.report.show import recall_line
from curate.select import cluster_shares
from curate.select.steps.by_concept import even_number
from curate.storage import manifest, paths
from curate.storage.schema import CENTROIDS

MAX_ROWS, MAX_SPOTS = 200_000_000, 1500
KINDS = (("none", 0.0), ("fewer", 0.5), ("par", 2.0), ("more", 4.0), ("most", np.inf))


def section(clusters: manifest.Artefact, selection: manifest.Artefact | None) -> dict[str, Any] | None:
    """Compare the clusters before and after. None if the clusters have no rows."""
    k = int(clusters.manifest["options"].get("k") or 0)
    total = sum(clusters.rows.values())
    if not k or not total:
        return None
    stems = clusters.stems[:: max(1, -(-total // MAX_ROWS))]
    before, after = count(clusters, selection, stems, k)
    if not before.any():
        return None
    order = np.argsort(-before, kind="stable")
    order = order[before[order] > 0]
    chosen = after if selection is not None and after.any() else None
    spots = draw(clusters, before, chosen, order)
    return {
        "sizes": _ranks(before[order], after),
        "map": spots,
        "drawn": min(len(order), MAX_SPOTS),
        "k": k,
        "counted": (len(stems), len(clusters.stems)),
        "empty": int((before == 0).sum()),
        "without": int(((before > 0) & (after == 0)).sum()) if chosen is not None else None,
        "effective": (even_number(before), even_number(after)),
        "groups": _groups(order, before, after),
        **_extremes(before, after),
        "recall": recall_line(clusters.manifest["recall"]) if "recall" in clusters.manifest else "",
    }


def count(
    clusters: manifest.Artefact, selection: manifest.Artefact | None, stems: list[str], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Count each cluster's rows, i64 [k], and those of them that were kept."""
    before, after = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for stem in stems:
        label = clusters.table(stem, ["cluster"])["cluster"].to_numpy()
        before += np.bincount(label[label >= 0], minlength=k)
        if selection is not None:
            kept = selection.table(stem, ["kept"])["kept"].to_numpy(zero_copy_only=False)
            after += np.bincount(label[(label >= 0) & kept], minlength=k)
    return before, after


def _ranks(descending: np.ndarray, after: np.ndarray) -> Markup:
    """Draw the sizes by rank, both axes logarithmic."""
    ranks = np.unique(np.geomspace(1, len(descending), min(len(descending), 200)).astype(int))
    lines = [charts.Line("all rows", ranks.tolist(), descending[ranks - 1].tolist(), "all")]
    if after.any():
        kept = np.sort(after)[::-1]
        there = ranks[kept[ranks - 1] > 0]
        lines.append(charts.Line("kept rows", there.tolist(), kept[there - 1].tolist(), "kept"))
    return charts.curves(lines, "cluster sizes by rank, all rows and kept rows", log_x=True, log_y=True)


def _groups(order: np.ndarray, before: np.ndarray, after: np.ndarray) -> list[dict[str, Any]]:
    """Choose the clusters to show: the three largest, two of middling size, the three smallest."""
    middle = len(order) // 2
    picks = [("giant", order[:3]), ("middling", order[middle : middle + 2]), ("tail", order[-3:])]
    groups: dict[int, dict[str, Any]] = {}
    for kind, members in picks:
        for c in members.tolist():
            groups.setdefault(c, {"kind": kind, "cluster": c, "before": int(before[c]), "after": int(after[c])})
    return list(groups.values())


def _extremes(before: np.ndarray, after: np.ndarray) -> dict[str, list[dict[str, Any]]]:
    """Choose the clusters that kept the smallest and the largest shares of their rows."""
    kinds = zip(("starved", "favoured"), cluster_shares.extremes(before, after), strict=True)
    return {
        kind: [{"cluster": c, "before": int(before[c]), "after": int(after[c])} for c in chosen]
        for kind, chosen in kinds
    }


def draw(clusters: manifest.Artefact, before: np.ndarray, after: np.ndarray | None, order: np.ndarray) -> Markup | None:
    """Draw the map. order: the clusters that have rows, the largest first. None if the centroids are missing."""
    place = clusters.path(CENTROIDS)
    if not paths.exists(place) or len(order) < 3:
        return None
    with paths.open_read(place) as file:
        centroids = np.load(file, allow_pickle=False)
    rest = order[MAX_SPOTS // 2 :]
    spread = np.linspace(0, len(rest) - 1, min(len(rest), MAX_SPOTS // 2)).astype(int)
    drawn = np.concatenate([order[: MAX_SPOTS // 2], rest[np.unique(spread)]])
    where = project(centroids[drawn].astype(np.float32), before[drawn].astype(np.float64))
    shown = {group["cluster"] for group in _groups(order, before, before)}
    spots = []
    for c, (x, y) in zip(drawn.tolist(), where.tolist(), strict=True):
        rows, kept = int(before[c]), int(after[c]) if after is not None else 0
        says = f"cluster {c}: {rows:,} rows" + (
            f", {kept:,} kept ({100 * kept / rows:.1f} %)" if after is not None else ""
        )
        kind = "par" if after is None else _kind(kept / rows, int(after.sum()) / int(before.sum()))
        spots.append(charts.Spot(x, y, rows, kind, says, f"cluster-{c}" if c in shown else ""))
    return charts.scatter(spots, "map of the clusters: area is rows, colour is the share that was kept")


def project(x_kd: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Project points onto the plane of their greatest weighted variance. Returns f64 [k, 2], axis signs fixed."""
    weights = weights / weights.sum()
    centred = x_kd - weights @ x_kd
    _, axes = np.linalg.eigh((centred * weights[:, None]).T @ centred)
    plane = axes[:, ::-1][:, :2]
    plane = plane * np.sign(plane[np.abs(plane).argmax(0), np.arange(plane.shape[1])])
    points = centred @ plane
    return np.pad(points, ((0, 0), (0, 2 - points.shape[1])))


def _kind(share: float, overall: float) -> str:
    """Class a cluster by how its kept share compares with the whole pool's."""
    if not share:
        return KINDS[0][0]
    return next(name for name, most in KINDS[1:] if share < most * overall)
