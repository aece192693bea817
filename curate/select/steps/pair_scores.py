"""Scores of image-text pairs from stored embeddings: how well they match among others, and how near a target they are.

negCLIPLoss: a cosine says little by itself, since some images and captions (plain ones) have high cosines with
everything. So from each pair's cosine a softmax average at temperature t is subtracted, of its image with all captions
of a batch and of its caption with all images: s_ii - t/2 (log sum_j exp(s_ij / t) + log sum_j exp(s_ji / t)). A pair
keeps a high score only if it matches better than random company does.

NormSim: how near an image is to a target set, the p-norm of its cosines to all targets; p = inf is the nearest one.

Numerics on unit vectors; products are computed on a GPU where there is one, and a score's last bits may differ there.
`fetch` returns the vectors of some rows, f16 or f32 [m, d] (an array's `x.__getitem__`).
"""

from collections.abc import Iterable, Iterator

import numpy as np

from curate.select.frame import Fetch
from curate.vectors import on_device
from curate.vectors.exact import widen
from curate.vectors.kmeans import unit_rows
from curate.vectors.near_pairs import nearest_similarity

TEMPERATURE = 0.01  # CLIP's learned one, and the paper's
BATCH_SIZE = 32_768  # the paper's
BATCHES = 10
LEAST_TEMPERATURE = 0.003
BLOCK = 256
READ_ROWS = 1 << 14
TARGET_ROWS = 1 << 16


def neg_clip_loss(
    image: Fetch,
    text: Fetch,
    rows: np.ndarray,
    rng: np.random.Generator,
    *,
    temperature: float = TEMPERATURE,
    batch_size: int = BATCH_SIZE,
    batches: int = BATCHES,
) -> np.ndarray:
    """Score pairs by the negative CLIP loss: the cosine, less what the pair's image and caption have with any other.

    s_ii - t/2 (log sum_j exp(s_ij / t) + log sum_j exp(s_ji / t)), the mean over random batches that each row is in. Up
    to `batch_size` rows are one batch, and the score is exact. rows: i64 [m]. temperature: LEAST_TEMPERATURE or more.
    Returns f32 [m], higher is better.
    O(batches m batch_size d) time; memory for two batches of vectors.
    Source: negCLIPLoss, also s-CLIPLoss (arXiv:2405.19547), definition 3.1, t = 0.01, batches of 32,768.
    """
    total = np.zeros(len(rows))
    pieces = -(-len(rows) // batch_size)
    rounds = batches if pieces > 1 else 1
    for _ in range(rounds):
        order = rng.permutation(len(rows)) if pieces > 1 else np.arange(len(rows))
        for cut in np.array_split(order, pieces) if pieces else []:
            chosen = rows[np.sort(cut)]  # in row order, which is how they lie on disk
            total[np.sort(cut)] += _batch_scores(image(chosen), text(chosen), temperature)
    return (total / rounds).astype(np.float32)


def _batch_scores(image_bd: np.ndarray, text_bd: np.ndarray, temperature: float) -> np.ndarray:
    """Score the pairs of one batch, f64 [b], block by block of the b x b matrix, on a GPU where there is one.

    As no cosine is above 1, exp((cosine - 1) / temperature) does not overflow and, in f64 and from LEAST_TEMPERATURE
    on, does not vanish: one exponential serves the sums of rows and of columns.
    """
    import torch

    on = on_device.device() or "cpu"
    image, text = (torch.from_numpy(unit_rows(widen(x))).to(on) for x in (image_bd, text_bd))
    matched = (image.double() * text.double()).sum(dim=1)
    by_image, by_text = torch.empty_like(matched), torch.zeros_like(matched)
    for first in range(0, len(image), BLOCK):
        block = slice(first, first + BLOCK)
        weights = (image[block] @ text.T).double().sub_(1).mul_(1 / temperature).exp_()
        by_image[block] = weights.sum(dim=1)
        by_text += weights.sum(dim=0)
    scores = matched - 1 - temperature / 2 * (by_image.log() + by_text.log())
    return np.asarray(scores.cpu().numpy())


def norm_sim(fetch: Fetch, rows: np.ndarray, targets: Iterable[np.ndarray], p: float = np.inf) -> np.ndarray:
    """Score how near rows are to a target set: the p-norm of their cosines to all targets.

    rows: i64 [m]. targets: blocks of unit rows, f16 or f32 [t, d], used one after the other. p: inf (the highest
    cosine, -1 without targets) or 2. Returns f32 [m]. O(m t d) time for inf, the rows read once for every 65,536
    targets; O((m + t) d^2) for 2, the rows read once.
    Source: NormSim (arXiv:2405.19547), definition 3.2.
    """
    cuts = [slice(first, first + READ_ROWS) for first in range(0, len(rows), READ_ROWS)]
    if p == 2:
        gram = sum(wide.T @ wide for wide in (widen(block).astype(np.float64) for block in targets))
        squares = np.zeros(len(rows))
        for cut in cuts:
            wide = widen(fetch(rows[cut])).astype(np.float64)
            squares[cut] = np.einsum("nd,nd->n", wide @ gram, wide)
        return np.sqrt(np.maximum(0, squares)).astype(np.float32)
    highest = np.full(len(rows), -1, np.float32)
    for block in _gathered(targets):
        for cut in cuts:
            np.maximum(highest[cut], nearest_similarity(fetch(rows[cut]), block), out=highest[cut])
    return highest


def _gathered(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Join small blocks, so that the rows need not be read again for each."""
    held: list[np.ndarray] = []
    for block in blocks:
        if held and sum(map(len, held)) + len(block) > TARGET_ROWS:
            yield np.concatenate(held)
            held = []
        held.append(block)
    if held:
        yield np.concatenate(held)
