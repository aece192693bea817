"""Which clusters a selection starved and which it favoured, with their names.

If a vocabulary was embedded, a name is made of the concepts that are nearest to the centroid compared with the others
(ask/concept_names.py); else of what the cluster's captions share.

A cluster of s usable rows would keep s · share of them if rows were kept at random, where share is that of the whole
pool. A cluster that keeps less than half of that is starved, one that keeps more than twice that is favoured. Clusters
of which a random draw would keep fewer than `LEAST` rows are ignored. O(n) time; captions come from at most `MAX_STEMS`
shards.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curate import naming
from curate.ask import concept_names, stored
from curate.storage import paths, sidecar
from curate.storage.manifest import Artefact
from curate.storage.schema import CENTROIDS

LEAST = 3  # rows that a random draw would keep
SHOWN = 8  # clusters of each kind
MAX_STEMS, CAPTIONS_EACH, OTHERS_EACH = 48, 64, 500


def extremes(before_k: np.ndarray, after_k: np.ndarray, most: int = SHOWN) -> tuple[list[int], list[int]]:
    """List the most starved clusters and the most favoured. before_k, after_k: i64 [k], rows usable and kept.

    Sorted by the share kept, then by size. Both are empty if nothing was kept.
    """
    expected = before_k * (after_k.sum() / max(1, before_k.sum()))
    ratio = after_k / np.maximum(expected, 1e-12)
    starved = np.flatnonzero((expected >= LEAST) & (ratio < 0.5))
    favoured = np.flatnonzero((after_k >= LEAST) & (ratio > 2))
    starved = starved[np.lexsort((starved, -before_k[starved], ratio[starved]))]
    favoured = favoured[np.lexsort((favoured, -before_k[favoured], -ratio[favoured]))]
    return starved[:most].tolist(), favoured[:most].tolist()


def account(embedded: Artefact, clusters: Artefact, labels_n: np.ndarray, kept_n: np.ndarray) -> dict[str, Any]:
    """Say which clusters kept little of their rows, and which much. labels_n: i64, negative for none; kept_n: bool.

    Returns the share of all usable rows that was kept, and `starved` and `favoured`: cluster, rows, kept and words.
    """
    usable = labels_n >= 0
    k = int(labels_n.max(initial=-1)) + 1
    before, after = (np.bincount(labels_n[which], minlength=k) for which in (usable, usable & kept_n))
    starved, favoured = extremes(before, after)
    words, _ = name(embedded, clusters, [*starved, *favoured])
    kinds = {"starved": starved, "favoured": favoured}
    told: dict[str, Any] = {"share": float(after.sum() / max(1, before.sum()))}
    for kind, chosen in kinds.items():
        told[kind] = [{"cluster": c, "rows": int(before[c]), "kept": int(after[c]), "words": words[c]} for c in chosen]
    return told


def name(embedded: Artefact, clusters: Artefact, chosen: Sequence[int]) -> tuple[Mapping[int, str], bool]:
    """Name clusters. Returns the names, and whether they are concepts of a vocabulary; else captions' words."""
    vocabulary = stored.vocabulary_of(embedded)
    if vocabulary is None or not chosen or not paths.exists(clusters.path(CENTROIDS)):
        return _by_captions(embedded, clusters, chosen), False
    return concept_names.names(sidecar.load_npy(clusters.path(CENTROIDS)), chosen, *vocabulary), True


def spread_stems(embedded: Artefact) -> list[str]:
    """Choose up to MAX_STEMS of the shards that have rows, evenly spread over all of them."""
    stems = [stem for stem, rows in embedded.rows.items() if rows]
    return [stems[i] for i in np.unique(np.linspace(0, len(stems) - 1, min(MAX_STEMS, len(stems))).astype(int))]


def _by_captions(embedded: Artefact, clusters: Artefact, chosen: Sequence[int]) -> Mapping[int, str]:
    """Name clusters by up to CAPTIONS_EACH captions of each, compared with other captions of the same shards."""
    captions: dict[int, list[str]] = {c: [] for c in chosen}
    others: list[str] = []
    for stem in spread_stems(embedded) if chosen else ():
        label = clusters.table(stem, ["cluster"])["cluster"].to_numpy()
        wanted = np.flatnonzero(np.isin(label, [c for c in chosen if len(captions[c]) < CAPTIONS_EACH]))
        some = np.flatnonzero(label >= 0)[:OTHERS_EACH]
        column = embedded.table(stem, ["caption"])["caption"]
        for row, text in zip(wanted.tolist(), column.take(pa.array(wanted)).to_pylist(), strict=True):
            group = captions[int(label[row])]
            if text and len(group) < CAPTIONS_EACH:
                group.append(text)
        others += [text for text in column.take(pa.array(some)).to_pylist() if text]
    return naming.names(captions, others)
