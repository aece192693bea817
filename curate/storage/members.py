"""Where each sample's members lie in its tar: the embeddings' column `members`, and reading samples by it.

With it a sample is read without reading the rest of its tar. Since a tar may have changed after it was indexed, each
member's header is read too, and must be the one that was indexed.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from curate.storage import ranges
from curate.storage.schema import MEMBERS
from curate.storage.tar import Index, Member, Sample
from pipelines.tar_headers import BLOCK, describes

MOST_SUFFIXES = 1 << 15
MOST_BYTES = (1 << 31) - 1
WINDOW_BYTES, WINDOW_SAMPLES = 16 << 20, 256  # read at a time
STREAMED = 0.5  # if samples fill this share of a stretch of the tar, the whole stretch is read


def column(index: Index, size: int) -> pa.Array:
    """Describe a shard's samples as MEMBERS. size: of its file; where the tar in it is packed, all rows are null.

    So is a row whose members' names are not the key, a dot and a suffix in UTF-8, or that has one of 2 GiB.
    """
    none = pa.nulls(len(index.samples), MEMBERS)
    if index.size != size:
        return none
    tails = [_tails(sample) for sample in index.samples]
    names = list(dict.fromkeys(tail for each in tails for tail in each or ()))
    if len(names) > MOST_SUFFIXES:
        return none
    codes = {name: code for code, name in enumerate(names)}
    held = [member for sample, each in zip(index.samples, tails, strict=True) if each for member in sample.members]
    suffixes = pa.array([codes[tail] for each in tails for tail in each or ()], pa.int16())
    flat = pa.StructArray.from_arrays(
        [
            pa.DictionaryArray.from_arrays(suffixes, pa.array(names, pa.string())),
            pa.array([member.offset for member in held], pa.int64()),
            pa.array([member.size for member in held], pa.int32()),
        ],
        fields=list(MEMBERS.value_type),
    )
    bounds = np.cumsum([0, *(len(each or ()) for each in tails)])
    missing = np.array([each is None for each in tails], bool)
    return pa.ListArray.from_arrays(pa.array(bounds, pa.int32()), flat, type=MEMBERS, mask=pa.array(missing))


def _tails(sample: Sample) -> list[str] | None:
    """Return what follows the key and its dot in the members' names; None where that or the place cannot be stored."""
    tails = [member.name[len(sample.key) + 1 :] for member in sample.members]
    plain = all(
        member.name == f"{sample.key}.{tail}" and member.size <= MOST_BYTES and not _is_broken(member.name)
        for member, tail in zip(sample.members, tails, strict=True)
    )
    return tails if plain else None


def _is_broken(name: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in name)


def samples(keys: Sequence[str], places: pa.Array | pa.ChunkedArray) -> list[Sample] | None:
    """Build samples from the column; None where one of them has none."""
    if places.null_count:
        return None
    found = []
    for key, held in zip(keys, places.to_pylist(), strict=True):
        each = [Member(f"{key}.{m['suffix']}", m["suffix"].lower(), m["offset"], m["size"]) for m in held]
        found.append(Sample(key, each))
    return found


def read(location: str, size: int, wanted: Sequence[Sample]) -> Iterator[list[bytes]]:
    """Yield the contents of the members of samples, in ascending places. size: of the tar.

    Ends before the first sample that does not lie there any more.
    """
    if not wanted:
        return
    spans = [_spans(sample, size) for sample in wanted]
    held = np.array([int((stops - starts).sum()) for starts, stops in spans])
    extent = max(int(stops.max(initial=0)) for _, stops in spans) - min(
        int(starts.min(initial=size)) for starts, _ in spans
    )
    waste = 1 / STREAMED if held.sum() >= STREAMED * extent else ranges.WASTE  # of each window, so that it stays small
    windows = np.maximum(np.cumsum(held) // WINDOW_BYTES, np.arange(len(held)) // WINDOW_SAMPLES)
    cuts = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(windows)) + 1)

    def fetch(window: np.ndarray) -> ranges.Pieces:
        starts, stops = (np.concatenate(side) for side in zip(*(spans[at] for at in window), strict=True))
        return ranges.read(location, starts, stops, waste)

    for window, pieces in zip(cuts, ranges.ahead(location, fetch, cuts, depth=2), strict=True):
        for at in window:
            contents = []
            for member in wanted[at].members:
                try:
                    found = pieces(member.offset - BLOCK, BLOCK + member.size)
                except OSError:
                    return
                if not describes(bytes(found[:BLOCK]), member.name, member.size):
                    return
                contents.append(bytes(found[BLOCK:]))
            yield contents


def _spans(sample: Sample, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where a sample's members begin and end, i64 each, with their headers and padding."""
    starts = np.array([member.offset for member in sample.members], np.int64)
    sizes = np.array([member.size for member in sample.members], np.int64)
    return starts - BLOCK, np.minimum(starts + -(-sizes // BLOCK) * BLOCK, size)
