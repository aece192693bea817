"""Names for clusters: the concepts of a vocabulary that lie near a cluster, and nearer than they lie to others.

    score of cluster k for concept c = cosine(m_k, c) - 1/2 mean over clusters of cosine(m, c)

where m is a cluster's centroid. By the cosine alone many clusters get the same names, of texts that lie near all
images; with the whole mean subtracted, the names of odd texts that lie near no cluster. O(m d) time per named cluster,
for m concepts.
"""

from collections.abc import Sequence

import numpy as np

from curate import naming

NEAREST = 40


def names(
    centroids_kd: np.ndarray, chosen: Sequence[int], concepts: Sequence[str], vectors_md: np.ndarray
) -> dict[int, str]:
    """Name the chosen clusters by up to three concepts each, the best by score whose cosine is above the mean.

    centroids: f32 [k, d]. vectors: unit rows f32 [m, d], of the concepts. A concept whose words contain those of one
    already taken, or are contained in them, is skipped. Ties go by the vocabulary's order.
    """
    centroids = centroids_kd.astype(np.float64)
    centroids /= np.maximum(np.linalg.norm(centroids, axis=1, keepdims=True), 1e-12)
    mean = vectors_md.astype(np.float64) @ centroids.mean(axis=0)
    named = {}
    for cluster in chosen:
        cosines = vectors_md.astype(np.float64) @ centroids[cluster]
        best = np.argsort(mean / 2 - cosines, kind="stable")[:NEAREST]
        named[cluster] = naming.joined(concepts[c] for c in best.tolist() if cosines[c] > mean[c])
    return named
