"""The page of a search: for each question its rows with their pictures, to look at and to mark.

In: what `curate.ask.find` found. Out: one self-contained HTML file. Marked cards are downloaded as `key TAB label`,
which is what `curate probe` reads.
"""

from collections.abc import Mapping, Sequence

from curate.ask.find import Hit
from curate.embed import images
from curate.errors import ShardError, UsageError
from curate.report.gallery import MAX_BYTES, MAX_CAPTION, thumbnail
from curate.report.report import render
from curate.storage import paths, tar
from curate.storage.manifest import Artefact


def page(embedded: Artefact, found: Mapping[str, Sequence[Hit]], directory: str) -> bytes:
    """Lay out the hits of each question. Pictures come from the pool, where it still is: at most 12 MB of them."""
    pictures, trouble = _pictures(embedded, [hit for hits in found.values() for hit in hits])
    groups = []
    for question, hits in found.items():
        cards = []
        for hit in hits:
            caption = hit.facts.get("caption") or ""
            cards.append(
                {
                    "key": hit.facts["key"],
                    "score": hit.score,
                    "caption": caption if len(caption) <= MAX_CAPTION else caption[: MAX_CAPTION - 1] + "…",
                    "verdict": verdict(hit),
                    "picture": pictures.get((hit.stem, hit.row), ""),
                }
            )
        groups.append({"question": question, "cards": cards})
    return render({"title": directory, "groups": groups, "trouble": trouble}, "found")


def verdict(hit: Hit) -> str:
    """Say what a selection did with a row: kept, the step that dropped it, or nothing where there is no selection."""
    if "kept" not in hit.facts:
        return ""
    return "kept" if hit.facts["kept"] else f"dropped by {hit.facts['dropped_by']}"


def _pictures(embedded: Artefact, hits: Sequence[Hit]) -> tuple[dict[tuple[str, int], str], str]:
    """Read the pictures of rows as data URIs, and say why there are none."""
    try:
        tars = {shard.stem: shard.location for shard in tar.list_pool(embedded.input_path("pool"))}
    except (KeyError, UsageError):
        return {}, "The pool is not where it was when it was embedded, so there are no pictures here."
    made: dict[tuple[str, int], str] = {}
    for stem in dict.fromkeys(hit.stem for hit in hits if hit.stem in tars):
        with paths.open_read(tars[stem]) as file:
            samples = tar.read_index(file).samples
            for hit in (hit for hit in hits if hit.stem == stem and hit.row < len(samples)):
                member = samples[hit.row].image
                if (
                    member is None
                    or samples[hit.row].key != hit.facts["key"]
                    or sum(map(len, made.values())) > MAX_BYTES
                ):
                    continue
                try:
                    made[hit.stem, hit.row] = thumbnail(tar.read_member(file, member))
                except (ShardError, images.BadImage):
                    continue
    return made, ""
