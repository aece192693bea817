"""Run a pipeline: every stage in order, each into its own directory under OUT.

    OUT/demo/ embeddings/ clusters/ selection/ selection-NAME/ coreset/ report.html
    and mix/ align/ finetune/ model/ eval/

A stage that is already finished for the same request is not run again; one that was killed resumes where it stopped.
The trainer's stages are run by `python -m train`, in a process of its own.
"""

import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from curate.engine import Job
from curate.errors import ContractError, CurateError, UsageError
from curate.run.pipeline import (
    TRAINER,
    Pipeline,
    check_trainer,
    emit_options,
    select_options,
    shown_command,
    stage_options,
    trainer_command,
)
from curate.storage import paths

if TYPE_CHECKING:
    from curate.storage.manifest import Artefact

Echo = Callable[[str], None]
Result = TypeVar("Result")


def run(pipeline: Pipeline, job: Job, only: str | None = None, echo: Echo = print) -> dict[str, Any]:
    """Run the stages; returns the manifest of each.

    Raises: what the stages raise; CurateError with exit code 1 when a trainer stage fails.
    """
    from curate.report.show import headline

    made: dict[str, Any] = {}
    check_trainer(pipeline, only)
    for stage in pipeline.stages(only):
        if stage == "report" and "demo" in pipeline.tables:
            _judge_demo(pipeline, echo)
        echo(f"\n▸ {shown_command(pipeline, stage)}")
        if stage in TRAINER:
            _train(pipeline, stage, job)
            continue
        for label, manifest in _hinting(stage, _curation(pipeline, stage, job)):
            made[label] = manifest
            echo(headline(stage, manifest))
            if stage == "select":
                _tell_funnel(pipeline.place("select") + label.removeprefix("selection"), echo)
            if stage == "report" and "emit" in pipeline.tables:
                echo(f"\nThe coreset is in {pipeline.place('emit')}, the page to look at is {pipeline.place('report')}")
    if "report" in pipeline.tables and any(stage in TRAINER for stage in pipeline.stages(only)):
        made.update(_curation(pipeline, "report", job))  # once more, now with the mix and the loss curves
        echo(f"\nThe page to look at is {pipeline.place('report')}")
    return made


def _hinting(stage: str, steps: Iterator[Result]) -> Iterator[Result]:
    """Run a stage; if it advises an option of its verb, advise the corresponding setting of the pipeline."""
    try:
        yield from steps
    except UsageError as error:
        if advised := re.fullmatch(r"--([a-z-]+) (\S+)", error.hint or ""):
            raise UsageError(error.message, f"--set {stage}.{advised[1].replace('-', '_')}={advised[2]}") from None
        raise


def _train(pipeline: Pipeline, stage: str, job: Job) -> None:
    """Run a trainer stage in a process of its own; with --overwrite, anew if its request has changed."""
    words = trainer_command(pipeline, stage)
    ended = _carry_out(words)
    if ended == UsageError.exit_code and job.overwrite:
        ended = _carry_out([*words, "--overwrite"])
    if ended:
        hint = "fix what it reports above and run again; it resumes (with --overwrite it trains anew on changed data)"
        raise CurateError(f"{stage} {how_it_ended(ended)}", hint)


def _carry_out(words: Sequence[str]) -> int:
    """Run a command of the trainer and return its exit code; if this process is stopped, let it save and end first.

    Through `TRAIN_PARENT` the trainer notices if this process is killed, and ends, too.
    """
    with subprocess.Popen(words, env={**os.environ, "TRAIN_PARENT": str(os.getpid())}) as trainer:
        try:
            return trainer.wait()
        except BaseException:  # Ctrl-C in a terminal reaches the trainer, too, but a SIGTERM to this process does not
            trainer.terminate()
            trainer.wait()
            raise


def how_it_ended(code: int) -> str:
    """Say how a process ended, by its exit code; one that is killed cannot say why itself."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed ({name}; out of memory?)" if name == "SIGKILL" else f"was ended by {name}"


def _tell_funnel(selection: str, echo: Echo) -> None:
    """Print a selection's funnel."""
    from curate.report.show import selection_lines

    echo(f"  {selection}")
    for line in selection_lines(selection):
        echo(line)


def _judge_demo(pipeline: Pipeline, echo: Echo) -> None:
    """Compare every selection with what was planted, print it and keep it in judgement.json."""
    from curate.demo.render import format_judgement
    from curate.storage.manifest import MANIFEST, open_input, save_json

    judgements = {}
    for name in paths.listdir(pipeline.out):
        if not name.startswith("selection") or not paths.exists(paths.join(pipeline.out, name, MANIFEST)):
            continue
        selection = open_input(paths.join(pipeline.out, name), "select")
        label = str(selection.manifest["options"].get("recipe") or "steps")
        judgements[label] = judge_selection(selection, pipeline.place("demo"))
        whole = format_judgement(judgements[label])
        text = whole if name == "selection" else "\n".join(whole.splitlines()[-2:])
        echo(f"\nWhat the recipe `{label}` made of the planted faults:\n{text}")
    save_json(paths.join(pipeline.out, "judgement.json"), judgements)


def judge_selection(selection: "Artefact", demo: str) -> dict[str, Any]:
    """Compare a selection with the truth of the demo that it was made from; see `curate.demo.render.judge`."""
    from curate.demo.render import judge
    from curate.storage import sidecar

    rows = [selection.table(stem, ["key", "kept", "dropped_by"]).to_pydict() for stem in selection.stems]
    keys, kept, dropped_by = ([v for part in rows for v in part[name]] for name in ("key", "kept", "dropped_by"))
    return judge(keys, kept, dropped_by, sidecar.table(paths.join(demo, "truth.arrow")))


def _curation(pipeline: Pipeline, stage: str, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run one curation stage, and its companions; yields (label, manifest)."""
    place = pipeline.place
    if stage == "demo":
        from curate.demo.render import render_demo

        yield stage, _fresh(job, partial(render_demo, place("demo"), stage_options(pipeline, "demo")))
    elif stage == "import":
        from curate.ingest.published import import_layout

        source, chosen = pipeline.tables["import"]["source"], stage_options(pipeline, stage)
        yield stage, _fresh(job, partial(import_layout, source, place(stage), chosen))
    elif stage == "embed":
        from curate.embed.embed import embed

        chosen = stage_options(pipeline, stage)
        yield stage, _fresh(job, partial(embed, pipeline.pool, place(stage), chosen))
    elif stage == "cluster":
        from curate.cluster.cluster import cluster

        chosen = stage_options(pipeline, stage)
        yield stage, _fresh(job, partial(cluster, place("embed"), place(stage), chosen))
    elif stage == "select":
        yield from _selections(pipeline, job)
    elif stage == "emit":
        yield from _emissions(pipeline, job)
    elif stage == "report":
        from curate.report.report import report

        yield stage, report(pipeline.out, place(stage), stage_options(pipeline, stage), job)
    else:
        from curate.mix.mix import mix

        yield stage, _fresh(job, partial(mix, pipeline.tables["mix"], place(stage)))


def _selections(pipeline: Pipeline, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Select by the pipeline's recipe, and by each one that it names for comparison."""
    from curate.select.select import select

    source = pipeline.place("cluster" if "cluster" in pipeline.tables else "embed")
    for suffix, chosen in select_options(pipeline):
        yield f"selection{suffix}", _fresh(job, partial(select, source, pipeline.place("select") + suffix, chosen))


def _emissions(pipeline: Pipeline, job: Job) -> Iterator[tuple[str, dict[str, Any]]]:
    """Emit the coreset in its format, and in each further one that is asked for."""
    from curate.emit.emit import emit

    for suffix, chosen in emit_options(pipeline):
        target = pipeline.place("emit") + suffix
        make = partial(emit, pipeline.place("select"), target, chosen, pool=_pool(pipeline))
        yield paths.name(target), _fresh(job, make)


def _pool(pipeline: Pipeline) -> str | None:
    """Say where the pool is now, which may have moved since it was embedded. None: where it was then, if anywhere."""
    if "embed" in pipeline.tables:
        return pipeline.pool if {"demo", "pool"} & set(pipeline.tables) else None
    given = pipeline.tables.get("pool", {}).get("path") or pipeline.tables.get("import", {}).get("pool")
    return str(given) if given else None


def _fresh(job: Job, stage: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
    """Run a stage, resuming; with --overwrite, make it anew only where the request has changed."""
    try:
        return stage(replace(job, overwrite=False))
    except ContractError:
        if not job.overwrite:
            raise
        return stage(job)
