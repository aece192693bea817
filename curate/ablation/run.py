"""Run an ablation: `curate run` of a pipeline with an `[ablation]` table. The arms are data.

    [ablation]
    seeds = [1, 2, 3]      compare = "recipe"      reference = "random"      lead = "caption"
    [ablation.axes.pool.dirty.demo]        dirt = "dirty"
    [ablation.axes.recipe.random.select]   recipe = "random"
    [ablation.axes.align.without]          align = false
    [[ablation.bars]]      claim, where, better, than, measure, by, alpha
    [ablation.shares]      sources, total, points, goal: a sweep over a mixture, an axis of its own (shares.py)

Each value of an axis is tables laid over the pipeline's own (`false` takes a table away); an arm is one value per axis,
all combinations. A seed goes into every stage that draws, but clustering, so that arms of one seed share pool, tests,
first weights and the order of samples as far as these are equal. Out: `ablation.json`, `trials.jsonl`, `manifest.json`
(curate/README.md), `report.html`; where the rest lies: trials.py. Trials that are done are not run again.
"""

import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pipelines
from curate import engine, options
from curate.ablation import over_records, shares, statistics
from curate.ablation.trials import LEVELS, MEASURES, Trial, Work
from curate.engine import Job
from curate.errors import UsageError, unknown
from curate.run import pipeline
from curate.run.dry_run import lines as stage_lines
from curate.run.pipeline import TRAINER, Pipeline
from curate.run.stages import Echo
from curate.storage import paths
from curate.storage.manifest import FORMAT, MANIFEST, digest, reconcile, save_json, versions

log = logging.getLogger("curate")
RESULT, LINES = "ablation.json", "trials.jsonl"
SEEDED = ("demo", "select", "mix", "model", "align", "finetune")


@dataclass(frozen=True)
class Bar:
    """A claim: `better` exceeds `than` by more than `by` in the mean of paired differences, one-sided p < alpha."""

    claim: str
    better: str
    than: str
    measure: str = ""
    where: dict[str, str] = field(default_factory=dict)
    by: float = 0.0
    alpha: float = 0.05


@dataclass(frozen=True)
class Cost:
    """What a trial's training costs, for the dry run: counted by hand, as the models are not there yet.

    parameters: of the language model. align_tokens, finetune_tokens: positions a sample, pictures included.
    align_samples, finetune_samples: in all steps together. tflops: that a device really does, TFLOP a second.
    """

    parameters: float
    tflops: float
    align_samples: float = 0
    align_tokens: float = 0
    finetune_samples: float = 0
    finetune_tokens: float = 0

    def hours(self) -> tuple[float, float]:
        """Return device hours of align and finetune: 4 FLOP a parameter and token where the model itself is frozen."""
        rate = self.tflops * 1e12 * 3600
        return tuple(
            4 * self.parameters * samples * tokens / rate
            for samples, tokens in (
                (self.align_samples, self.align_tokens),
                (self.finetune_samples, self.finetune_tokens),
            )
        )  # type: ignore[return-value]


@dataclass(frozen=True)
class Options:
    """The `[ablation]` table. lead: the measure that the terminal's table is about. take: values to take of an axis.

    reference: what the others are compared with, without it the first value.
    """

    seeds: list[int]
    compare: str
    reference: str = ""
    axes: dict[str, Any] = field(default_factory=dict)
    shares: dict[str, Any] | None = None
    take: dict[str, Any] = field(default_factory=dict)
    lead: str = "caption"
    bars: list[Any] = field(default_factory=list)
    cost: dict[str, Any] | None = None


@dataclass(frozen=True)
class Ablation:
    """A parsed ablation: its options, its arms, and every trial's own pipeline."""

    plan: Pipeline
    options: Options
    bars: Sequence[Bar]
    arms: Sequence[Mapping[str, str]]
    trials: Sequence[Trial]


def parse(plan: Pipeline) -> Ablation:
    """Check the table and write out every trial. Raises: UsageError."""
    chosen = options.build(Options, plan.tables["ablation"], "ablation")
    if chosen.shares:
        points = shares.values(options.build(shares.Shares, chosen.shares, "ablation.shares"), plan.tables.get("mix"))
        chosen = replace(chosen, axes={**chosen.axes, shares.AXIS: points})
    for axis, taken in chosen.take.items():
        known = chosen.axes.get(axis, {})
        for name in taken:
            if name not in known:
                raise unknown(f"value of {axis} in ablation.take", name, known)
    axes = {
        axis: {name: values[name] for name in chosen.take.get(axis, values)} for axis, values in chosen.axes.items()
    }
    chosen = replace(chosen, axes=axes)
    for axis, values in chosen.axes.items():
        if not isinstance(values, dict) or not all(isinstance(tables, dict) for tables in values.values()):
            raise UsageError(f"[ablation.axes.{axis}] holds no tables.", f"write [ablation.axes.{axis}.NAME.select]")
    if chosen.compare not in chosen.axes:
        raise unknown("axis of ablation.compare", chosen.compare, chosen.axes)
    if not chosen.seeds or len(set(chosen.seeds)) < len(chosen.seeds):
        raise UsageError(f"ablation.seeds = {chosen.seeds}: expected at least one, each once.")
    names = chosen.axes[chosen.compare]
    chosen = replace(chosen, reference=chosen.reference or next(iter(names), ""))
    if chosen.reference not in names:
        raise unknown(f"value of {chosen.compare} in ablation.reference", chosen.reference, names)
    bars = [options.build(Bar, bar, f"ablation.bars #{number}") for number, bar in enumerate(chosen.bars, 1)]
    bars = [replace(bar, measure=bar.measure or chosen.lead) for bar in bars]
    arms = [dict(zip(chosen.axes, names, strict=True)) for names in itertools.product(*chosen.axes.values())]
    for bar in bars:
        for side in (bar.better, bar.than):
            if {**bar.where, chosen.compare: side} not in arms:
                raise UsageError(f"the bar {bar.claim!r} names an arm that is not there: {side!r} where {bar.where}.")
    trials = [_trial(plan, chosen, arm, seed) for seed in chosen.seeds for arm in arms]
    return Ablation(plan, chosen, bars, arms, trials)


def _trial(plan: Pipeline, chosen: Options, arm: Mapping[str, str], seed: int) -> Trial:
    """Lay an arm's tables and a seed over the pipeline, and find where its stages lie."""
    tables = {name: table for name, table in plan.tables.items() if name not in ("about", "ablation", "report")}
    for axis, value in arm.items():
        tables = _lay(tables, chosen.axes[axis][value])
    tables = {name: _without(name, table) for name, table in tables.items() if table is not False}
    for name in SEEDED:
        if name in tables:
            tables[name] = {**tables[name], "seed": seed}
    for name in tables:
        if name not in pipeline.TABLES:
            raise unknown("table of an arm", name, pipeline.TABLES)
    upstream: list[Any] = [tables.get("pool"), tables.get("data")]
    keys = {}
    for level, stages in LEVELS.items():
        upstream += [tables.get(stage) for stage in stages] + ([tables.get("model")] if level != "pools" else [])
        keys[level] = digest(upstream)[:12]
    name = "-".join(re.sub(r"[^0-9A-Za-z.]+", "_", value).strip("_") for value in arm.values())
    out = paths.join(plan.out, "models", f"{name}-{seed}")
    homes = {"pools": paths.join(plan.out, "pools", keys["pools"])}
    homes["coresets"] = paths.join(plan.out, "coresets", keys["coresets"])
    places = {
        stage: paths.join(home, pipeline.PLACES[stage]) for level, home in homes.items() for stage in LEVELS[level]
    }
    request = digest([tables, seed])
    tables = pipelines.fill(tables, {"{out}/demo": places["demo"], "{out}/coreset": places["emit"], "{out}": out})
    own = Pipeline(plan.path, out, tables, [*plan.settings, *_settings(plan.tables, tables)], places)
    for stage in pipeline.CORESET:
        if stage in tables:
            pipeline.stage_options(own, stage)
    return Trial(dict(arm), seed, own, keys, request)


def _lay(tables: dict[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay an arm's tables over others; steps of its own take a recipe's place, with `{n}` for its budget."""
    merged = pipelines.overlay(tables, upper)
    select = merged.get("select")
    if isinstance(select, dict) and "steps" in upper.get("select", {}):
        merged["select"] = {key: value for key, value in select.items() if key != "recipe"}
    elif isinstance(select, dict) and "recipe" in upper.get("select", {}):
        merged["select"] = {key: value for key, value in select.items() if key != "steps"}
    return merged


def _without(name: str, table: Any) -> Any:
    """Leave out what a stage would do besides, and put the budget into steps that ask for it."""
    if not isinstance(table, dict):
        return table
    table = {key: value for key, value in table.items() if key not in pipeline.BESIDE.get(name, ()) or name == "import"}
    if name == "select" and "steps" in table:
        n = json.dumps(table.pop("n", ""))
        table["steps"] = [step.replace("{n}", n) for step in table["steps"]]
    return table


def _settings(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """Write what an arm changes in the trainer's tables as `--set` settings."""
    for name in TRAINER:
        for key, value in after.get(name, {}).items():
            if before.get(name, {}).get(key) != value:
                yield f"{name}.{key}={json.dumps(value)}"


def command(plan: Pipeline, job: Job, only: str, *, dry_run: bool, as_json: bool, echo: Echo) -> bool:
    """Carry out `curate run` of an ablation; say whether every trial ended and every bar is met."""
    if only:
        raise UsageError("an ablation runs every stage of its arms.", "leave out --only")
    if dry_run:
        for line in lines(plan):
            echo(line)
        return True
    from curate.report.options import ReportOptions
    from curate.report.report import report

    result = run(plan, job, (lambda _: None) if as_json else echo)
    page = plan.place("report")
    report(plan.out, page, ReportOptions(), job)
    echo(json.dumps(result, ensure_ascii=False) if as_json else f"\nThe page to look at is {page}")
    for failed in result["failed"][:5]:
        line = f"{' · '.join(failed['arm'].values())}, seed {failed['seed']}: {failed['error']}"
        log.warning("%s", line)
    return not result["failed"] and all(bar["met"] for bar in result["bars"])


def run(plan: Pipeline, job: Job, echo: Echo = print) -> dict[str, Any]:
    """Carry out every trial that is not done yet, sum up, and return the content of `ablation.json`.

    Trials of one level run beside each other, on the job's workers and engine; a trial that fails leaves the others
    their way, is listed, and is run again next time.
    """
    ablation = parse(plan)
    trials = ablation.trials
    failed: dict[int, str] = {}
    echo("\n".join(_about(ablation)))
    for level in LEVELS:
        chosen: dict[str, int] = {}
        for number, trial in enumerate(trials):
            key = trial.plan.out if level == "models" else trial.keys[level]
            if number not in failed and trial.finished() is None and not trial.stands(level):
                chosen.setdefault(key, number)
        work = Work(trials, level, job.overwrite)
        outcome = engine.run_stage(
            level, work, list(chosen.values()), job, unit="trials" if level == "models" else level, gpu=True
        )
        broken = {key: outcome.failed[number] for key, number in chosen.items() if number in outcome.failed}
        for number, trial in enumerate(trials):
            key = trial.plan.out if level == "models" else trial.keys[level]
            if key in broken and number not in failed:
                failed[number] = broken[key]
    result = gather(ablation, failed)
    _write(ablation, result)
    for line in statistics.table(result, ablation.options.lead, list(result["measures"])):
        echo(line)
    for line in shares.lines(result) if ablation.options.shares else ():
        echo(line)
    return result


def gather(ablation: Ablation, failed: Mapping[int, str]) -> dict[str, Any]:
    """Read what the trials recorded and sum it up, in the form that curate/README.md describes."""
    chosen, plan = ablation.options, ablation.plan
    done, missing = [], []
    answers = {}
    for number, trial in enumerate(ablation.trials):
        recorded = trial.finished()
        who = {"arm": dict(trial.arm), "seed": trial.seed}
        if recorded is None:
            missing.append({**who, "error": failed.get(number, "not run")})
        else:
            done.append({**who, "measures": recorded["measures"]})
            answers[tuple(trial.arm.values()), trial.seed] = over_records.values(trial.answers())
    reconcile("ablation", len(ablation.trials), {"done": len(done), "failed": len(missing)})
    there = {name for trial in done for name in trial["measures"]}
    names = [name for name in MEASURES if name in there] + sorted(there - set(MEASURES))
    described = {name: dict(zip(("about", "better", "unit"), _meaning(name), strict=True)) for name in names}
    bars = [{**vars(bar)} for bar in ablation.bars]
    summary = statistics.summarise(done, ablation.arms, chosen.compare, chosen.reference, names)
    over_records.add(summary, answers, chosen.compare)
    return {
        "format": 1,
        "name": plan.path.stem,
        "about": str(plan.tables.get("about", "")),
        "axes": {axis: list(values) for axis, values in chosen.axes.items()},
        "compare": chosen.compare,
        "reference": chosen.reference,
        "seeds": chosen.seeds,
        "measures": described,
        "trials": done,
        "failed": missing,
        "summary": summary,
        "bars": statistics.judge(done, bars, chosen.compare),
        **_mixtures(chosen, done),
    }


def _mixtures(chosen: Options, done: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Fit the response over the shares, where the ablation has them."""
    if not chosen.shares:
        return {}
    table = options.build(shares.Shares, chosen.shares, "ablation.shares")
    goal = {name: weight for name, weight in table.goal.items() if weight}
    goal = goal or {chosen.lead: -1.0 if _meaning(chosen.lead)[1] == "lower" else 1.0}
    return {"mixtures": shares.responses(done, table, chosen.axes[shares.AXIS], goal)}


def _meaning(name: str) -> tuple[str, str, str]:
    words = name.replace("_", " ")
    other = (f"{words}, as the benchmark or its records score it", "higher", "number")
    if name.endswith("_perplexity"):
        other = (f"{words} of the true answers", "lower", "number")
    return MEASURES.get(name, other)


def _write(ablation: Ablation, result: Mapping[str, Any]) -> None:
    """Write the results and, last, the manifest."""
    out = ablation.plan.out
    paths.make_dir(out)
    save_json(paths.join(out, RESULT), result)
    with paths.atomic_write(paths.join(out, LINES)) as file:
        for trial in result["trials"]:
            file.write(json.dumps(trial).encode() + b"\n")
    manifest = {
        "format": FORMAT,
        "command": "ablation",
        "options": {name: value for name, value in vars(ablation.options).items() if value},
        "inputs": {},
        "counts": {"done": len(result["trials"]), "failed": len(result["failed"])},
        "bars": {bar["claim"]: bar["met"] for bar in result["bars"]},
        "versions": versions("numpy", "scipy", "torch", "transformers"),
    }
    save_json(paths.join(out, MANIFEST), manifest)


def _about(ablation: Ablation) -> Iterator[str]:
    """Yield what there is to do: arms, seeds, and how many directories they share."""
    axes = " × ".join(f"{len(values)} {axis}" for axis, values in ablation.options.axes.items())
    seeds, trials = ablation.options.seeds, ablation.trials
    yield f"{len(ablation.arms)} arms ({axes}) × {len(seeds)} seeds = {len(trials)} trials"
    pools, coresets = (len({trial.keys[level] for trial in trials}) for level in ("pools", "coresets"))
    done = sum(trial.finished() is not None for trial in trials)
    shared = f"they share {pools} pool{'s' * (pools > 1)} and {coresets} coreset{'s' * (coresets > 1)}"
    yield shared + (f"; {done} are done" if done else "")


def lines(plan: Pipeline) -> Iterator[str]:
    """Yield the plan: the arms, the commands of the first trial with what they would read, write and take, the cost."""
    ablation = parse(plan)
    yield from _about(ablation)
    first = ablation.trials[0]
    yield f"the first one, {' · '.join(first.arm.values())}, seed {first.seed}; the others differ in what the arms say:"
    for line in stage_lines(first.plan, None):
        yield f"  {line}"
    for trial in ablation.trials[: len(ablation.arms)]:
        yield f"  {' · '.join(trial.arm.values())}: {' '.join(_changes(first.plan, trial.plan)) or 'as above'}"
    if ablation.options.cost:
        yield from _cost(ablation, options.build(Cost, ablation.options.cost, "ablation.cost"))


def _changes(first: Pipeline, other: Pipeline) -> Iterator[str]:
    """Name what another arm has else than the first, but for where its own directories lie."""
    own = paths.parent(paths.parent(other.out))
    for name in dict.fromkeys([*first.tables, *other.tables]):
        ours, theirs = first.tables.get(name), other.tables.get(name)
        if theirs is None:
            yield f"no {name}"
        elif isinstance(theirs, dict) and name != "data":
            yield from _settled(name, ours if isinstance(ours, dict) else {}, theirs, own)


def _settled(where: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], own: str) -> Iterator[str]:
    for key, value in theirs.items():
        if isinstance(value, dict):
            yield from _settled(f"{where}.{key}", ours.get(key, {}), value, own)
        elif ours.get(key) != value and not str(value).startswith(own):
            yield f"{where}.{key}={json.dumps(value, ensure_ascii=False)}"
    yield from (f"{where}.{key} as it is by default" for key in ours if key not in theirs)


def _cost(ablation: Ablation, cost: Cost) -> Iterator[str]:
    """Yield the device hours of all trials together; aligned models that trials share are counted once."""
    align, finetune = cost.hours()
    aligned = {trial.keys["coresets"] for trial in ablation.trials if "align" in trial.plan.tables}
    tuned = [trial for trial in ablation.trials if "finetune" in trial.plan.tables]
    total = align * len(aligned) + finetune * len(tuned)
    parts = f"{len(aligned)} × align {align:,.1f} h + {len(tuned)} × finetune {finetune:,.1f} h"
    yield f"training: {parts} = {total:,.0f} device hours, at {cost.tflops:g} TFLOP/s, 4 FLOP a parameter and token"
