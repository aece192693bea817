"""Make one self-contained HTML page about a selection: what was dropped and why, with pictures.

In: a directory that a verb made, or one that holds such directories (a pipeline's). Out: an HTML file that opens from
disk without a network: its styles, script, charts and thumbnails are inside. Text from the data (captions, keys) is not
trusted: the template escapes everything, and the page's policy allows no script but its own.
"""

import base64
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from curate import engine
from curate.errors import UsageError
from curate.report import ablation_tables, cluster_map, concepts, duplicates, provenance, sections, threshold_sliders
from curate.report.gallery import Gallery, open_samples
from curate.report.options import ReportOptions
from curate.storage import manifest, paths, whole_files
from curate.storage.schema import FUNNEL, STATUSES

KEPT, DROPPED, TWINS, BAD, CLUSTER_CARDS, CLUSTER_KEPT = 28, 14, 12, 7, 7, 3
MAX_STEPS_SHOWN = 14
JUDGEMENT = "judgement.json"
FORMULA = ("=", "@", "\t", "\r"), ("=", "@", "\t", "\r", "+", "-")  # what opens one: in any cell, in a caption
COMMANDS = ("embed", "import", "cluster", "select", "emit", "mix")


@dataclass
class Artefacts:
    """The artefacts a page is about, by what they are."""

    selection: manifest.Artefact | None = None
    clusters: manifest.Artefact | None = None
    embedded: manifest.Artefact | None = None
    emitted: manifest.Artefact | None = None
    mixed: manifest.Artefact | None = None
    others: dict[str, manifest.Artefact] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    evals: dict[str, str] = field(default_factory=dict)
    ablation: str = ""

    @property
    def chain(self) -> list[manifest.Artefact]:
        """The artefacts in the order in which they were made."""
        every = (self.embedded, self.clusters, self.selection, self.emitted, self.mixed)
        return [artefact for artefact in every if artefact is not None]


def report(directory: str, out: str, options: ReportOptions, job: engine.Job) -> dict[str, Any]:
    """Write the page about `directory` to the file `out` and say what is in it.

    Raises: UsageError when the directory holds nothing that curate made.
    """
    artefacts = discover(directory)
    gallery, troubles = _gallery(artefacts, options.seed)
    context: dict[str, Any] = {
        "title": options.title or paths.name(paths.resolve(paths.local(directory), os.getcwd())),
        "troubles": troubles,
        "chain": [provenance.provenance(artefact, out) for artefact in artefacts.chain],
        "speeds": list(provenance.speeds(artefacts.chain)),
        "versions": provenance.versions(artefacts.chain),
        "typed": provenance.typed(artefacts.chain),
        "funnel": None,
        "figures": [],
        "select_words": [],
        "sizes": None,
        "concepts": gallery.compare_captions() if gallery and artefacts.selection is not None else None,
        "shown": None,
        "mixture": sections.mixture(artefacts.mixed),
        "losses": list(sections.losses(artefacts.runs)),
        "scores": list(sections.scores(artefacts.evals)),
        "runs": list(provenance.training(artefacts.runs, out)),
        "ablation": ablation_tables.section(artefacts.ablation) if artefacts.ablation else None,
        "in_shards": _in_shards(gallery, artefacts),
        "embedded": artefacts.embedded.manifest.get("counts", {}) if artefacts.embedded is not None else {},
        "others": list(_comparison(artefacts, directory)),
    }
    if artefacts.selection is not None:
        funnel = manifest.load_json(artefacts.selection.path(FUNNEL))
        context |= {
            "funnel": sections.funnel(funnel),
            "shown": concepts.of_pictures(funnel),
            "figures": list(threshold_sliders.figures(funnel)),
            "select_words": provenance.select_words(artefacts.selection, out),
        }
    elif gallery is not None and gallery.columns:
        scores = gallery.columns["score"]
        if not np.isnan(scores).all():
            label = f"{int((~np.isnan(scores)).sum()):,} pairs{_in_shards(gallery, artefacts)}"
            context["figures"] = [threshold_sliders.plain("clip_score", scores, label)]
    if artefacts.clusters is not None:
        context["sizes"] = cluster_map.section(artefacts.clusters, artefacts.selection)
    pictures = _choose_cards(context, gallery, artefacts)
    page = render(context)
    write_page(out, page)
    facts = {"bytes": len(page), "samples_shown": len(gallery.cards) if gallery else 0, "picture_bytes": pictures}
    return {"command": "report", "counts": facts, "shards": {}}


def discover(directory: str) -> Artefacts:
    """Find what a directory is, or holds, and what it was made from. Raises: UsageError if there is nothing."""
    artefacts = Artefacts()
    if paths.exists(paths.join(directory, ablation_tables.FILE)):
        artefacts.ablation = paths.join(directory, ablation_tables.FILE)
    for name, place in ((paths.name(directory), directory), *_children(directory)):
        record = paths.join(place, manifest.MANIFEST)
        if paths.exists(paths.join(place, "metrics.jsonl")):
            artefacts.runs[name] = place
        elif paths.exists(record) and _command(record) in COMMANDS:
            _place(artefacts, manifest.open_input(place), name)
        elif _is_eval(place):
            artefacts.evals[name] = place
        if place == directory and (artefacts.chain or artefacts.runs or artefacts.evals):
            break  # it is such a directory itself
    newest = artefacts.emitted if artefacts.selection is None else artefacts.selection
    if newest is not None:
        artefacts.selection = artefacts.selection or _source(newest, "select")
        artefacts.clusters = _source(newest, "cluster")
        artefacts.embedded = _source(newest, "embed", "import")
    elif artefacts.clusters is not None:
        artefacts.embedded = _source(artefacts.clusters, "embed", "import")
    if not (artefacts.chain or artefacts.runs or artefacts.evals or artefacts.ablation):
        raise UsageError(
            f"{directory} holds nothing that curate made.", "give a directory of select or emit, or a pipeline's OUT"
        )
    return artefacts


def _command(record: str) -> Any:
    """Read which verb a manifest names; None if it is not a manifest."""
    found = manifest.load_json(record)
    return found.get("command") if isinstance(found, dict) else None


def _children(directory: str) -> Iterator[tuple[str, str]]:
    """Yield what may be a subdirectory: shards, of which there may be very many, are passed over."""
    for name in paths.listdir(directory):
        if not name.endswith((".tar", ".arrow", ".parquet")):
            yield name, paths.join(directory, name)


def _is_eval(place: str) -> bool:
    """Say whether a directory holds a trained model's answers, its own or by benchmark."""
    if paths.exists(paths.join(place, "answers.jsonl")):
        return True
    return any(sections.is_benchmark(child) for _, child in _children(place))


def _place(artefacts: Artefacts, artefact: manifest.Artefact, name: str) -> None:
    """File an artefact under its kind; of several selections the one named `selection`, else the first, is the main."""
    if artefact.command == "select":
        if artefacts.selection is None or name == "selection":
            if artefacts.selection is not None:
                artefacts.others[paths.name(artefacts.selection.directory)] = artefacts.selection
            artefacts.selection = artefact
        else:
            artefacts.others[name] = artefact
    elif artefact.command == "emit":
        artefacts.emitted = artefacts.emitted or artefact
    else:
        setattr(artefacts, {"cluster": "clusters", "mix": "mixed"}.get(artefact.command, "embedded"), artefact)


def _source(artefact: manifest.Artefact, *commands: str) -> manifest.Artefact | None:
    try:
        return artefact.source(*commands)
    except LookupError:
        return None


def _in_shards(gallery: Gallery | None, artefacts: Artefacts) -> str:
    """Say how many shards the examples and captions come from, if not from all."""
    if gallery is None or artefacts.embedded is None or len(gallery.stems) == len(artefacts.embedded.stems):
        return ""
    return f" in {len(gallery.stems):,} of {len(artefacts.embedded.stems):,} shards"


def _gallery(artefacts: Artefacts, seed: int) -> tuple[Gallery | None, list[str]]:
    """Open the rows that may be shown, and say why there are none or no pictures."""
    if artefacts.embedded is None:
        return None, []
    samples, trouble = open_samples(artefacts.embedded)
    troubles = [trouble] if trouble else []
    gallery = Gallery(samples, artefacts.selection, artefacts.clusters, seed)
    gallery.read_columns()
    if len(gallery.stems) < len(artefacts.embedded.stems):
        troubles.append(
            f"Examples come from {len(gallery.stems)} of {len(artefacts.embedded.stems):,} shards; counts are of all."
        )
    return gallery, troubles


def _choose_cards(context: dict[str, Any], gallery: Gallery | None, artefacts: Artefacts) -> int:
    """Fill the page's galleries. Returns the bytes of the pictures."""
    names = ("twins", "kept", "dropped", "bad", "groups", "starved", "favoured", "placeholders")
    context |= {"duplicates": None, "mean_score": None, "tables": {}, **{name: [] for name in names}}
    context["by_concepts"] = False
    if gallery is None or not gallery.columns:
        return 0
    reason = gallery.columns["reason"]
    if artefacts.selection is not None:
        context["duplicates"] = duplicates.section(artefacts.selection, gallery)
        context["placeholders"], table = duplicates.dropped_placeholders(gallery)
        found = {"placeholders": table} if context["placeholders"] else {}
        found |= {"duplicates": context["duplicates"]["table"]} if context["duplicates"] else {}
        context["tables"] = {name: _csv(rows) for name, rows in found.items()}
    context["twins"] = gallery.twins(TWINS)
    context["kept"] = gallery.sample(reason < 0, KEPT, "kept")
    steps = context["funnel"]["steps"][:MAX_STEPS_SHOWN] if context["funnel"] else []
    context["dropped"] = [(step, cards) for step in steps if (cards := gallery.dropped(step["text"], DROPPED))]
    counts = sections.bad_counts(artefacts.embedded)
    context["bad"] = [(name, STATUSES[name], n, gallery.dropped(name, BAD)) for name, n in counts.items()]
    scores = gallery.columns["score"]
    context["mean_score"] = float(np.nanmean(scores)) if (~np.isnan(scores)).any() else None
    _choose_clusters(context, gallery, selected=artefacts.selection is not None)
    return gallery.fill()


def _choose_clusters(context: dict[str, Any], gallery: Gallery, *, selected: bool) -> None:
    """Show clusters by size, and those that were starved and favoured, each with its name and some of its rows."""
    sizes = context["sizes"] or {}
    kinds = {kind: sizes.get(kind, []) for kind in ("groups", "starved", "favoured")}
    asked = dict.fromkeys(group["cluster"] for groups in kinds.values() for group in groups)
    names, context["by_concepts"] = gallery.name_clusters(list(asked))
    reason, cluster = gallery.columns["reason"], gallery.columns["cluster"]
    for kind, groups in kinds.items():
        for group in groups:
            name, inside = f"cluster {group['cluster']}", cluster == group["cluster"]
            cards = gallery.sample(inside & (reason < 0), CLUSTER_KEPT if selected else CLUSTER_CARDS, name)
            cards += gallery.sample(inside & (reason >= 0), CLUSTER_CARDS - len(cards), name)
            if cards:
                facts = gallery.cluster_facts(group["cluster"]) if kind != "groups" else {}
                context[kind].append((group | facts | {"words": names.get(group["cluster"], "")}, cards))
    chosen = [group["cluster"] for group, _ in (*context["starved"], *context["favoured"])]
    if chosen:
        header = ("cluster", "key", "shard", "row", "kept", "dropped_by")
        context["tables"]["clusters"] = _csv([header, *gallery.cluster_keys(chosen, duplicates.LISTED)])


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    """Write a table as a link that downloads it. A ' goes before what a spreadsheet would take for a formula.

    But not before a key that begins with a sign, as one in 32 of base64's does: keys are looked up elsewhere.
    """
    text, signed = io.StringIO(), list[bool]()
    for row in rows:
        signed = signed or [name == "caption" for name in row]  # the first row names the columns
        cells = (
            f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA[signs]) else cell
            for cell, signs in zip(row, signed, strict=True)
        )
        csv.writer(text, lineterminator="\n").writerow(cells)
    return "data:text/csv;charset=utf-8;base64," + base64.b64encode(text.getvalue().encode("utf-8", "replace")).decode()


def _comparison(artefacts: Artefacts, directory: str) -> Iterator[dict[str, Any]]:
    """List the other selections of a pipeline beside the leading one, judged where a demo knows the truth."""
    judgement = paths.join(directory, JUDGEMENT)
    judged = manifest.load_json(judgement) if paths.exists(judgement) else {}
    every = (
        {paths.name(artefacts.selection.directory): artefacts.selection, **artefacts.others}
        if artefacts.selection and artefacts.others
        else {}
    )
    for name, artefact in every.items():
        steps = artefact.manifest.get("options", {}).get("steps", [])
        yield {
            "name": name,
            "kept": artefact.manifest["counts"].get("kept", 0),
            "rows": sum(artefact.rows.values()),
            "steps": steps,
            "judged": judged.get(str(artefact.manifest.get("options", {}).get("recipe") or "steps")),
        }


def render(context: Mapping[str, Any], name: str = "report") -> bytes:
    """Fill a template; every value is escaped but the charts, which escape their own texts."""
    import jinja2

    loader = jinja2.PackageLoader("curate.report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"n": lambda value: f"{value:,}", "pct": _percent, "two_digits": concepts.two_digits}
    files = ("report.js", "marks.js", "report.css") if name == "report" else ("marks.js", "report.css")
    *scripts, style = (loader.get_source(environment, file)[0] for file in files)
    script = "".join(scripts)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = environment.get_template(f"{name}.html.j2")
    page = template.render(**context, script=Markup(script), style=Markup(style), digest=digest, dumps=_script_json)
    return page.encode("utf-8", "replace")


def _percent(value: float) -> str:
    """Write a percentage with one decimal, or with one significant digit if that would show only zeros."""
    return f"{value:.1f}\u00a0%" if value >= 0.1 or not value else f"{value:.1g}\u00a0%"


def _script_json(value: Any) -> Markup:
    """Write JSON that cannot close the element that contains it."""
    text = json.dumps(value)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def write_page(out: str, page: bytes) -> None:
    """Write a page atomically, and never over a data file. Raises: UsageError."""
    whole_files.refuse_data(out)
    with paths.atomic_write(out) as file:
        file.write(page)
