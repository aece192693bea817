"""Tell the story of one sample: what it is, its scores, its cluster, which step dropped it and which twin stayed.

The key is searched in one column of one shard at a time; everything else joins by position.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from curate.errors import UsageError
from curate.report import show
from curate.storage import manifest, paths, sidecar
from curate.storage.schema import FUNNEL, STATUSES

Place = tuple[str, int]


def show_key(directory: str, key: str) -> Iterator[str]:
    """Yield the story of the sample with a key (of each, if several shards use it). Raises: UsageError if none does."""
    stages, places = _trace(directory, key)
    for place in places:
        yield from _story(key, place, stages, stages["embed"])


def facts_of(directory: str, key: str) -> Iterator[dict[str, Any]]:
    """Yield the same as data: the row's place and all that its sidecars say except vectors. Raises: UsageError."""
    stages, places = _trace(directory, key)
    for place in places:
        facts: dict[str, Any] = {"stem": place[0], "row": place[1]}
        for stage in ("embed", "cluster", "select"):
            facts |= _row(stages[stage], place) if stage in stages else {}
        yield {name: value.hex() if isinstance(value, bytes) else value for name, value in facts.items()}


def _trace(directory: str, key: str) -> tuple[dict[str, manifest.Artefact], list[Place]]:
    """Find the stages that a directory was made from (an import as `embed`), and a key's places in their rows.

    Raises: UsageError without embeddings or such a key, ContractError if an input of one of them has changed.
    """
    latest = _latest(directory)
    try:
        latest.source("embed", "import")  # rows join by position, so one state of the embeddings is needed
    except LookupError as error:
        raise UsageError(f"{error}.", "give a directory of embed, cluster, select or emit") from None
    stages = {each.command: each for each in reversed(list(show.lineage(latest)))}
    stages.setdefault("embed", stages.get("import", latest))
    for stage in stages.values():
        stage.sidecars.keep()
    places = list(find(stages["embed"], key))
    if not places:
        raise UsageError(f"no sample has the key {key!r} in {stages['embed'].directory}.")
    return stages, places


def _latest(directory: str) -> manifest.Artefact:
    """Open an artefact, or the last stage of a pipeline's directory: a coreset, else a selection, else …"""
    if not paths.exists(paths.join(directory, manifest.MANIFEST)) and paths.is_dir(directory):
        for name in ("coreset", "selection", "clusters", "embeddings"):
            if paths.exists(paths.join(directory, name, manifest.MANIFEST)):
                return manifest.open_input(paths.join(directory, name))
    return manifest.open_input(directory)


def find(embedded: manifest.Artefact, key: str) -> Iterator[Place]:
    """Yield the places of a key, reading one column of one shard at a time."""
    import pyarrow.compute as pc

    for stem, table in embedded.sidecars.tables(["key"]):
        matches = pc.indices_nonzero(pc.equal(table["key"], key))
        yield from ((stem, int(row)) for row in matches.to_pylist())


def _story(
    key: str, place: Place, stages: Mapping[str, manifest.Artefact], embedded: manifest.Artefact
) -> Iterator[str]:
    """Tell one sample's story, a paragraph for each stage that knows it."""
    facts = _row(embedded, place)
    funnel = manifest.load_json(stages["select"].path(FUNNEL)) if "select" in stages else {}
    yield f"{key} · row {place[1]:,} of {place[0]}"
    yield f"  caption    {facts['caption'] or '(none)'}"
    size = f"{facts['width']} × {facts['height']} px" if facts["width"] else "not decoded"
    parts = (size, f"uid {facts['uid'].hex()}" if facts["uid"] else "", facts["url"] or "")
    yield f"  image      {', '.join(filter(None, parts))}"
    if facts["status"] != "ok":
        why = sidecar.facts(embedded.path(f"{place[0]}.arrow")).get("reasons", {}).get(str(place[1]))
        yield f"  status     {facts['status']}: {why or STATUSES.get(facts['status'], 'unknown')}"
    else:
        yield f"  embedded   {_score('clip_score', facts['clip_score'], funnel)}"
    if "cluster" in stages:
        where = _row(stages["cluster"], place)
        if where["cluster"] >= 0:
            near = _score("centroid_similarity", where["centroid_similarity"], funnel)
            yield f"  clustered  in cluster {where['cluster']}, {near}"
    if "select" in stages:
        yield from _verdict(place, stages["select"], embedded, funnel)
    if "emit" in stages:
        yield f"  emitted    {_emitted(stages['emit'], place)}"


def _row(artefact: manifest.Artefact, place: Place) -> dict[str, Any]:
    """Read one row of a sidecar, without its vectors."""
    names = [name for name in artefact.sidecars.schema(place[0]).names if not name.endswith("_embedding")]
    [record] = artefact.table(place[0], names).slice(place[1], 1).to_pylist()
    return dict(record)


def _score(column: str, value: float, funnel: Mapping[str, Any]) -> str:
    """Write a score, and what part of the usable rows it exceeds, as far as the stored histogram tells."""
    counted = funnel.get("histograms", {}).get(column)
    if not counted or value is None:
        return f"{column} {value:.4f}" if value is not None else f"no {column}"
    middles = (np.array(counted["edges"][:-1]) + np.array(counted["edges"][1:])) / 2
    below = sum(n for n, middle in zip(counted["all"], middles, strict=True) if middle < value)
    return f"{column} {value:.4f}, above about {100 * below / max(1, sum(counted['all'])):.0f} % of the usable rows"


def _verdict(
    place: Place, selection: manifest.Artefact, embedded: manifest.Artefact, funnel: Mapping[str, Any]
) -> Iterator[str]:
    """Say whether the selection kept the row, else which step dropped it, in whose favour."""
    verdict = _row(selection, place)
    steps: Sequence[Mapping[str, Any]] = funnel.get("steps", [])
    texts = [step["text"] for step in steps]
    if verdict["kept"]:
        yield f"  selected   kept by all {len(texts)} steps"
    else:
        reason = verdict["dropped_by"]
        number = f", step {texts.index(reason) + 1} of {len(texts)}" if reason in texts else ""
        yield f"  selected   no: dropped by {reason}{number}"
    if verdict["twin"] is None:
        return
    linked = verdict["twin_similarity"]
    yield f"  twin       {verdict['twin']} was kept in its place" + (
        f", linked at {linked:.4f}" if linked is not None else ""
    )
    for other in _twins(embedded, selection, verdict):
        cosine = float(_vector(embedded, place) @ _vector(embedded, other))
        fate = _row(selection, other)
        later = "and is in the selection" if fate["kept"] else f"and was dropped later by {fate['dropped_by']}"
        yield f"             row {other[1]:,} of {other[0]}: cosine {cosine:.4f}, {later}"
        yield f"             caption {_row(embedded, other)['caption']}"


def _twins(embedded: manifest.Artefact, selection: manifest.Artefact, verdict: Mapping[str, Any]) -> list[Place]:
    """Find the twin by its key; if several shards use this key, take the rows of the sample's own component."""
    found = list(find(embedded, verdict["twin"]))
    if len(found) < 2:
        return found
    told = {place: _row(selection, place) for place in found}
    stayed = [place for place in found if told[place]["twin"] is None]
    return [place for place in stayed if told[place]["component"] == verdict["component"]] or stayed


def _vector(embedded: manifest.Artefact, place: Place) -> np.ndarray:
    [vector] = embedded.sidecars.take_vectors(place[0], "image_embedding", np.array([place[1]]))
    return np.asarray(vector, np.float32)


def _emitted(emitted: manifest.Artefact, place: Place) -> str:
    """Find a sample in a coreset by where it came from."""
    import pyarrow.compute as pc

    for name in paths.listdir(emitted.directory):
        if not name.endswith(".arrow"):
            continue
        table = sidecar.table(emitted.path(name), ["key", "source_stem", "source_row"])
        here = pc.and_(pc.equal(table["source_stem"], place[0]), pc.equal(table["source_row"], place[1]))
        for row in pc.indices_nonzero(here).to_pylist():
            return f"as {table['key'][row].as_py()}, in shard {name.removesuffix('.arrow')} of {emitted.directory}"
    return "no"
