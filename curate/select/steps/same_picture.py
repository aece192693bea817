"""Whether two similar pictures are copies of one: a test for pairs that cosine and coarse hash have linked.

A copy, for a model that learns from pictures with captions, is a picture that shows nothing new: the same photograph
resized, recompressed, slightly cropped, framed, mirrored or with a line printed over it. Different prints on the same
T-shirt, different pictures on the same wall, memes with different words are not copies if the captions mention the
difference: the coarse shape is that of one template, but the captions name different things. So

    a linked pair is a copy if the words of its captions are mostly the same (more than LIKE of all their words), or
    if the finer hashes agree: of 144 bits at most MOST_BITS differ, whole against whole or whole against a middle of
    the other, as they are or mirrored (curate/embed/details.py); or
    if a finer hash is unknown: then the two cannot be told apart.

A pair without any words counts as alike. Cost: 72 bytes for each row of the pairs, and the captions of pairs whose
hashes differ; BLOCK pairs at a time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from curate.words import words

LIKE = 0.5  # of the words of both captions: templates in shops share up to half of theirs
MOST_BITS = (
    14  # of 144: 95 % of copies resized, cut or framed by up to 7 %, and grey; 1 in 50 of prints on one template
)
BITS = 144
BLOCK = 1 << 18
SIDE = 12  # frequencies across and down
MIRROR = np.packbits(np.tile(np.arange(SIDE) % 2 == 0, SIDE))  # the bits of odd waves across turn with the picture
Details = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # row numbers to u8 [m, 72] and known, bool [m]
PairTest = Callable[[np.ndarray, np.ndarray], np.ndarray]  # row numbers a, b to bool [m]


def detail_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Count the differing bits of the finer hashes of pairs, i64 [m]: the fewest over margins and mirror images.

    a, b: u8 [m, 72], four hashes each, the first of the whole picture.
    """
    a, b = (each.reshape(len(each), each.shape[1] // len(MIRROR), len(MIRROR)) for each in (a, b))
    fewest = np.full(len(a), BITS)
    for one, other in ((a[:, :1], b), (a[:, 1:], b[:, :1])):
        for turned in (np.uint8(0), MIRROR):
            differing = np.bitwise_count(one ^ other ^ turned).sum(axis=2, dtype=np.int64)
            fewest = np.minimum(fewest, differing.min(axis=1, initial=BITS))
    return fewest


def word_overlap(a: Sequence[str], b: Sequence[str]) -> np.ndarray:
    """Return what share of the words of two texts both contain, f64 [m]; 1 if neither has any."""
    found = []
    for one, other in zip(a, b, strict=True):
        left, right = set(words(one)), set(words(other))
        either = len(left | right)
        found.append(len(left & right) / either if either else 1.0)
    return np.array(found, np.float64)


@dataclass(frozen=True)
class CopyTest:
    """The test above, for pairs of row numbers. captions: None leaves the words out, so that hashes alone decide."""

    details: Details
    captions: Callable[[np.ndarray], list[str]] | None

    def __call__(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Say which pairs are copies, bool [m]. a, b: i64 [m]."""
        parts = [np.empty(0, bool)]
        for at in range(0, len(a), BLOCK):
            parts.append(self._block(a[at : at + BLOCK], b[at : at + BLOCK]))
        return np.concatenate(parts)

    def _block(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        rows, place = np.unique(np.stack([a, b]), return_inverse=True)
        i, j = place.reshape(2, -1)
        values, known = self.details(rows)
        copies = ~(known[i] & known[j])
        asked = np.flatnonzero(~copies)
        copies[asked] = detail_bits(values[i[asked]], values[j[asked]]) <= MOST_BITS
        left = np.flatnonzero(~copies)
        if self.captions is not None and len(left):
            concerned, place = np.unique(np.stack([a[left], b[left]]), return_inverse=True)
            texts = np.array(self.captions(concerned), object)
            one, other = texts[place.reshape(2, -1)]
            copies[left] = word_overlap(one, other) > LIKE
        return copies
