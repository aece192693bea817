"""Carry out trials: one arm of an ablation with one seed, from the pool to the measures that arms are compared by.

    OUT/pools/KEY/{demo,embeddings,clusters}   OUT/coresets/KEY/{selection,coreset,align}
    OUT/models/ARM-SEED/{mix,finetune,model,eval} and trial.json

KEY digests everything that a directory depends on, so trials that are alike up to a stage share its directory. Every
directory resumes as its stage does; a trial is done when its `trial.json` holds its request. The trainer is another
program: a worker keeps one `python -m train work` and sends it the command lines that `curate run` would start, since
starting it anew costs more than a tiny model's evaluation.
"""

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from curate.demo.oracle import ORACLE, score_concepts, select_oracle
from curate.engine import Job
from curate.errors import CurateError, ShardError
from curate.run import pipeline, stages
from curate.run.pipeline import Pipeline
from curate.storage import manifest, paths

LEVELS = {
    "pools": ("demo", "import", "embed", "cluster"),
    "coresets": ("select", "emit", "align"),
    "models": ("mix", "finetune", "export", "eval"),
}
TRIAL = "trial.json"
KEEP = {
    "all": "everything",
    "models": "its models, not the checkpoints that a killed run would resume from",
    "answers": "its answers, not its mix and models",
}
MEASURES = {
    "caption": ("captions that name the right concept, mean over concepts", "higher", "share"),
    "caption_weighted": ("the same, concepts weighted by their frequency", "higher", "share"),
    "answer": ("exact answers to questions, mean over concepts and kinds of question", "higher", "share"),
    "answer_weighted": ("the same, concepts weighted by their frequency", "higher", "share"),
    "accuracy": ("exact answers to all held-out records", "higher", "share"),
    "perplexity": ("perplexity of the true answers to all held-out records", "lower", "number"),
    "gain_ranked_first": (
        "held-out pictures whose own text gains most from the picture, of `eval.candidates`",
        "higher",
        "share",
    ),
    "ranked_first": ("held-out pictures whose own text is the likeliest of `eval.candidates`", "higher", "share"),
    "picture_ranked_first": (
        "held-out texts that are likeliest behind their own picture, of `eval.candidates`",
        "higher",
        "share",
    ),
    "gain_mean_rank": ("mean rank of a picture's own text by what the picture adds", "lower", "number"),
    "mean_rank": ("mean rank of a picture's own text by likelihood", "lower", "number"),
    "picture_mean_rank": ("mean rank of a text's own picture by the text's likelihood", "lower", "number"),
    "information": ("how far a held-out text narrows down which picture is its own, in nats", "higher", "number"),
    "text_accuracy": ("exact answers to held-out tasks without a picture", "higher", "share"),
    "text_perplexity": ("perplexity of the true answers to tasks without a picture", "lower", "number"),
    "right_share": ("share of the coreset's pairs whose caption fits the picture", "higher", "share"),
    "concepts": ("concepts with at least one right pair in the coreset", "higher", "count"),
    "kept": ("rows in the coreset", "", "count"),
}


@dataclass(frozen=True)
class Trial:
    """An arm with a seed. keys: level -> the directory under that level; trials with the same key share it."""

    arm: Mapping[str, str]
    seed: int
    plan: Pipeline
    keys: Mapping[str, str]
    request: str

    def stages(self, level: str) -> list[str]:
        """List the stages of a level that this trial has, in order."""
        return [stage for stage in self.plan.stages() if stage in LEVELS[level]]

    def stands(self, level: str) -> bool:
        """Return whether a level's shared directory is complete; its name already stands for its request."""
        homes = (paths.join(self.plan.place(stage), manifest.MANIFEST) for stage in self.stages(level))
        return level != "models" and all(map(paths.exists, homes))

    def finished(self) -> dict[str, Any] | None:
        """Return what `trial.json` records, if it is of this very request."""
        location = paths.join(self.plan.out, TRIAL)
        recorded = manifest.load_json(location) if paths.exists(location) else {}
        return recorded if recorded.get("request") == self.request else None

    def answers(self) -> list[dict[str, Any]]:
        """Read its model's answers to your own records (`data.eval`); empty where it was asked none."""
        location = paths.join(self.plan.place("eval"), "answers.jsonl")
        return _lines(location) if paths.exists(location) else []


@dataclass
class Work:
    """The work of one process at one level: an item is the number of a trial."""

    trials: Sequence[Trial]
    level: str
    overwrite: bool
    keep: str

    def setup(self) -> None:
        """Prepare nothing: the trainer starts when it is first needed."""

    def __call__(self, item: int) -> dict[str, Any]:
        """Carry out a trial's stages of this level; at the last one, measure it and write `trial.json`."""
        trial = self.trials[item]
        results: dict[str, Any] = {}
        for stage in trial.stages(self.level):
            if stage in pipeline.TRAINER:
                results[stage] = self._train(trial.plan, stage)
            elif stage == "select" and trial.plan.tables["select"].get("recipe") == ORACLE:
                self._oracle(trial.plan)
            else:
                job = Job(workers=1, quiet=True, overwrite=self.overwrite)
                stages.run(trial.plan, job, stage, echo=lambda _: None)
                if stage == "mix":
                    refuse_short(trial.plan)
        if self.level == "pools":
            return {"rows": sum(manifest.open_input(trial.plan.place("embed"), "embed", "import").rows.values())}
        if self.level == "coresets":
            tidy(trial, self.level, self.keep)
            return {"rows": manifest.open_input(trial.plan.place("select"), "select").manifest["counts"]["kept"]}
        record = {"request": trial.request, "measures": measure(trial.plan, results.get("eval", {}))}
        paths.make_dir(trial.plan.out)
        manifest.save_json(paths.join(trial.plan.out, TRIAL), {"arm": dict(trial.arm), "seed": trial.seed, **record})
        tidy(trial, self.level, self.keep)  # now, not at the end: the next trial needs the room
        return record

    def _oracle(self, plan: Pipeline) -> None:
        select_oracle(plan.place("cluster"), plan.place("demo"), plan.place("select"), plan.tables["select"])

    def _train(self, plan: Pipeline, stage: str) -> dict[str, Any]:
        words = [*pipeline.trainer_command(plan, stage)[3:], "--json"]
        answer = trainer().ask(words)
        if answer["exit"] == 2 and self.overwrite:
            answer = trainer().ask([*words, "--overwrite"])
        if answer["exit"]:
            raise ShardError(f"{stage}: {answer['error']}")
        return dict(json.loads(answer["said"].strip().splitlines()[-1]))


def tidy(trial: Trial, level: str, keep: str) -> None:
    """Delete what `KEEP` does not keep of a trial's finished level; directories that trials share keep their model."""
    for stage in trial.stages(level):
        place = trial.plan.place(stage)
        if stage in ("align", "finetune") and keep != "all":
            paths.remove(paths.join(place, "checkpoints"))
        if level == "models" and stage != "eval" and keep == "answers":
            paths.remove(place)


def refuse_short(plan: Pipeline) -> None:
    """Refuse a mix that has fewer records of a source than its arm asks for. Raises: ShardError."""
    for name, source in manifest.open_input(plan.place("mix"), "mix").manifest["sources"].items():
        if short := source.get("short_of_count"):
            counts = f"{source['usable']:,} records, {short:,} fewer than this arm asks for"
            raise ShardError(f"mix: {name} has {counts}; lower its count, or ablation.shares.total")


class Trainer:
    """A `python -m train work` process: a command line in, its exit code and output out."""

    def __init__(self) -> None:
        words = [sys.executable, "-m", "train", "work", "--parent", str(os.getpid())]
        self.stderr = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up and block it
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr)

    def ask(self, words: Sequence[str]) -> dict[str, Any]:
        """Send a command and return the answer. Raises: CurateError when the process has ended."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps(list(words)).encode() + b"\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self.process.wait()
            self.stderr.seek(0)
            last = self.stderr.read().decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            trainer.cache_clear()
            killed = code in (-signal.SIGKILL, -signal.SIGTERM)  # its last line is not why it was killed
            why = "" if killed else f": {last[0]}"
            raise CurateError(f"the trainer {stages.how_it_ended(code)} at {' '.join(words[:2])}{why}")
        return dict(json.loads(line))

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        self.process.wait()
        self.stderr.close()


@functools.cache
def trainer() -> Trainer:
    """Return this process's trainer, started when first asked for."""
    made = Trainer()
    atexit.register(made.close)
    return made


def measure(plan: Pipeline, evaluated: Mapping[str, Any]) -> dict[str, float]:
    """Gather the measures that a trial has: of its selection, and of its model's answers where it has a model."""
    selection = manifest.open_input(plan.place("select"), "select")
    measures: dict[str, float] = {"kept": int(selection.manifest["counts"]["kept"])}
    if "demo" in plan.tables:
        judged = stages.judge_selection(selection, plan.place("demo"))
        measures |= {"right_share": judged["right_share"], "concepts": judged["concepts"]["after"]}
    for task, result in evaluated.get("tasks", {}).items():
        if "scores" in result:  # a benchmark of the papers
            measures |= {f"{task}_{name}": float(value) for name, value in result["scores"].items()}
    if "answers" in evaluated:
        measures |= _of_demo(evaluated) if "demo" in plan.tables else _of_records(evaluated)
    return measures


def _lines(location: str) -> list[dict[str, Any]]:
    with paths.open_read(location) as file:
        return [json.loads(line) for line in file.read().splitlines()]


def _of_demo(evaluated: Mapping[str, Any]) -> dict[str, float]:
    text = evaluated.get("tasks", {}).get("text", {})
    scores = score_concepts(_lines(evaluated["answers"]))
    return scores | {f"text_{name}": text[name] for name in ("accuracy", "perplexity") if name in text}


def _of_records(evaluated: Mapping[str, Any]) -> dict[str, float]:
    ranked = [f"{kind}{name}" for kind in ("", "gain_", "picture_") for name in ("ranked_first", "mean_rank")]
    wanted = ("accuracy", "perplexity", "information", *ranked)
    measures = {name: float(evaluated[name]) for name in wanted if name in evaluated}
    for task, found in evaluated.get("tasks", {}).items():
        if task != "(none)":  # records that name no task
            measures |= {f"{task}_{name}": float(found[name]) for name in wanted if name in found}
    return measures
