"""The near-duplicates in the report: each group as a row of pictures, the largest first, and likely placeholders.

In: `component` of the selection's sidecars, the smallest global row number of a row's near-duplicates. A row whose
component is not its own number is a further member of that group, so one pass over one column finds all groups,
with 16 bytes for each further member. Out: what the template shows, and the keys of the largest groups as a table.

A placeholder is a picture without content whose captions have nothing to do with one another. So a group with three or
more different captions of which hardly two share a word is shown as one; so is what the step `placeholders` dropped,
grouped by the pictures' hash.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import naming
from curate.report.gallery import Gallery
from curate.storage import manifest
from curate.words import words

MAX_FURTHER = 50_000_000  # members held in memory; what comes after them is not counted, and the page says so
GROUPS, MEMBERS = 40, 7  # shown; as many members as fit side by side on a wide screen
LISTED = 20_000  # rows in the table of keys
EXTRA_STEMS = 24  # shards opened for pictures besides those that all examples come from
LEAST_CAPTIONS, MAX_COMPARED, UNLIKE = 3, 16, 0.05  # captions of a placeholder; compared; mean share of words in common
COLUMNS = ("group", "rows", "key", "shard", "row", "kept", "dropped_by", "twin", "similarity", "caption")


@dataclass(frozen=True)
class Member:
    """A row of a group, as the sidecars have it."""

    stem: str
    row: int
    facts: Mapping[str, Any]

    @property
    def similarity(self) -> float:
        """Its weakest link to the row that stayed; 1 for that row itself."""
        value = self.facts["twin_similarity"]
        return 1.0 if value is None else float(value)


def section(selection: manifest.Artefact, gallery: Gallery) -> dict[str, Any] | None:
    """Lay out the groups; the gallery supplies the pictures. None if no step looked for near-duplicates."""
    further, component, shards = further_members(selection)
    if not len(further):
        return None
    heads, sizes = np.unique(component, return_counts=True)
    sizes = sizes + 1
    order = np.argsort(-sizes, kind="stable")
    listed = order[: max(1, int(np.searchsorted(np.cumsum(sizes[order]), LISTED, side="right")))]
    members = _members(selection, gallery.embedded, heads[listed], further, component)
    shown = [_shown(group, int(sizes[i]), gallery) for i, group in zip(listed, members, strict=True)]
    pictured = [group for group in shown if not group["unlike"]]
    return {
        "count": len(heads),
        "rows": int(sizes.sum()),
        "largest": int(sizes.max()),
        "shards": (shards, len(selection.stems)),
        "groups": _with_cards(pictured, gallery),
        "unlike": _with_cards([group for group in shown if group["unlike"]], gallery),
        "listed": len(listed),
        "table": [COLUMNS, *_table(shown)],
    }


def further_members(selection: manifest.Artefact) -> tuple[np.ndarray, np.ndarray, int]:
    """Find the members of groups but the first of each: global rows i64, their components i64, and the shards read."""
    parts: list[np.ndarray] = [np.empty((2, 0), np.int64)]
    first = held = shards = 0
    for stem, rows in selection.rows.items():
        if held > MAX_FURTHER:
            break
        component = selection.table(stem, ["component"])["component"].fill_null(-1).to_numpy()
        own = np.arange(first, first + rows)
        which = (component >= 0) & (component != own)
        parts.append(np.stack([own[which], component[which]]))
        first, held, shards = first + rows, held + int(which.sum()), shards + 1
    further, component = np.concatenate(parts, axis=1)
    return further, component, shards


def _members(
    selection: manifest.Artefact,
    embedded: manifest.Artefact,
    heads: np.ndarray,
    further: np.ndarray,
    component: np.ndarray,
) -> list[list[Member]]:
    """Read the members of some groups, in row order. heads: i64, the groups' first rows."""
    which = np.isin(component, heads)
    rows, group = np.concatenate([heads, further[which]]), np.concatenate([heads, component[which]])
    order = np.argsort(rows, kind="stable")[:LISTED]  # there are more only if a single group has more
    bounds = np.cumsum([0, *selection.rows.values()])
    stems = selection.stems
    found: dict[int, list[Member]] = {int(head): [] for head in heads}
    stem_of = np.searchsorted(bounds, rows[order], side="right") - 1
    for at, same in itertools.groupby(zip(stem_of.tolist(), order.tolist(), strict=True), key=lambda pair: pair[0]):
        places = [place for _, place in same]
        own = rows[places] - bounds[at]
        taken = pa.array(own)
        facts = selection.table(stems[at], ["key", "kept", "dropped_by", "twin", "twin_similarity"]).take(taken)
        captions = embedded.table(stems[at], ["caption"])["caption"].take(taken).to_pylist()
        for place, row, entry, caption in zip(places, own.tolist(), facts.to_pylist(), captions, strict=True):
            found[int(group[place])].append(Member(stems[at], row, {**entry, "caption": caption or ""}))
    return list(found.values())


def _shown(members: Sequence[Member], size: int, gallery: Gallery) -> dict[str, Any]:
    """Describe a group for the page. The row that stayed comes first, then the others, the most similar first."""
    ordered = sorted(
        members, key=lambda member: (not member.facts["kept"], -member.similarity, member.stem, member.row)
    )
    captions = list(dict.fromkeys(member.facts["caption"] for member in members if member.facts["caption"]))
    return {
        "size": size,
        "kept": sum(member.facts["kept"] for member in members),
        "weakest": min(member.similarity for member in members),
        "captions": len(captions),
        "unlike": unlike(captions),
        "words": naming.names({0: captions}, ["" for _ in captions])[0],
        "members": ordered,
    }


def unlike(captions: Sequence[str]) -> bool:
    """Say whether captions have nothing to do with one another: hardly two of the first MAX_COMPARED share a word."""
    bags = [{word for word in words(text) if word not in naming.SMALL} for text in captions[:MAX_COMPARED]]
    bags = [bag for bag in bags if bag]
    if len(bags) < LEAST_CAPTIONS:
        return False
    shares = [len(a & b) / len(a | b) for a, b in itertools.combinations(bags, 2)]
    return sum(shares) / len(shares) < UNLIKE


def _with_cards(groups: Sequence[dict[str, Any]], gallery: Gallery) -> list[dict[str, Any]]:
    """Request the pictures of the first groups from few shards: rows of shards that are open anyway come first.

    Of the members that can be shown, some that spread over the whole range of similarity are taken.
    """
    opened, made = set(gallery.stems), []
    budget = len(opened) + EXTRA_STEMS
    for group in groups[:GROUPS]:
        for member in group["members"][:MEMBERS]:
            if len(opened) < budget:
                opened.add(member.stem)
        at_hand = [member for member in group["members"] if member.stem in opened]
        spread = sorted({*np.linspace(0, len(at_hand) - 1, min(MEMBERS, len(at_hand))).astype(int).tolist()})
        cards = [gallery.card(at_hand[i].stem, at_hand[i].row) for i in spread]
        if len(cards) > 1:
            made.append(group | {"cards": cards, "more": group["size"] - len(cards)})
    return made


def _table(groups: Iterable[Mapping[str, Any]]) -> Iterable[Sequence[Any]]:
    for number, group in enumerate(groups, 1):
        for member in group["members"]:
            facts = member.facts
            verdict = (facts["kept"], facts["dropped_by"] or "", facts["twin"] or "", facts["twin_similarity"] or "")
            yield (number, group["size"], facts["key"], member.stem, member.row, *verdict, facts["caption"])


def dropped_placeholders(gallery: Gallery) -> tuple[list[dict[str, Any]], list[Sequence[Any]]]:
    """Group what `placeholders` dropped in the gallery's shards by the pictures' hash, the largest first.

    Returns what the page shows, and the table of the keys.
    """
    steps = [number for number, reason in enumerate(gallery.reasons) if reason.startswith("placeholders(")]
    pictures: dict[Any, list[tuple[str, int, str, str]]] = defaultdict(list)
    for number, stem in enumerate(gallery.stems):
        here = (gallery.columns["stem"] == number) & np.isin(gallery.columns["reason"], steps)
        rows = gallery.columns["row"][here]
        if len(rows):
            table = gallery.embedded.table(stem, ["phash", "uid", "key", "caption"]).take(pa.array(rows)).to_pylist()
            for row, entry in zip(rows.tolist(), table, strict=True):
                picture = entry["uid"] if entry["phash"] is None else entry["phash"]
                pictures[picture].append((stem, row, entry["key"], entry["caption"] or ""))
    ordered = sorted(pictures.values(), key=lambda rows: (-len(rows), rows[0][:2]))
    shown = [
        {
            "size": len(rows),
            "captions": len({caption for *_, caption in rows}),
            "cards": [gallery.card(stem, row) for stem, row, *_ in rows[:MEMBERS]],
        }
        for rows in ordered[: GROUPS // 2]
    ]
    listed = (
        (number, len(rows), key, stem, row, caption)
        for number, rows in enumerate(ordered, 1)
        for stem, row, key, caption in rows
    )
    header: Sequence[Any] = ("picture", "rows", "key", "shard", "row", "caption")
    return shown, [header, *itertools.islice(listed, LISTED)]
