"""Turn the `[ablation]` table of a pipeline into arms, and each arm with each seed into a trial's own pipeline.

    [ablation]
    seeds = [1, 2, 3]      compare = "recipe"      reference = "random"      lead = "caption"
    [ablation.axes.pool.dirty.demo]        dirt = "dirty"
    [ablation.axes.recipe.random.select]   recipe = "random"
    [ablation.axes.align.without]          align = false
    [[ablation.bars]]      claim, where, better, than, measure, by, alpha
    [ablation.shares]      sources, total, points, goal: a sweep over a mixture, an axis of its own (shares.py)

Each value of an axis is a set of tables laid over the pipeline's own (`false` removes a table); an arm is one value per
axis, in all combinations. A seed goes into every stage that draws at random, except clustering, so that arms of one
seed share pool, tests, first weights and the order of samples as far as these are equal.
"""

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pipelines
from curate import options
from curate.ablation import shares
from curate.ablation.trials import KEEP, LEVELS, Trial
from curate.errors import UsageError, unknown
from curate.run import pipeline
from curate.run.pipeline import TRAINER, Pipeline
from curate.storage import paths
from curate.storage.manifest import digest

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
    """What a trial's training costs, for the dry run: counted by hand, as the models do not exist yet.

    parameters: of the language model. align_tokens, finetune_tokens: positions per sample, pictures included.
    align_samples, finetune_samples: in all steps together. tflops: what a device really reaches, TFLOP/s.
    """

    parameters: float
    tflops: float
    align_samples: float = 0
    align_tokens: float = 0
    finetune_samples: float = 0
    finetune_tokens: float = 0

    def hours(self) -> tuple[float, float]:
        """Return device hours of align and finetune: 4 FLOP per parameter and token, with the model frozen."""
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
    """The `[ablation]` table. lead: the measure that the terminal's table shows in full.

    take: values of an axis to run. reference: the value that the others are compared with; the first one if left out.
    keep: see `trials.KEEP`.
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
    keep: str = "models"


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
            raise UsageError(
                f"[ablation.axes.{axis}] does not hold tables.", f"write [ablation.axes.{axis}.NAME.select]"
            )
    if chosen.keep not in KEEP:
        raise unknown("ablation.keep", chosen.keep, KEEP)
    if chosen.compare not in chosen.axes:
        raise unknown("axis of ablation.compare", chosen.compare, chosen.axes)
    if not chosen.seeds or len(set(chosen.seeds)) < len(chosen.seeds):
        raise UsageError(f"ablation.seeds = {chosen.seeds}: expected at least one seed, each once.")
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
                raise UsageError(f"the bar {bar.claim!r} names an arm that does not exist: {side!r} where {bar.where}.")
    trials = [_trial(plan, chosen, arm, seed) for seed in chosen.seeds for arm in arms]
    _refuse_shared_places(trials)
    return Ablation(plan, chosen, bars, arms, trials)


def _refuse_shared_places(trials: Sequence[Trial]) -> None:
    """Refuse arms whose names give the same folder: one would never count as done and run again each time."""
    placed: dict[str, Trial] = {}
    for trial in trials:
        other = placed.setdefault(trial.plan.out, trial)
        if other is not trial:
            both = " and ".join(repr(" · ".join(each.arm.values())) for each in (other, trial))
            raise UsageError(f"the arms {both} would both lie in {trial.plan.out}.", "rename one of them")


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
    """Lay an arm's tables over others; steps of its own replace a recipe, with `{n}` for its budget."""
    merged = pipelines.overlay(tables, upper)
    select = merged.get("select")
    if isinstance(select, dict) and "steps" in upper.get("select", {}):
        merged["select"] = {key: value for key, value in select.items() if key != "recipe"}
    elif isinstance(select, dict) and "recipe" in upper.get("select", {}):
        merged["select"] = {key: value for key, value in select.items() if key != "steps"}
    return merged


def _without(name: str, table: Any) -> Any:
    """Leave out a stage's side outputs, and put the budget into steps that contain `{n}`."""
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
