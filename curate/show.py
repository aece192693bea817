"""Tell in the terminal what a directory is, how it came about, and what became of one sample."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from curate import paths, store
from curate.errors import UsageError

BAR = 24


def headline(command: str, manifest: Mapping[str, Any]) -> str:
    """Say in one line what a stage made: rows, and what became of them."""
    counts = manifest.get("counts", {})
    account = " · ".join(f"{count:,} {name}" for name, count in counts.items() if isinstance(count, int) and count)
    rows = sum(int(shard.get("rows", 0)) for shard in manifest.get("shards", {}).values())
    shards = len(manifest.get("shards", {}))
    what = f"{rows:,} rows in {shards:,} shards" if shards else ""
    fit = manifest.get("fit", {})
    if fit:
        account += f" · k = {manifest['clusters']['k']:,} fitted on {fit['fitted_rows']:,} rows"
    return f"  {command}: {' — '.join(part for part in (what, account) if part) or 'done'}"


def show(directory: str) -> Iterator[str]:
    """Yield the lines that describe a directory: its making, its counts, its funnel, its troubles."""
    artefact = store.open_input(directory)
    manifest = artefact.manifest
    yield f"{directory}: made by `curate {artefact.command}`"
    yield from _lineage(artefact)
    yield headline(artefact.command, manifest).strip()
    for name, value in manifest.items():
        if name not in ("format", "command", "options", "inputs", "shards", "counts", "failed", "funnel", "versions"):
            yield f"  {name}: {recall_line(value) if name == 'recall' else _brief(value)}"
    if paths.exists(artefact.path("funnel.json")):
        yield from funnel_lines(store.load_json(artefact.path("funnel.json")))
    notes = [(stem, note) for stem, shard in manifest.get("shards", {}).items() for note in shard.get("notes", [])]
    yield from (f"  note: {stem}: {note}" for stem, note in notes[:10])
    if len(notes) > 10:
        yield f"  … and {len(notes) - 10:,} more notes in {artefact.path(store.MANIFEST)}"
    for stem, why in manifest.get("failed", {}).items():
        yield f"  FAILED {stem}: {why}"


def _lineage(artefact: store.Artefact) -> Iterator[str]:
    """Yield one line per directory that this one rests on, nearest first."""
    options = " ".join(f"{key}={_brief(value)}" for key, value in artefact.manifest.get("options", {}).items())
    yield f"  options: {options or 'none'}"
    for name, source in artefact.manifest.get("inputs", {}).items():
        location = artefact.input_path(name)
        yield f"  {name}: {location}"
        if paths.exists(paths.join(location, store.MANIFEST)):
            upstream = store.open_input(location)
            if upstream.digest != source.get("digest"):
                yield f"  WARNING: {location} has changed since"
            yield from ("  " + line for line in _lineage(upstream))


def recall_line(recall: Mapping[str, Any]) -> str:
    """Say which share of a sample's near pairs met in a cluster, by level of cosine."""
    shares = [
        f"{level['found']:.1%} of {level['pairs']:,} above {level['above']}"
        for level in recall["levels"]
        if level["pairs"]
    ]
    sample = f"(brute force on {recall['compared']:,} of {recall['sample']:,} sampled rows)"
    return f"near pairs that were compared: {' · '.join(shares) or 'none to be found'} {sample}"


def _brief(value: Any, limit: int = 100) -> str:
    text = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def funnel_lines(funnel: Mapping[str, Any]) -> Iterator[str]:
    """Draw the funnel: one bar per step, with what it dropped and what it estimated."""
    steps = funnel.get("steps", [])
    total = max((int(step["before"]) for step in steps), default=0)
    for step in steps:
        kept, before = int(step["kept"]), int(step["before"])
        bar = "█" * round(BAR * kept / total) if total else ""
        yield f"  {bar:<{BAR}} {kept:>11,}  −{before - kept:,} by {step['text']}"
        told = [f"{name} {_number(value)}" for name, value in (step.get("estimates") or {}).items() if _is_short(value)]
        for start in range(0, len(told), 4):
            yield f"  {'':<{BAR}} {'':>11}    {' · '.join(told[start : start + 4])}"


def _is_short(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def step_lines() -> Iterator[str]:
    """Yield the steps, columns and recipes of select, as they are written, with what each does or is."""
    import inspect

    from curate import columns, computed, recipes, steps
    from curate.selectors import STEPS

    def about(function: object) -> str:
        return (inspect.getdoc(function) or "").splitlines()[0]

    yield "steps, for --step:"
    yield from _aligned((steps.signature(name), about(step)) for name, step in STEPS.items())
    yield "columns of numbers, for rank, above, top and the like:"
    made = ((computed.signature(name), about(column)) for name, column in computed.COLUMNS.items())
    yield from _aligned([*columns.ABOUT.items(), *made])
    yield "columns of groups, for balance and cap:"
    yield f"  {', '.join((*columns.GROUPS, 'cluster'))}"
    yield "recipes, for --recipe, with --n for the number of rows:"
    yield from _aligned((recipe.signature(name), recipe.about) for name, recipe in recipes.RECIPES.items())


def _aligned(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield pairs as one line each, the second in a column of its own where the first leaves it room."""
    pairs = list(lines)
    width = min(50, max(len(left) for left, _ in pairs))
    yield from (f"  {left:<{width}}  {right}" for left, right in pairs)


def show_key(directory: str, key: str) -> Iterator[str]:
    """Yield the life of one sample: what it is, its scores, its cluster, the step that dropped it, its twin.

    Raises: UsageError when no sidecar has the key.
    """
    artefact = store.open_input(directory)
    chain = list(_chain(artefact))
    embedded = next((each for each in chain if each.command in ("embed", "import")), None)
    if embedded is None:
        raise UsageError(
            f"{directory} does not rest on embeddings", "give a directory of embed, cluster, select or emit"
        )
    found = list(_find(embedded, key))
    if not found:
        raise UsageError(f"no sample has the key {key!r} in {embedded.directory}")
    for stem, row in found:
        yield f"{key} · row {row:,} of {stem}"
        for each in reversed(chain):
            if each.command in ("embed", "import", "cluster", "select"):
                record = each.table(stem).slice(row, 1).to_pylist()[0]
                yield f"  {each.command}"
                for column, value in record.items():
                    if column.endswith("_embedding") or column == "key" or value is None:
                        continue
                    yield f"    {column}: {value.hex() if isinstance(value, bytes) else value}"


def _chain(artefact: store.Artefact) -> Iterator[store.Artefact]:
    """Yield an artefact and all that it rests on, nearest first."""
    yield artefact
    for name in artefact.manifest.get("inputs", {}):
        location = artefact.input_path(name)
        if paths.exists(paths.join(location, store.MANIFEST)):
            yield from _chain(store.open_input(location))


def _find(embedded: store.Artefact, key: str) -> Iterator[tuple[str, int]]:
    """Yield the places of a key, reading one column of one shard at a time."""
    import pyarrow.compute as pc

    for stem in embedded.stems:
        matches = pc.indices_nonzero(pc.equal(embedded.table(stem, ["key"])["key"], key))
        yield from ((stem, int(row)) for row in matches.to_pylist())
