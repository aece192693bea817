"""Carry out trials: one arm of an ablation with one seed, from a pool to the numbers that it is compared by.

    OUT/pools/KEY/{demo,embeddings,clusters}   OUT/coresets/KEY/{selection,coreset,align}
    OUT/models/ARM-SEED/{mix,finetune,model,eval} and trial.json

KEY digests everything that a directory depends on, so that trials that agree up to a stage share its directory. Every
directory resumes as its stage does; a trial is done when its `trial.json` has its request. The trainer is another
program: a worker keeps one `python -m train work` and sends it the command lines that `curate run` would start, since
starting it anew costs more than a tiny model's evaluation.
"""

import atexit
import contextlib
import functools
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from curate import arrays, paths, pipeline, store
from curate.engine import Job
from curate.errors import CurateError, ShardError
from curate.pipeline import Pipeline

LEVELS = {
    "pools": ("demo", "import", "embed", "cluster"),
    "coresets": ("select", "emit", "align"),
    "models": ("mix", "finetune", "export", "eval"),
}
ORACLE = "oracle"  # a recipe that reads the demo's truth: no rule, but the ceiling to hold rules against
TRIAL = "trial.json"
MEASURES = {
    "caption": ("captions that name the right concept, mean over concepts", "higher", "share"),
    "caption_weighted": ("the same, concepts weighted by their frequency", "higher", "share"),
    "answer": ("exact answers to questions, mean over concepts and kinds of question", "higher", "share"),
    "answer_weighted": ("the same, concepts weighted by their frequency", "higher", "share"),
    "accuracy": ("exact answers to all held-out records", "higher", "share"),
    "text_accuracy": ("exact answers to held-out tasks without a picture", "higher", "share"),
    "text_perplexity": ("perplexity of the true answers to tasks without a picture", "lower", "number"),
    "right_share": ("share of the coreset whose caption is true of its picture", "higher", "share"),
    "concepts": ("concepts with at least one right pair in the coreset", "higher", "count"),
    "kept": ("rows in the coreset", "", "count"),
}


@dataclass(frozen=True)
class Trial:
    """An arm with a seed. keys: level -> the directory under that level, shared by all trials that have the same."""

    arm: Mapping[str, str]
    seed: int
    plan: Pipeline
    keys: Mapping[str, str]
    request: str

    def stages(self, level: str) -> list[str]:
        """List the stages of a level that this trial has, in order."""
        return [stage for stage in self.plan.stages() if stage in LEVELS[level]]

    def stands(self, level: str) -> bool:
        """Say whether a level's shared directory is complete: its name already says for which request."""
        homes = (paths.join(self.plan.place(stage), store.MANIFEST) for stage in self.stages(level))
        return level != "models" and all(map(paths.exists, homes))

    def finished(self) -> dict[str, Any] | None:
        """Return what `trial.json` records, if it is of this very request."""
        location = paths.join(self.plan.out, TRIAL)
        recorded = store.load_json(location) if paths.exists(location) else {}
        return recorded if recorded.get("request") == self.request else None


@dataclass
class Work:
    """The work of one process at one level: an item is the number of a trial."""

    trials: Sequence[Trial]
    level: str
    overwrite: bool

    def setup(self) -> None:
        """Have nothing to prepare: the trainer starts when it is first needed."""

    def __call__(self, item: int) -> dict[str, Any]:
        """Carry out a trial's stages of this level; at the last one, measure it and write `trial.json`."""
        trial = self.trials[item]
        told: dict[str, Any] = {}
        for stage in trial.stages(self.level):
            if stage in pipeline.TRAINER:
                told[stage] = self._train(trial.plan, stage)
            elif stage == "select" and trial.plan.tables["select"].get("recipe") == ORACLE:
                select_oracle(trial.plan)
            else:
                job = Job(workers=1, quiet=True, overwrite=self.overwrite)
                pipeline.run(trial.plan, job, stage, echo=lambda _: None)
        if self.level == "pools":
            return {"rows": sum(store.open_input(trial.plan.place("embed"), "embed", "import").rows.values())}
        if self.level == "coresets":
            return {"rows": store.open_input(trial.plan.place("select"), "select").manifest["counts"]["kept"]}
        found = {"request": trial.request, "measures": measure(trial.plan, told.get("eval", {}))}
        paths.make_dir(trial.plan.out)
        store.save_json(paths.join(trial.plan.out, TRIAL), {"arm": dict(trial.arm), "seed": trial.seed, **found})
        return found

    def _train(self, plan: Pipeline, stage: str) -> dict[str, Any]:
        words = [*pipeline.trainer_command(plan, stage)[3:], "--json"]
        answer = trainer().ask(words)
        if answer["exit"] == 2 and self.overwrite:
            answer = trainer().ask([*words, "--overwrite"])
        if answer["exit"]:
            raise ShardError(f"{stage}: {answer['error']}")
        return dict(json.loads(answer["said"].strip().splitlines()[-1]))


class Trainer:
    """A `python -m train work` process: a command line in, its exit code and output out."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "train", "work"]
        self.told = tempfile.TemporaryFile()  # a pipe that nobody reads would stop it
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.told)

    def ask(self, words: Sequence[str]) -> dict[str, Any]:
        """Have a command carried out. Raises: CurateError when the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(list(words)).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self.process.wait()
            self.told.seek(0)
            last = self.told.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            trainer.cache_clear()
            raise CurateError(f"the trainer ended with exit code {code} at {' '.join(words[:2])}: {last[0]}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.told.close()


@functools.cache
def trainer() -> Trainer:
    """Return this process's trainer, started when first asked for."""
    made = Trainer()
    atexit.register(made.close)
    return made


def measure(plan: Pipeline, evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Gather the measures that a trial has: of its selection, and of its model's answers where it has a model."""
    selection = store.open_input(plan.place("select"), "select")
    found: dict[str, float] = {"kept": int(selection.manifest["counts"]["kept"])}
    if "demo" in plan.tables:
        judged = pipeline.judge_selection(selection, plan.place("demo"))
        found |= {"right_share": judged["right_share"], "concepts": judged["concepts"]["after"]}
    for task, result in evaluated.get("tasks", {}).items():
        if "scores" in result:  # a benchmark of the papers
            found |= {f"{task}_{name}": float(value) for name, value in result["scores"].items()}
    text = evaluated.get("tasks", {}).get("text", {})
    found |= {f"text_{name}": text[name] for name in ("accuracy", "perplexity") if name in text}
    if "answers" in evaluated:
        with paths.open_read(evaluated["answers"]) as file:
            rows = [json.loads(line) for line in file.read().splitlines()]
        found |= score_concepts(rows) if "demo" in plan.tables else {"accuracy": evaluated["accuracy"]}
    return found


def score_concepts(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Score answers about the demo's concepts: captions, and exact answers to questions as the mean over their kinds.

    Each kind is a mean over concepts, alike or weighted by their frequency in the pool.
    """
    from curate.demo_words import NAMES
    from curate.demo_world import concept_weights

    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row.get("concept"):
            right[row["task"]][row["concept"]].append(row["right"])
    frequency = dict(zip(NAMES, concept_weights().tolist(), strict=True))
    kinds = sorted(right, key=lambda task: task != "caption")
    found: dict[str, list[float]] = defaultdict(list)
    for kind in kinds:
        means = {concept: sum(hits) / len(hits) for concept, hits in right[kind].items()}
        weights = np.array([frequency[concept] for concept in means])
        name = "caption" if kind == "caption" else "answer"
        found[name].append(float(np.mean(list(means.values()))))
        found[f"{name}_weighted"].append(float(np.average(list(means.values()), weights=weights)))
    return {name: sum(values) / len(values) for name, values in found.items()}


def select_oracle(plan: Pipeline) -> None:
    """Select with the demo's truth in hand: one right pair of each source, evenly over the concepts."""
    from curate.calls import parse_count
    from curate.demo import RIGHT
    from curate.quotas import position_in_group, water_fill

    clusters, options = store.open_input(plan.place("cluster"), "cluster"), plan.tables["select"]
    request = {"steps": [ORACLE], "recipe": ORACLE, "seed": options.get("seed", 0), "n": options["n"]}
    output = store.open_output(plan.place("select"), "select", request, {"clusters": clusters})
    if output.complete:
        return
    embedded = clusters.source("embed", "import")
    tables = [embedded.table(stem, ["key", "status"]) for stem in embedded.stems]
    keys = [key for table in tables for key in table["key"].to_pylist()]
    good = np.array([status == "ok" for table in tables for status in table["status"].to_pylist()])
    rows = store.table(paths.join(plan.place("demo"), "truth.arrow")).to_pylist()
    truth = {row["key"]: row for row in rows}
    rng = np.random.default_rng([request["seed"], 0])
    seen: set[str] = set()
    chosen = []
    for row in rng.permutation(np.flatnonzero(good)).tolist():
        told = truth[keys[row]]
        if told["fault"] in RIGHT and told["source"] not in seen:
            seen.add(told["source"])
            chosen.append(row)
    concept = np.unique([truth[keys[row]]["concept"] for row in chosen], return_inverse=True)[1]
    wanted = parse_count(options["n"], "select.n")
    budget = min(round(wanted * int(good.sum())) if isinstance(wanted, float) else int(wanted), len(chosen))
    quotas, _ = water_fill(np.bincount(concept), budget, rng)
    kept = np.zeros(len(keys), bool)
    kept[np.array(chosen)[position_in_group(concept, np.arange(len(chosen))) < quotas[concept]]] = True
    _write_selection(output, embedded, keys, kept)


def _write_selection(output: store.Output, embedded: store.Artefact, keys: Sequence[str], kept: np.ndarray) -> None:
    """Write the sidecars and the manifest of a selection that no steps made."""
    first, shards = 0, {}
    for stem, size in embedded.rows.items():
        own = slice(first, first := first + size)
        shards[stem] = {"rows": size, "kept": int(kept[own].sum())}
        nothing = pa.nulls(size)
        columns = [pa.array(keys[own]), pa.array(kept[own]), arrays.label_codes(np.where(kept[own], -1, 0), [ORACLE])]
        columns += [nothing.cast(field.type) for field in store.SELECTION_SCHEMA][3:]
        batch = pa.record_batch(columns, schema=store.SELECTION_SCHEMA)
        store.write_table(output.path(f"{stem}.arrow"), store.SELECTION_SCHEMA, [batch], shards[stem])
    counts = {"kept": int(kept.sum()), "dropped": int((~kept).sum()), "bad": 0}
    store.save_json(output.path("funnel.json"), {"rows": len(keys), **counts, "statuses": {}, "steps": []})
    output.finish(shards=shards, counts=counts, funnel=[], versions=store.versions("numpy", "pyarrow"))
