"""The results of a search, as lines and as a page: for each query its rows with their pictures, to view and to mark.

In: what `curate.ask.find` found. Out: one self-contained HTML file. Marked cards are downloaded as `key TAB label`,
which is what `curate probe` reads.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from curate.ask.find import Hit
from curate.report.gallery import MAX_CAPTION, Card, open_samples, read_pictures
from curate.report.report import render
from curate.storage.manifest import Artefact


def page(embedded: Artefact, found: Mapping[str, Sequence[Hit]], directory: str, without: Sequence[str] = ()) -> bytes:
    """Lay out the hits of each query. without: texts that the rows should not match.

    Pictures come from the pool if it is still there: at most 12 MB of them.
    """
    groups, by_stem = [], defaultdict[str, list[Card]](list)
    for question, hits in found.items():
        shown = []
        for hit in hits:
            caption = hit.facts.get("caption") or ""
            caption = caption if len(caption) <= MAX_CAPTION else caption[: MAX_CAPTION - 1] + "…"
            card = Card(hit.facts["key"], hit.stem, hit.row, caption, score=hit.score)
            by_stem[hit.stem].append(card)
            shown.append((card, verdict(hit)))
        groups.append({"question": question, "cards": shown})
    samples, trouble = open_samples(embedded)
    spent = 0
    for stem, cards in by_stem.items():
        spent = read_pictures(samples, stem, sorted(cards, key=lambda card: card.row), spent)
    return render({"title": directory, "groups": groups, "trouble": trouble, "without": without}, "found")


def verdict(hit: Hit) -> str:
    """Say what a selection did with a row: kept, the step that dropped it, or nothing if there is no selection."""
    if "kept" not in hit.facts:
        return ""
    return "kept" if hit.facts["kept"] else f"dropped by {hit.facts['dropped_by']}"


def lines(found: Mapping[str, Sequence[Hit]]) -> Iterator[str]:
    """Yield what the terminal shows: each query, and below it its rows with their scores."""
    for name, hits in found.items():
        yield name
        for hit in hits:
            told = " · ".join(filter(None, (verdict(hit), (hit.facts["caption"] or "")[:100].replace("\n", " "))))
            yield f"  {hit.score:.4f}  {hit.facts['key']}  {told}"
