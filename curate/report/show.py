"""Show in the terminal, on one screen, what a directory is and how it was made.

Any directory of curate or of the trainer, a pool, a pipeline's or an ablation's: its rows and what became of them, the
funnel and the spread of the scores, the sources of a mix, the loss of a run, the claims of an ablation, and its inputs.
"""

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from curate.ask.stored import stored_lines
from curate.errors import UsageError
from curate.report import ablation_tables, concepts, provenance
from curate.report.provenance import is_finite
from curate.storage import paths, tar
from curate.storage.manifest import FAILED, MANIFEST, PLAN, Artefact, load_json, open_input
from curate.storage.schema import FUNNEL
from pipelines.terminal import printable

BAR, MOST, WIDTH = 24, 8, 110
BLOCKS = " ▁▂▃▄▅▆▇█"
HEADINGS = {
    "demo": "a rendered pool with planted faults",
    "embed": "embeddings",
    "import": "imported embeddings",
    "cluster": "clusters",
    "select": "a selection",
    "emit": "a coreset",
    "mix": "a mix of instruction data",
}


def headline(command: str, manifest: Mapping[str, Any]) -> str:
    """Say in one line what a stage made: rows, and what became of them."""
    counts = manifest.get("counts", {})
    account = " · ".join(
        f"{count:,} {name.replace('_', ' ')}"
        for name, count in counts.items()
        if isinstance(count, int) and count and name != "rows"
    )
    rows = sum(int(shard.get("rows", 0)) for shard in manifest.get("shards", {}).values())
    number = len(manifest.get("shards", {}))
    what = f"{rows:,} rows in {_several(number, 'shard')}" if number else ""
    if "clusters" in manifest:
        fitted = manifest["fit"].get("fitted_rows")
        account += f" · k = {manifest['clusters']['k']:,} {'given' if fitted is None else f'fitted on {fitted:,} rows'}"
        account += f", {later:,} came later" if (later := manifest["fit"].get("later_rows", 0)) else ""
    if command == "mix" and (lost := sum(manifest.get("faults", {}).values())):
        read = sum(source["read"] for source in manifest["sources"].values())
        account = f"{lost:,} of {read:,} records lost" + (f" · {account}" if account else "")
    if left := manifest.get("unfinished"):
        account = f"this part is done, others are not ({_several(len(left), 'shard')} left: "
        account += "restart a part that died, or that began before the pool changed)"
        if command == "cluster":
            account = "this part is done, others are not (run it again once they are: a step is left)"
    otherwise = "made nothing" if manifest.get("failed") else "done"
    return f"  {command}: {' — '.join(part for part in (what, account) if part) or otherwise}"


def selection_lines(directory: str) -> Iterator[str]:
    """Yield what `curate select` prints at its end: the funnel, and the clusters that it starved and favoured."""
    funnel = load_json(paths.join(directory, FUNNEL))
    yield from map(printable, (*funnel_lines(funnel), *concepts.lines(funnel), *cluster_lines(funnel)))


def _several(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _wrapped(facts: Iterable[str], indent: int = 2) -> Iterator[str]:
    """Yield facts side by side, as many to a line as fit; only a long one is broken, at its spaces."""
    joined = "\u00a0· ".join(fact.replace(" ", "\u00a0") if len(fact) < WIDTH // 2 else fact for fact in facts)
    for line in textwrap.wrap(joined, WIDTH - indent, break_on_hyphens=False):
        yield f"{'':<{indent}}{line}".replace("\u00a0", " ")


def show(directory: str) -> Iterator[str]:
    """Yield the lines that describe a directory. Raises: UsageError if neither program made it."""
    if paths.exists(paths.join(directory, ablation_tables.FILE)):
        yield from _ablation(directory)
    elif paths.exists(paths.join(directory, "metrics.jsonl")):
        yield from _run(directory)
    elif paths.exists(paths.join(directory, "answers.jsonl")):
        yield from _answers(directory)
    elif paths.exists(paths.join(directory, MANIFEST)):
        yield from _artefact(open_input(directory))
    elif paths.exists(paths.join(directory, PLAN)):
        plan = load_json(paths.join(directory, PLAN))
        names = paths.listdir(directory) + paths.listdir(paths.join(directory, "table"))
        made = {name.rpartition(".")[0] for name in names if name.endswith((".arrow", ".tar", ".parquet", ".txt"))}
        yield f"{directory}: UNFINISHED, by `curate {plan.get('command')}`: the same command resumes it"
        yield f"  {_several(len(made), 'shard')} of it are done"
        for name in paths.listdir(paths.join(directory, FAILED)):
            yield f"  FAILED {name.removesuffix('.json')}: {load_json(paths.join(directory, FAILED, name))}"
    elif paths.exists(paths.join(directory, "train_manifest.json")):
        yield from _model(directory)
    else:
        yield from _pipeline(directory)


def _artefact(artefact: Artefact) -> Iterator[str]:
    """Describe a directory that a verb of curate made."""
    manifest = artefact.manifest
    yield f"{artefact.directory}: {HEADINGS.get(artefact.command, 'made')}, by `curate {artefact.command}`"
    yield from _wrapped(headline(artefact.command, manifest).strip().split(" · "))
    if artefact.command == "mix":
        yield from _sources(manifest)
    chain = list(lineage(artefact))
    selection = next((each for each in chain if each.command == "select"), None)
    if selection is not None and artefact.command in ("select", "emit"):
        funnel = load_json(selection.path(FUNNEL))
        yield from funnel_lines(funnel)
        yield from concepts.lines(funnel)
        yield from cluster_lines(funnel)
        yield from score_lines(funnel)
    if artefact.command == "cluster":
        yield f"  clusters: {_brief(manifest.get('clusters', {}))} · near-duplicate edges {manifest.get('edges', 0):,}"
        if "recall" in manifest:
            yield from _wrapped(recall_line(manifest["recall"]).split(" · "))
    yield from _troubles(artefact)
    for each in chain:
        given = {
            key: v for key, v in each.manifest.get("options", {}).items() if v not in ("", None) and key != "steps"
        }
        options = " ".join(f"{key}={_brief(v, 40)}" for key, v in given.items())
        label = "made with" if each is artefact else f"from {each.directory}:"
        yield f"  {label} {_brief(options, 110)}"
    yield from _changed(chain)
    for name in chain[-1].manifest.get("inputs", {}):
        yield f"  from {chain[-1].input_path(name)}"


def lineage(artefact: Artefact) -> Iterator[Artefact]:
    """Yield an artefact and all that it was made from and that still exists, nearest first."""
    yield artefact
    for name in artefact.manifest.get("inputs", {}):
        location = artefact.input_path(name)
        if paths.exists(paths.join(location, MANIFEST)):
            yield from lineage(open_input(location))


def _changed(chain: Sequence[Artefact]) -> Iterator[str]:
    """Warn of inputs that have changed; an import records its source's files, not its manifest."""
    for each in (each for each in chain if each.command != "import"):
        for name, source in each.manifest.get("inputs", {}).items():
            location = each.input_path(name)
            upstream = next((other for other in chain if other.directory == location), None)
            if upstream is not None and upstream.digest != source.get("digest"):
                yield f"  WARNING: {location} has changed since"


def _troubles(artefact: Artefact) -> Iterator[str]:
    """List what went wrong: notes, failed shards, missing samples."""
    manifest = artefact.manifest
    notes = [f"{stem}: {note}" for stem, shard in manifest.get("shards", {}).items() for note in shard.get("notes", [])]
    failed = [f"FAILED {stem}: {why}" for stem, why in manifest.get("failed", {}).items()]
    gone = [f"gone from the pool: {entry.get('key')} ({entry.get('why')})" for entry in manifest.get("gone", [])]
    for kind in (notes, failed, gone):
        yield from (f"  {text}" for text in kind[:MOST])
        if len(kind) > MOST:
            yield f"  … and {len(kind) - MOST:,} more in {artefact.path(MANIFEST)}"


def recall_line(recall: Mapping[str, Any]) -> str:
    """Say what share of a sample's near pairs met in a cluster, by level of cosine."""
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
        estimates = ((name.replace("_", " "), value) for name, value in (step.get("estimates") or {}).items())
        yield from _wrapped([f"{name} {_number(value)}" for name, value in estimates if _is_short(value)], BAR + 17)


def cluster_lines(funnel: Mapping[str, Any]) -> Iterator[str]:
    """Name the clusters that kept the smallest and the largest shares of their rows."""
    clusters = funnel.get("clusters", {})
    for kind, verb in (("starved", "least"), ("favoured", "most")):
        chosen = clusters.get(kind, [])
        if chosen:
            yield f"  clusters that kept {verb} of their rows (all: {clusters['share']:.1%})"
        for entry in chosen:
            counts = f"{entry['kept']:,} of {entry['rows']:,}"
            share = f"({entry['kept'] / entry['rows']:.1%})"
            yield f"  {counts:>{BAR}} {share:>11}  cluster {entry['cluster']}: {_brief(entry['words'] or '–', 50)}"


def score_lines(funnel: Mapping[str, Any]) -> Iterator[str]:
    """Draw each score's spread as two lines of blocks: all rows, and the kept ones."""
    for column, counted in funnel.get("histograms", {}).items():
        low, high = counted["edges"][0], counted["edges"][-1]
        yield f"  {column:<20} {low:>8.3f} {sparkline(counted['all'])} {high:.3f}  all"
        yield f"  {'':<20} {'':>8} {sparkline(counted['kept'])} {'':<{len(f'{high:.3f}')}}  kept"


def sparkline(values: Sequence[float], width: int = 30) -> str:
    """Draw values as blocks, adding up neighbours until they fit the width."""
    group = max(1, -(-len(values) // width))
    sums = [sum(values[start : start + group]) for start in range(0, len(values), group)]
    top = max(sums, default=0)
    return "".join(BLOCKS[0 if not value else max(1, round(8 * value / top))] for value in sums)


def _is_short(value: Any) -> bool:
    return not isinstance(value, list | dict)


def _number(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _sources(manifest: Mapping[str, Any]) -> Iterator[str]:
    """Draw a mix's sources by their share of the samples, with their share of the tokens."""
    sources, counts = manifest.get("sources", {}), manifest["counts"]
    for name, source in list(sources.items())[: 2 * MOST]:
        share = source["samples"] / max(1, counts["rows"])
        shares = f"{share:.1%} of samples, {source['tokens'] / max(1, counts['tokens']):.1%} of tokens"
        lost = "".join(f" · {count:,} {why}" for why, count in source.get("faults", {}).items() if count)
        yield f"  {'█' * round(BAR * share):<{BAR}} {source['samples']:>11,}  {name}: {shares}{lost}"
    if len(sources) > 2 * MOST:
        yield f"  … and {len(sources) - 2 * MOST} more sources"
    samples, tokens = (float(manifest.get(f"text_share_{by}", 0)) for by in ("samples", "tokens"))
    yield f"  text-only: {samples:.2%} of the samples, {tokens:.2%} of the tokens"


def _run(directory: str) -> Iterator[str]:
    """Describe a training run: its command, its loss and its pace, whether it is finished."""
    [made] = provenance.training({paths.name(directory): directory}, "page")
    logged = [entry for entry in provenance.entries(paths.join(directory, "metrics.jsonl")) if "loss" in entry]
    rows = [entry for entry in logged if is_finite(entry["loss"])]
    done = paths.exists(paths.join(directory, MANIFEST))
    losses = [float(entry["loss"]) for entry in rows]
    step = max(1, len(losses) // 60)
    means = [sum(losses[i : i + step]) / len(losses[i : i + step]) for i in range(0, len(losses), step)]
    last = f" · loss {means[-1]:.4f} at step {_number(rows[-1].get('step', len(rows)))}" if rows else ""
    yield f"{directory}: a training run, {'finished' if done else 'UNFINISHED: the same command resumes it'}{last}"
    yield from _wrapped(made["account"].split(" · "))
    if len(rows) < len(logged):
        yield f"  WARNING: {len(logged) - len(rows):,} of {_several(len(logged), 'logged step')} have no finite loss"
    if rows:
        lowest = min(means)
        shape = "".join(BLOCKS[1 + round(7 * (mean - lowest) / ((max(means) - lowest) or 1))] for mean in means)
        yield f"  loss {means[0]:.4f} {shape} {means[-1]:.4f}"
        pace = {"tokens_per_s": "tokens/s", "mfu": "MFU", "peak_memory_gb": "GB at the peak", "eta_s": "s to go"}
        facts = [f"{float(rows[-1][key]):,.4g} {name}" for key, name in pace.items() if is_finite(rows[-1].get(key))]
        yield f"  {' · '.join(facts)}"
    if done:
        result = load_json(paths.join(directory, MANIFEST)).get("result", {})
        numbers = {key: value for key, value in result.items() if isinstance(value, int | float)}
        yield from _wrapped(f"{_number(value)} {key.replace('_', ' ')}" for key, value in numbers.items())
        if result.get("skipped"):
            yield f"  skipped: {_brief(result['skipped'])}"
    yield f"  {made['command']}"


def _answers(directory: str) -> Iterator[str]:
    """Describe a trained model's answers: how many are right, by task."""
    tasks: dict[str, list[bool]] = {}
    for entry in provenance.entries(paths.join(directory, "answers.jsonl")):
        if isinstance(entry.get("right"), bool):
            tasks.setdefault(str(entry.get("task") or "all"), []).append(entry["right"])
    every = [right for answers in tasks.values() for right in answers]
    overall = f", {sum(every) / len(every):.1%} of them right" if every else ""
    yield f"{directory}: a model's answers to {len(every):,} held-out questions{overall}"
    for task, right in sorted(tasks.items()):
        share = sum(right) / len(right)
        yield f"  {'█' * round(BAR * share):<{BAR}} {share:>7.1%}  {task} ({len(right):,})"
    if paths.exists(paths.join(directory, MANIFEST)):
        result = load_json(paths.join(directory, MANIFEST)).get("result", {})
        yield f"  scores: {_brief(result.get('scores', {}))}"


def _model(directory: str) -> Iterator[str]:
    """Describe an exported model."""
    config = load_json(paths.join(directory, "config.json"))
    parts = [str(config.get(part, {}).get("model_type", "?")) for part in ("vision_config", "text_config")]
    yield f"{directory}: an exported model, {config.get('architectures', ['?'])[0]} of {' and '.join(parts)}"
    yield "  transformers loads it as it is: AutoModelForImageTextToText.from_pretrained(…)"
    yield f"  python -m train generate {directory} --image X.jpg"


def _ablation(directory: str) -> Iterator[str]:
    """Describe an ablation: what was claimed and held, and each arm beside the reference."""
    ablation = ablation_tables.section(paths.join(directory, ablation_tables.FILE))
    yield f"{directory}: an ablation, {ablation['name']}: {ablation['trials']:,} trials over {ablation['seeds']} seeds"
    yield f"  {ablation['about']}"
    for bar in ablation["bars"]:
        scale, unit = (100, " %") if bar["percent"] else (1, "")
        facts = f"{scale * bar['mean']:+.2f}{unit}, t {_number(bar['t'])}, p {_number(bar['p'])}, n {bar['n']}"
        yield f"  {'held    ' if bar['met'] else 'NOT HELD'}  {bar['claim']}: {bar['measure']} {facts}"
    yield f"  means; ▲ better, ▼ worse than {ablation['reference']} by the 95 % interval of the paired difference"
    for group in ablation["glance"][:3]:
        yield from _arm_lines(group, ablation["measures"])
    if len(ablation["glance"]) > 3:
        yield f"  … and {len(ablation['glance']) - 3} more such tables"
    for mix in ablation["mixtures"]:
        yield f"  best mixture by the fit: {mix['best']['name']}; next to try: {mix['next']['name']}"
    if ablation["num_failed"]:
        yield f"  {ablation['num_failed']:,} trials FAILED: run the same command again"
    yield f"  all of it: {paths.join(directory, ablation_tables.FILE)}, or `curate report {directory} report.html`"


def _arm_lines(group: Mapping[str, Any], measures: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Lay out the arms of a group as a table, as many measures as the line has room for."""
    names = [measure["name"] + (" %" if measure["percent"] else "") for measure in measures]
    arms = list(group["arms"].items())[: 2 * MOST]
    left = max([len(group["name"]), *(min(len(arm), 30) for arm, _ in arms)])
    fits = [place for place in range(len(names)) if left + sum(len(name) + 2 for name in names[: place + 1]) < WIDTH]
    yield f"  {group['name']:<{left}}" + "".join(f"  {names[place]}" for place in fits)
    for arm, cells in arms:
        values = (f"{_cell(cells[place]):>{len(names[place])}}" for place in fits)
        yield f"  {arm[:30]:<{left}}" + "".join(f"  {text}" for text in values)
    if len(arms) < len(group["arms"]):
        yield f"  … and {len(group['arms']) - len(arms)} more arms"


def _cell(cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    mark = {"better": "▲ ", "worse": "▼ "}.get(cell["verdict"], "")
    return mark + (f"{cell['mean']:.1f}" if cell["percent"] else f"{cell['mean']:.4g}")


def _pipeline(directory: str) -> Iterator[str]:
    """Describe a pipeline's directory: a line for each stage, then the funnel. Raises: UsageError for any other."""
    if directory.lower().endswith(tar.TAR_SUFFIXES):
        yield from _pool(directory)
        return
    if not paths.is_dir(directory):
        raise UsageError(f"{directory} is not a directory.", "give a stage's directory, a pool, or a pipeline's OUT")
    lost, selection, names = [], None, paths.listdir(directory)
    tars = {name for name in names if name.lower().endswith(tar.TAR_SUFFIXES)}
    if lines := list(stored_lines(directory.rstrip("/"))):
        yield from lines
        return
    for name in (name for name in names if name not in tars):
        place = paths.join(directory, name)
        if any(
            paths.exists(paths.join(place, file)) for file in ("metrics.jsonl", "answers.jsonl", "train_manifest.json")
        ):
            lines.append(f"  {name:<20} {next(show(place)).removeprefix(place + ': ')}")
        elif paths.exists(paths.join(place, PLAN)):
            lines.append(f"  {name:<20} UNFINISHED: the same command resumes it")
        elif paths.exists(paths.join(place, MANIFEST)):
            artefact = open_input(place)
            lines.append(f"  {name:<20} {headline(artefact.command, artefact.manifest).strip()}")
            failed = artefact.manifest.get("failed", {})
            lost += [f"  FAILED {name}/{stem}: {why}" for stem, why in list(failed.items())[:MOST]]
            selection = (
                artefact if name == "selection" or selection is None and artefact.command == "select" else selection
            )
    if not lines and tars:
        yield from _pool(directory)
        return
    if not lines:
        raise UsageError(
            f"{directory} holds nothing that curate or train made, and no tars.",
            "give a stage's directory, a pool, or a pipeline's OUT",
        )
    yield f"{directory}: {len(lines)} directories, each of which `curate show` describes"
    yield from (line if len(line) <= WIDTH else line[: WIDTH - 1] + "…" for line in lines + lost)
    if selection is not None:
        yield from funnel_lines(load_json(selection.path(FUNNEL)))


def _pool(directory: str) -> Iterator[str]:
    """Describe a pool by its shards, and by the members of the first of them."""
    shards = tar.list_pool(directory)
    size = sum(shard.size for shard in shards)
    names = f"{shards[0].stem} … {shards[-1].stem}"
    yield f"{directory}: a pool of {_several(len(shards), 'tar')}, {size / 1e6:,.1f} MB: {names}"
    with tar.open_tar(shards[0].location) as file:
        index = tar.read_index(file)
    suffixes = Counter(member.suffix for sample in index.samples for member in sample.members)
    members = " · ".join(f"{count:,} .{suffix}" for suffix, count in suffixes.most_common(MOST))
    yield f"  {shards[0].stem} has {_several(len(index.samples), 'sample')}: {members}"
    yield from (f"  {shards[0].stem}: {note}" for note in index.notes)
    yield f"  curate embed {directory} EMB"
