"""Read a pipeline: one TOML file with a table for every stage, and the command line that each stage stands for.

stages.py runs it. The tables of the trainer are checked by `python -m train check`, in a process of its own.
"""

import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pipelines
from curate import options
from curate.errors import UsageError, unknown
from curate.storage import paths
from pipelines.options import parse_setting

CORESET = ("demo", "import", "embed", "cluster", "select", "emit", "report")
TRAIN = ("mix", "align", "finetune", "export", "eval")
STAGES = CORESET + TRAIN
GROUPS: dict[str, Sequence[str]] = {"coreset": CORESET, "train": TRAIN, "all": STAGES}
PLACES = {
    "demo": "demo",
    "import": "embeddings",
    "embed": "embeddings",
    "cluster": "clusters",
    "select": "selection",
    "emit": "coreset",
    "report": "report.html",
    "mix": "mix",
    "align": "align",
    "finetune": "finetune",
    "export": "model",
    "eval": "eval",
}
TRAINER = ("model", "align", "finetune", "export", "eval", "generate")
TABLES = ("about", "pool", "data", *CORESET, "mix", *TRAINER, "ablation")
DATA_KEYS = ("align", "finetune", "eval", "eval_images", "eval_tasks", "eval_root")
BESIDE = {"import": ("source",), "select": ("compare",), "emit": ("also",)}


def shipped() -> Path:
    """Locate the folder of the pipelines that travel with the package."""
    return Path(pipelines.__path__[0])


def find(name: str) -> Path:
    """Find a pipeline by path, or a shipped one by name. Raises: UsageError with the names that exist."""
    for candidate in (Path(name), shipped() / name, shipped() / f"{name}.toml", shipped() / Path(name).name):
        if candidate.is_file():
            return candidate
    raise unknown("pipeline", name, (path.stem for path in shipped().glob("*.toml")))


def listing() -> Iterator[tuple[str, str]]:
    """Yield the shipped pipelines with the sentence each says about itself."""
    for path in sorted(shipped().glob("*.toml")):
        yield path.stem, str(tomllib.loads(path.read_text("utf-8")).get("about", ""))


@dataclass
class Pipeline:
    """A parsed pipeline. tables: the TOML's, with `--set` applied and `{here}` filled in.

    places: where a stage's output is, if not in its usual place under `out`.
    """

    path: Path
    out: str
    tables: dict[str, Any]
    settings: list[str] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)

    def place(self, stage: str) -> str:
        """Locate a stage's output."""
        return self.places.get(stage) or paths.join(self.out, PLACES[stage])

    @property
    def pool(self) -> str:
        """The pool that is embedded."""
        if "demo" in self.tables:
            return paths.join(self.place("demo"), "pool")
        where = self.tables.get("pool", {}).get("path")
        if not where:
            raise UsageError(f"{self.path.name} names no pool.", "give one: --pool DIR (with make: POOL=DIR)")
        return str(where)

    def stages(self, only: str | None = None) -> list[str]:
        """List the stages to run, in order; eval only if there are questions to ask, or it is asked for.

        only: a stage, or the groups coreset and train.
        """
        wanted = STAGES if only is None else GROUPS.get(only, (only,))
        if only is not None and only not in GROUPS and only not in STAGES:
            raise unknown("stage", only, [*GROUPS, *STAGES])
        idle = not {"eval", "eval_tasks"} & set(self.tables.get("data", {})) and only != "eval"
        stages = [stage for stage in wanted if stage in self.tables and not (stage == "eval" and idle)]
        if not stages:
            there = ", ".join(stage for stage in STAGES if stage in self.tables)
            raise UsageError(f"{self.path.name} has no stage to run for {only or 'all'}; it has {there or 'none'}.")
        return stages


def load(
    name: str, out: str | None, *, pool: str | None = None, recipe: str | None = None, settings: Sequence[str] = ()
) -> Pipeline:
    """Read and check a pipeline.

    pool: replaces the pipeline's own pool, or the demo's. recipe: replaces its steps.
    """
    path = find(name)
    try:
        tables = pipelines.read(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} is not readable TOML: {error}") from None
    place = out or f"out/{path.stem}"
    for setting in settings:
        options.assign(tables, setting)
    _check_tables(path.name, tables)
    if pool is not None:
        tables.pop("demo", None)
        tables["pool"] = {"path": pool}
    if recipe is not None:
        tables.setdefault("select", {})
        tables["select"] = {key: value for key, value in tables["select"].items() if key not in ("steps", "compare")}
        tables["select"]["recipe"] = recipe
    words = {"{here}": str(path.parent.resolve())}
    if "ablation" not in tables:  # its trials have their own directories
        words["{out}"] = place
    pipeline = Pipeline(path, place, pipelines.fill(tables, words), list(settings))
    for stage in (*CORESET, "mix"):
        if stage in tables:
            stage_options(pipeline, stage)
    if "ablation" not in tables:  # an arm's steps may be its own
        _check_choices(pipeline)
    return pipeline


def _check_tables(name: str, tables: Mapping[str, Any]) -> None:
    """Refuse unknown tables, and values that are not tables. Raises: UsageError."""
    for table, value in tables.items():
        if table not in TABLES:
            raise unknown(f"table of {name}", table, TABLES)
        if table != "about" and not isinstance(value, dict):
            raise UsageError(f"{name}: {table} is {value!r}, not a table.", f"[{table}]")
    for key in tables.get("data", {}):
        if key not in DATA_KEYS:
            raise unknown("key of [data]", key, DATA_KEYS)
        if not isinstance(tables["data"][key], str):
            raise UsageError(f"data.{key}={tables['data'][key]!r} is not a string.")
    if "source" not in tables.get("import", {"source": ""}):
        raise UsageError("[import] needs source.", "--set import.source=DIR")
    for table, key in (("select", "compare"), ("emit", "also")):
        several = tables.get(table, {}).get(key, [])
        if not isinstance(several, list):
            raise UsageError(f"{table}.{key}={several!r} is not a list.", f"{table}.{key} = [{several!r}]")
        if not all(isinstance(each, str) for each in several):
            raise UsageError(f"{table}.{key}={several!r} is not a list of strings.")


def _check_choices(pipeline: Pipeline) -> None:
    """Check every recipe, step and format that will be used, long before its stage runs. Raises: UsageError."""
    from curate.select import catalogue

    if "select" in pipeline.tables:
        for _, chosen in select_options(pipeline):
            catalogue.parse(chosen.texts())
    if "emit" in pipeline.tables:
        for _, chosen in emit_options(pipeline):
            chosen.resolved()


def stage_options(pipeline: Pipeline, stage: str, **changes: Any) -> Any:
    """Build the options object of a curation stage from its table; every key is checked."""
    table = _own_keys(pipeline, stage) | changes
    if stage == "mix":
        from curate.mix.mix import MixOptions, build_sources

        return build_sources(options.build(MixOptions, table, stage))
    return options.build(_kind(stage), table, stage)


def _own_keys(pipeline: Pipeline, stage: str) -> dict[str, Any]:
    """Take from a stage's table what the stage itself reads. If it has steps, `n` is for the recipes to compare."""
    table, beside = pipeline.tables[stage], BESIDE.get(stage, ())
    if stage == "select" and table.get("steps") and table.get("compare"):
        beside = (*beside, "n")
    return {key: value for key, value in table.items() if key not in beside}


def check_trainer(pipeline: Pipeline, only: str | None = None) -> None:
    """Let the trainer check its tables, if any of its stages will run. Raises: UsageError in its words."""
    if not set(pipeline.stages(only)) & set(TRAINER):
        return
    words = [sys.executable, "-m", "train", "check", "--config", str(pipeline.path), *_trainer_settings(pipeline)]
    ended = subprocess.run(words, check=False, capture_output=True, text=True)
    if ended.returncode:
        raise UsageError(ended.stderr.strip().splitlines()[-1].removeprefix("error: "))


def _kind(stage: str) -> type[Any]:
    """Find the options class of a curation stage."""
    file = importlib.import_module(f"curate.{'ingest' if stage == 'import' else stage}.options")
    kind: type[Any] = getattr(file, f"{stage.capitalize()}Options")
    return kind


def trainer_command(pipeline: Pipeline, stage: str) -> list[str]:
    """Write a trainer stage as the command line that runs it."""
    place, data = pipeline.place, pipeline.tables.get("data", {})
    words = [sys.executable, "-m", "train", stage]
    if stage == "align":
        words += ["--data", data.get("align", place("emit")), "--out", place("align")]
    elif stage == "finetune":
        words += ["--data", data.get("finetune", place("mix")), "--out", place("finetune")]
        words += ["--align", place("align")] if "align" in pipeline.tables else []
    elif stage == "export":
        words += [place("finetune" if "finetune" in pipeline.tables else "align"), "--out", place("export")]
    else:
        words += _questions(pipeline, data)
    return [*words, "--config", str(pipeline.path), *_trainer_settings(pipeline)]


def _trainer_settings(pipeline: Pipeline) -> list[str]:
    return [f"--set={setting}" for setting in pipeline.settings if setting.split(".")[0] in TRAINER]


def _questions(pipeline: Pipeline, data: Mapping[str, str]) -> list[str]:
    """Write what `train eval` is to ask: benchmarks in the LLaVA evaluation layout, or your own JSON."""
    place = pipeline.place
    if data.get("eval_tasks"):  # "" takes a base's away
        if not data.get("eval_root"):
            raise UsageError("data.eval_tasks needs data.eval_root.", "--set data.eval_root=DIR")
        return [
            place("export"),
            "--tasks",
            data["eval_tasks"],
            "--eval-root",
            data["eval_root"],
            "--out",
            place("eval"),
        ]
    if not data.get("eval"):
        raise UsageError(f"{pipeline.path.name} has no evaluation data.", "--set data.eval=FILE.json")
    images = ["--images", data["eval_images"]] if data.get("eval_images") else []
    return [place("export"), "--data", data["eval"], "--out", paths.join(place("eval"), "answers.jsonl"), *images]


def select_options(pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Yield each selection's options with its directory's suffix: for the recipe, and for each to compare with it."""
    yield "", stage_options(pipeline, "select")
    table = pipeline.tables["select"]
    for recipe in table.get("compare", []):
        suffix = re.sub(r"[^0-9A-Za-z]+", "-", recipe).strip("-")
        yield f"-{suffix}", stage_options(pipeline, "select", recipe=recipe, steps=[], n=table.get("n", ""))


def emit_options(pipeline: Pipeline) -> Iterator[tuple[str, Any]]:
    """Yield each emission's options with its directory's suffix."""
    chosen = stage_options(pipeline, "emit")
    yield "", chosen
    for kind in pipeline.tables["emit"].get("also", []):
        yield f"-{kind}", replace(chosen, format=kind)


def _flags(key: str, value: Any) -> list[str]:
    """Write a key of a stage's table as a command-line option."""
    name = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        return [name] if value else []
    if key == "steps":
        return [f"--step={step}" for step in value]
    return [f"{name}={','.join(value) if isinstance(value, list) else value}"]


def _changed(where: str, before: Any, after: Any) -> Iterator[str]:
    """Write as settings what differs from the file: `--set`, `{out}` filled in, an ablation's arm and seed."""
    if isinstance(after, dict) and after:
        for key, value in after.items():
            yield from _changed(f"{where}.{key}", before.get(key) if isinstance(before, dict) else None, value)
    elif after != before:
        plain = isinstance(after, str) and parse_setting(f"{where}={after}")[1] == after
        yield f"{where}={after if plain else json.dumps(after, ensure_ascii=False)}"


def shown_command(pipeline: Pipeline, stage: str) -> str:
    """Write a stage as a command for people to read."""
    if stage in TRAINER:
        return shlex.join(["python", *trainer_command(pipeline, stage)[1:]])
    place = pipeline.place
    between = {
        "demo": "",
        "import": str(pipeline.tables.get("import", {}).get("source", "")),
        "embed": pipeline.pool if stage == "embed" else "",
        "cluster": place("embed"),
        "select": place("cluster" if "cluster" in pipeline.tables else "embed"),
        "emit": place("select"),
        "report": pipeline.out,
        "mix": str(pipeline.path),
    }[stage]
    if stage == "mix":
        flags = [
            f"--set={setting}"
            for setting in _changed("mix", pipelines.read(pipeline.path).get("mix"), pipeline.tables["mix"])
        ]
        return shlex.join(["curate", "mix", between, place(stage), *flags])
    flags = [flag for key, value in _own_keys(pipeline, stage).items() for flag in _flags(key, value)]
    return shlex.join(["curate", stage, *([between] if between else []), place(stage), *flags])
