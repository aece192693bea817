"""What only the demo's truth can tell: the best selection there could be, and scores by concept."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from curate.storage import manifest, paths, sidecar
from curate.storage.schema import FUNNEL, SELECTION_SCHEMA

ORACLE = "oracle"  # a recipe that reads the demo's truth: no rule, but the ceiling to hold rules against


def score_concepts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Score answers about the demo's concepts: captions, and exact answers to questions as the mean over their kinds.

    Each kind is a mean over concepts, alike or weighted by their frequency in the pool.
    """
    from curate.demo.words import NAMES
    from curate.demo.world import concept_weights

    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("concept"):
            right[row["task"]][row["concept"]].append(row["right"])
    frequency = dict(zip(NAMES, concept_weights().tolist(), strict=True))
    kinds = sorted(right, key=lambda task: task != "caption")
    measures: dict[str, list[float]] = defaultdict(list)
    for kind in kinds:
        means = {concept: sum(hits) / len(hits) for concept, hits in right[kind].items()}
        weights = np.array([frequency[concept] for concept in means])
        name = "caption" if kind == "caption" else "answer"
        measures[name].append(float(np.mean(list(means.values()))))
        measures[f"{name}_weighted"].append(float(np.average(list(means.values()), weights=weights)))
    return {name: sum(values) / len(values) for name, values in measures.items()}


def select_oracle(clustered: str, demo: str, out: str, options: Mapping[str, Any]) -> None:
    """Select with the demo's truth in hand: one right pair of each source, evenly over the concepts.

    options: `n`, rows or a share as a selection's recipe takes it, and `seed`.
    """
    from curate.demo.render import RIGHT
    from curate.select.steps.quotas import position_in_group, water_fill
    from curate.select.syntax import parse_count

    clusters = manifest.open_input(clustered, "cluster")
    request = {"steps": [ORACLE], "recipe": ORACLE, "seed": options.get("seed", 0), "n": options["n"]}
    output = manifest.open_output(out, "select", request, {"clusters": clusters})
    if output.complete:
        return
    embedded = clusters.embeddings()
    tables = [embedded.table(stem, ["key", "status"]) for stem in embedded.stems]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    good = np.array([status == "ok" for table in tables for status in table["status"].to_pylist()])
    rows = sidecar.table(paths.join(demo, "truth.arrow")).to_pylist()
    truth = {row["key"]: row for row in rows}
    rng = np.random.default_rng([request["seed"], 0])
    seen: set[str] = set()
    chosen = []
    for row in rng.permutation(np.flatnonzero(good)).tolist():
        planted = truth[keys[row]]
        if planted["fault"] in RIGHT and planted["source"] not in seen:
            seen.add(planted["source"])
            chosen.append(row)
    concept = np.unique([truth[keys[row]]["concept"] for row in chosen], return_inverse=True)[1]
    wanted = parse_count(options["n"], "select.n")
    budget = min(round(wanted * int(good.sum())) if isinstance(wanted, float) else int(wanted), len(chosen))
    quotas, _ = water_fill(np.bincount(concept), budget, rng)
    kept = np.zeros(len(keys), bool)
    kept[np.array(chosen)[position_in_group(concept, np.arange(len(chosen))) < quotas[concept]]] = True
    _write_selection(output, embedded, keys, kept)


def _write_selection(
    output: manifest.Output, embedded: manifest.Artefact, keys: Sequence[str], kept: np.ndarray
) -> None:
    """Write the sidecars and the manifest of a selection that no steps made."""
    first, shards = 0, {}
    for stem, size in embedded.rows.items():
        own = slice(first, first := first + size)
        shards[stem] = {"rows": size, "kept": int(kept[own].sum())}
        nothing = pa.nulls(size)
        columns = [pa.array(keys[own]), pa.array(kept[own]), sidecar.label_codes(np.where(kept[own], -1, 0), [ORACLE])]
        columns += [nothing.cast(field.type) for field in SELECTION_SCHEMA][3:]
        batch = pa.record_batch(columns, schema=SELECTION_SCHEMA)
        sidecar.write_table(output.path(f"{stem}.arrow"), SELECTION_SCHEMA, [batch], shards[stem])
    counts = {"kept": int(kept.sum()), "dropped": int((~kept).sum()), "bad": 0}
    manifest.save_json(output.path(FUNNEL), {"rows": len(keys), **counts, "statuses": {}, "steps": []})
    output.finish(shards=shards, counts=counts, funnel=[], versions=manifest.versions("numpy", "pyarrow"))
