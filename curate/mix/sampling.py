"""Draw a mix: how many records of each source, and their order. Arrays in, arrays out.

Idea: order all candidate records so that every prefix of the order holds each source in proportion to its weight, and
cut the order where the target is reached. Within a source, records follow a permutation that depends only on the seed
and the source's name, so adding a source changes nothing about the others. The i-th record of source k in that
permutation has the

    position = (s_1 + ... + s_(i-1) + s_i / 2) / w_k

where s is a record's size (1, or its tokens) and w_k the source's weight, or the sum of its sizes where sources have
none. With s = 1 this is the divisor rule of Webster and Sainte-Lague for sharing out seats: (i - 1/2) / w_k.
Cut: the longest prefix whose sizes do not exceed the target, and then the one remaining record whose size is nearest to
the gap, if it brings the sum nearer. In samples the target is met exactly; in tokens to within half of the smallest
difference between the gap and a remaining record, so exactly if one has the gap's length.
Cost: one sort, O(n log n) time for n records, some 60 bytes a record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from curate.errors import UsageError


@dataclass(frozen=True)
class Amount:
    """How much of a source is wanted: drawn without replacement by count, fraction and cap, then repeated."""

    count: int | None = None
    fraction: float | None = None
    cap: int | None = None
    repeat: int = 1
    weight: float | None = None


@dataclass(frozen=True)
class Part:
    """A source's drawn rows i64, in seeded order, and what is known of all its rows: tokens i32, is_text bool."""

    name: str
    rows: np.ndarray
    tokens: np.ndarray
    is_text: np.ndarray
    weight: float | None


@dataclass(frozen=True)
class Order:
    """The mix: source i16 [n] and row i32 [n], in their final order."""

    source: np.ndarray
    rows: np.ndarray


def check(text_share: float | None, total: int | None, sources: Mapping[str, Amount]) -> None:
    """Refuse amounts that contradict each other. Raises: UsageError naming the key."""
    if text_share is not None and not 0 <= text_share < 1:
        raise UsageError(f"mix.text_share={text_share} is not a share of at least 0 and below 1.")
    if total is not None and total < 1:
        raise UsageError(f"mix.total={total} is not at least 1.")
    for name, source in sources.items():
        where = f"mix.sources.{name}"
        if source.count is not None and source.fraction is not None:
            raise UsageError(f"{where} has both count and fraction.", "keep one")
        if source.fraction is not None and not 0 <= source.fraction <= 1:
            raise UsageError(
                f"{where}.fraction={source.fraction} is not between 0 and 1.", "to see a source more often, use repeat"
            )
        if min(value for value in (source.count, source.cap, 0) if value is not None) < 0 or source.repeat < 1:
            raise UsageError(f"{where} has a negative count or cap, or a repeat below 1.")
        if any(other.weight is None for other in sources.values()) and source.weight is not None:
            raise UsageError(f"{where} has a weight and another source has none.", "weigh all sources, or none")
        if source.weight is not None and (total is None or not source.weight > 0):
            raise UsageError(
                f"{where}.weight={source.weight} needs to be above 0, and needs a total in [mix].", "total = 665298"
            )


def generator(seed: int, name: str) -> np.random.Generator:
    """Make the random numbers of one use, by seed and name."""
    return np.random.default_rng([seed, *blake2b(name.encode(), digest_size=16).digest()])


def choose(available: int, amount: Amount, seed: int, name: str) -> np.ndarray:
    """Draw rows of a source without replacement, then repeat them all. Returns i64 in seeded order."""
    wanted = available
    if amount.fraction is not None:
        wanted = round(amount.fraction * available)
    if amount.count is not None:
        wanted = min(wanted, amount.count)
    if amount.cap is not None:
        wanted = min(wanted, amount.cap)
    order = generator(seed, f"rows of {name}").permutation(available)[:wanted]
    return np.tile(order, amount.repeat)


def draw(
    parts: Sequence[Part], text_share: float | None, total: int | None, by: str, seed: int, shuffle: bool
) -> Order:
    """Draw records to meet the targets, and order them.

    text_share: part of the mix that is text-only; with no total, all image records stay and text fits itself to them.
    total: size of the mix. by: samples or tokens, for both. shuffle: else sources follow each other, rows in order.
    Raises: UsageError when a target asks for more than there is.
    """
    source = np.concatenate([np.full(len(part.rows), number, np.int16) for number, part in enumerate(parts)])
    rows = np.concatenate([part.rows for part in parts])
    sizes = np.concatenate([part.tokens[part.rows] if by == "tokens" else np.ones(len(part.rows)) for part in parts])
    is_text = np.concatenate([part.is_text[part.rows] for part in parts])
    candidates = _Candidates(source, sizes, [part.name for part in parts], [part.weight for part in parts])
    everything = np.arange(len(rows))
    if text_share is None:
        kept = everything if total is None else candidates.take(everything, total)
    else:
        text, image = everything[is_text], everything[~is_text]
        image_size = float(sizes[image].sum()) if total is None else (1 - text_share) * total
        text_size = image_size * text_share / (1 - text_share)
        if by == "samples":  # whole records, and whole in sum
            text_size = round(text_size)
            image_size = image_size if total is None else total - text_size
        _refuse_lack_of_text(text_share, text_size, image_size, float(sizes[text].sum()))
        image = image if total is None else candidates.take(image, image_size)
        kept = np.sort(np.concatenate([candidates.take(text, text_size), image]))
    if shuffle:
        kept = kept[generator(seed, "order").permutation(len(kept))]
    else:
        kept = kept[np.lexsort((rows[kept], source[kept]))]
    return Order(source[kept], rows[kept].astype(np.int32))


def _refuse_lack_of_text(share: float, wanted: float, beside: float, there: float) -> None:
    """Raise UsageError, saying what share is possible, if the text-only records do not suffice."""
    if round(wanted) > there:
        times = f"set repeat = {int(np.ceil(wanted / there))} on a text source" if there else "add a text source"
        raise UsageError(
            f"text_share={share} asks for {round(wanted):,} text-only records beside {round(beside):,} with images, "
            f"but the sources give {round(there):,} (a share of {there / max(there + beside, 1):.3f}).",
            f"lower text_share, take fewer images (cap), or {times}",
        )


@dataclass(frozen=True)
class _Candidates:
    """The records that may be taken: source i16 [n] and size [n] (1, or tokens) of each; names and weights a source."""

    source: np.ndarray
    sizes: np.ndarray
    names: Sequence[str]
    weights: Sequence[float | None]

    def take(self, pool: np.ndarray, target: float) -> np.ndarray:
        """Choose records of `pool` (i64 [m], ascending) whose sizes sum to the target, sources in proportion.

        Returns their indices i64, ascending. Raises: UsageError when the pool, or one source at its weight, is smaller
        than the target asks for.
        """
        source, sizes = self.source[pool], self.sizes[pool]
        if round(target) > sizes.sum():
            raise UsageError(
                f"the mix asks for {round(target):,} but its sources give {round(sizes.sum()):,}.",
                "lower total, or repeat a source",
            )
        position = np.empty(len(pool))
        for number, weight in enumerate(self.weights):
            here = source == number
            middles = np.cumsum(sizes[here]) - sizes[here] / 2
            # Only ratios of weights count within one pool, so a weight need not be scaled to the pool's sizes.
            position[here] = middles / (sizes[here].sum() if weight is None else weight) if len(middles) else 0
        order = np.lexsort((source, position))
        ends = np.cumsum(sizes[order])  # ends[j]: the size of the first j + 1 records of the line
        number = int(np.searchsorted(ends, target, side="right"))
        taken, rest = order[:number], order[number:]
        gap = target - (float(ends[number - 1]) if number else 0.0)
        misses = np.abs(sizes[rest] - gap)
        if len(rest) and misses.min() < gap:
            taken = np.append(taken, rest[int(misses.argmin())])
        weights = [weight if (source == number).any() else None for number, weight in enumerate(self.weights)]
        for number, weight in enumerate(weights):
            here = sizes[source == number]
            asked = target * weight / sum(filter(None, weights)) if weight is not None else 0.0
            if asked - here.sum() > here.max(initial=1):
                raise UsageError(
                    f"source {self.names[number]} gives {round(here.sum()):,}, its weight asks for {round(asked):,}.",
                    f"set repeat = {int(np.ceil(asked / here.sum()))}, or lower its weight or the total",
                )
        return np.sort(pool[taken])
