"""Run an ablation: `curate run` of a pipeline with an `[ablation]` table (arms.py describes it).

Out: `ablation.json`, `trials.jsonl`, `manifest.json` (curate/README.md), `report.html`; the rest: see trials.py.
Trials that are done are not run again.
"""

import json
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from curate import engine, options
from curate.ablation import over_records, shares, statistics
from curate.ablation.arms import Ablation, Cost, Options, parse
from curate.ablation.trials import KEEP, LEVELS, MEASURES, Work, tidy
from curate.engine import Job
from curate.errors import UsageError
from curate.report.ablation_tables import FILE as RESULT
from curate.run.dry_run import lines as stage_lines
from curate.run.pipeline import Pipeline
from curate.run.stages import Echo
from curate.storage import paths
from curate.storage.manifest import FORMAT, MANIFEST, reconcile, save_json, versions

log = logging.getLogger("curate")
LINES = "trials.jsonl"


def command(plan: Pipeline, job: Job, only: str, *, dry_run: bool, as_json: bool, echo: Echo) -> bool:
    """Carry out `curate run` of an ablation; return whether every trial ended and every bar was met."""
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

    Trials of one level run in parallel, on the job's workers and engine; a trial that fails does not stop the
    others, is listed, and is run again next time.
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
        work = Work(trials, level, job.overwrite, ablation.options.keep)
        outcome = engine.run_stage(
            level, work, list(chosen.values()), job, unit="trials" if level == "models" else level, gpu=True
        )
        broken = {key: outcome.failed[number] for key, number in chosen.items() if number in outcome.failed}
        for number, trial in enumerate(trials):
            key = trial.plan.out if level == "models" else trial.keys[level]
            if key in broken and number not in failed:
                failed[number] = broken[key]
    for trial in trials:
        if trial.finished() is not None:
            for level in ("coresets", "models"):
                tidy(trial, level, ablation.options.keep)
    result = gather(ablation, failed)
    _write(ablation, result)
    for line in statistics.table(result, ablation.options.lead, list(result["measures"])):
        echo(line)
    if ablation.options.shares:
        for line in shares.lines(result, options.build(shares.Shares, ablation.options.shares, "ablation.shares")):
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
    own = {name for told in answers.values() for name in told}
    described = {name: dict(zip(("about", "better", "unit"), _meaning(name, own), strict=True)) for name in names}
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


def _meaning(name: str, own: Collection[str] = ()) -> tuple[str, str, str]:
    """Say what a measure is, which direction is better, and its unit.  own: the measures of data.eval's records."""
    words = name.replace("_", " ")
    other = (f"{words}, as the benchmark scores it: out of 100, MME in points", "higher", "number")
    if name in own and name.endswith("_accuracy"):
        other = (f"exact answers to held-out records of the task {name.removesuffix('_accuracy')}", "higher", "share")
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
    if any("align" in trial.plan.tables or "finetune" in trial.plan.tables for trial in trials):
        yield f"a trial leaves {KEEP[ablation.options.keep]} (ablation.keep)"


def lines(plan: Pipeline) -> Iterator[str]:
    """Yield the plan: the arms, the commands of the first trial with what they would read, write and take, the cost."""
    ablation = parse(plan)
    yield from _about(ablation)
    first = ablation.trials[0]
    yield f"the first trial, {' · '.join(first.arm.values())}, seed {first.seed}; what each arm changes is below it:"
    refused = None
    try:
        for line in stage_lines(first.plan, None):
            yield f"  {line}"
    except UsageError as error:
        refused = error  # the arms and the cost of their training can be told without a pool
    for trial in ablation.trials[: len(ablation.arms)]:
        yield f"  {' · '.join(trial.arm.values())}: {' '.join(_changes(first.plan, trial.plan)) or 'as above'}"
    if ablation.options.cost:
        yield from _cost(ablation, options.build(Cost, ablation.options.cost, "ablation.cost"))
    if refused:
        raise refused


def _changes(first: Pipeline, other: Pipeline) -> Iterator[str]:
    """List the settings in which another arm differs from the first, except the places of its own directories."""
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
    yield from (f"{where}.{key} at its default" for key in ours if key not in theirs)


def _cost(ablation: Ablation, cost: Cost) -> Iterator[str]:
    """Yield the device hours of all trials together; aligned models that trials share are counted once."""
    align, finetune = cost.hours()
    aligned = {trial.keys["coresets"] for trial in ablation.trials if "align" in trial.plan.tables}
    tuned = [trial for trial in ablation.trials if "finetune" in trial.plan.tables]
    total = align * len(aligned) + finetune * len(tuned)
    parts = f"{len(aligned)} × align {align:,.1f} h + {len(tuned)} × finetune {finetune:,.1f} h"
    yield f"training: {parts} = {total:,.0f} device hours, at {cost.tflops:g} TFLOP/s, 4 FLOP per parameter and token"
