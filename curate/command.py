"""What all verbs share: where their options come from, and how a verb runs, prints its result and exits.

A verb is a function of its arguments, of `options` if its stage has any, and of `run`. `verb` makes a command of it:
the fields of the stage's options become the command's options, together with the common ones, which mean the same
everywhere. A field becomes an option if it is annotated with its help: `k: Annotated[int, "Clusters."]`; a second text
names the option if it should differ from the field. A tuple is given as `A,B,…`, or, if it has such a second text, by
repeating the option. A field `seed` is filled from the common option of that name.
"""

import dataclasses
import functools
import inspect
import json
import logging
import os
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from curate.engine import Job
from curate.errors import UsageError
from curate.storage import paths
from pipelines import terminal

Workers = Annotated[int, typer.Option(help="Worker processes (0: as many as the stage can use).")]
Engine = Annotated[str, typer.Option(help="local or ray.")]
SLICE = typer.Option("--slice", metavar="RANK/WORLD", help="Do only this part of the shards, for an array job.")
Seed = Annotated[int, typer.Option(help="Seed of every random draw.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output that was made with other options.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, without doing it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show tracebacks; CURATE_LOG=FILE saves them.")]
COMMON: dict[str, tuple[Any, Any]] = {  # name: (declaration, default), in the order of the help
    "workers": (Workers, 0),
    "engine": (Engine, "local"),
    "part": (Annotated[str, SLICE], ""),
    "seed": (Seed, 0),
    "overwrite": (Overwrite, False),
    "dry_run": (DryRun, False),
    "as_json": (Json, False),
    "verbose": (Verbose, False),
}
Made = dict[str, Any]
EMBEDDING = ("embed", "import")  # the verbs that give every row a status
MOST_NAMED = 5
DRIVERS = ("/proc/driver/nvidia/version", "/dev/nvidiactl", "/dev/dxg")  # the last in WSL, which has no other


class Group(terminal.Commands, TyperGroup):
    """The verbs."""


@dataclass(frozen=True)
class Run:
    """How a verb runs and prints its result, as the common options say. source: what it reads, empty for the demo."""

    verb: str
    job: Job
    source: str = ""
    dry_run: bool = False
    as_json: bool = False

    def make(self, out: str, stage: Callable[[Job], Made]) -> None:
        """Run a stage, print what it made, and exit with the right code."""
        if self.dry_run:
            from curate.storage.manifest import MANIFEST

            if self.source:
                typer.echo(f"would read {_described(self.source)}")
            there = paths.exists(paths.join(out, MANIFEST))
            typer.echo(f"would write {out}" + (", which already holds a finished result" if there else ""))
            return
        manifest = stage(self.job)
        failed = manifest.get("failed", {})
        if self.as_json:
            typer.echo(json.dumps({"directory": out, **manifest}, ensure_ascii=False))
        else:
            from curate.report.show import headline

            typer.echo(terminal.printable(headline(self.verb, manifest).strip() + f" → {out}"))
        if failed:
            typer.echo(terminal.printable(failures(failed, self.job.passing, out)), err=True)
            raise typer.Exit(1)
        counts = manifest.get("counts", {}) if self.verb in EMBEDDING else {}
        if sum(counts.values()) and not counts.get("ok"):
            told = ", ".join(f"{count:,} {status.replace('_', ' ')}" for status, count in counts.items())
            typer.echo(f"no row of {out} is usable: {told}; later stages would have nothing to work on", err=True)
            raise typer.Exit(1)


def failures(failed: Mapping[str, str], passing: Collection[str], out: str) -> str:
    """Name the shards that failed, and advise to try again only where that may help."""
    again = [name for name in failed if name in passing]
    told = (
        f"{len(failed):,} shard(s) failed: {', '.join(list(failed)[:MOST_NAMED])}{', …' * (len(failed) > MOST_NAMED)}"
    )
    if len(again) == len(failed):
        return f"{told}; run the same command again to retry"
    why = f"{told}; `curate show {out}` says why"
    return f"{why}; for {len(again):,} of them, running again may help" if again else why


def log_to(verbose: bool) -> None:
    """Send the log to stderr, with tracebacks if `verbose`, and all of it to the file that CURATE_LOG names.

    Raises: OSError when that file cannot be written.
    """
    logger, file = logging.getLogger("curate"), os.environ.get("CURATE_LOG")
    screen = logging.StreamHandler()
    screen.setLevel(logging.DEBUG if verbose else logging.WARNING)
    logger.handlers[:] = [screen]
    logger.propagate = False  # a library that logs at the root has a handler there, which would say all of it again
    if file:
        kept = logging.FileHandler(file, encoding="utf-8")
        kept.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.handlers.append(kept)
    logger.setLevel(logging.DEBUG if verbose or file else logging.WARNING)


def verb(
    app: typer.Typer, name: str = "", *, but: tuple[str, ...] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function. name: if not the function's own; but: common options to leave out."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        known_as = name or function.__name__
        given = inspect.signature(function).parameters
        kind = given["options"].annotation if "options" in given else None
        of_stage = _parameters(kind) if kind else []
        own = [
            each
            for parameter in given.values()
            if parameter.name != "run"
            for each in (of_stage if parameter.name == "options" else [parameter])
        ]
        common = [
            _parameter(each, declared, default) for each, (declared, default) in COMMON.items() if each not in but
        ]

        @functools.wraps(function)
        def command(**values: Any) -> None:
            told = {each.name: values.pop(each.name) for each in common}
            log_to(told.pop("verbose"))
            answer = {each: told.pop(each) for each in ("dry_run", "as_json") if each in told}
            seed = {each: told.pop(each) for each in ("seed",) if each in told}
            source = "" if own[0].name == "out" else str(values[own[0].name])
            if kind:
                values["options"] = build(kind, {each.name: values.pop(each.name) for each in of_stage} | seed)
            function(**values, run=Run(known_as, _job(**told), source, **answer))

        command.__signature__ = inspect.Signature([*own, *common])  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in (*own, *common)}
        return app.command(known_as)(command)

    return decorate


def _parameter(name: str, declared: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=declared)


def _parameters(kind: type[Any]) -> list[inspect.Parameter]:
    """Declare the annotated fields of an options class as options of the command line."""
    hints, found = typing.get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        if typing.get_origin(hints[field.name]) is not Annotated:
            continue
        declared, help_text, *named = typing.get_args(hints[field.name])
        default: Any = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        metavar = None
        if typing.get_origin(declared) is tuple:
            declared, default, metavar = (list[str], [], None) if named else (str, ",".join(default), "A,B,…")
        elif str in typing.get_args(declared):
            declared = str
        option = typer.Option(*named, help=help_text, metavar=metavar)
        found.append(_parameter(field.name, Annotated[declared, option], default))
    return found


def build(kind: type[Any], values: dict[str, Any]) -> Any:
    """Make an options object of what was typed; values that the class has no field for are left out."""
    hints = typing.get_type_hints(kind)
    given = {name: value for name, value in values.items() if name in hints}
    for name, value in given.items():
        if typing.get_origin(hints[name]) is tuple:
            listed = value if isinstance(value, list) else [each.strip() for each in value.split(",") if each.strip()]
            given[name] = tuple(listed)
    return kind(**given)


def _described(location: str) -> str:
    """Say in one line what a directory is, as far as is known. Raises: UsageError if it does not exist."""
    from curate.report.show import show

    try:
        return next(show(location))
    except UsageError:  # published embeddings, a mix's table, images in folders
        if not paths.exists(location):
            raise
        return location


def _job(workers: int = 0, engine: str = "local", part: str = "", overwrite: bool = False) -> Job:
    """Build the Job. Raises: UsageError."""
    rank, _, world = part.partition("/")
    if part and not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(f"--slice {part!r} is not RANK/WORLD with RANK < WORLD, e.g. --slice 0/8")
    if part and overwrite:
        raise UsageError(
            "--overwrite would delete what the other slices have made.", "delete the directory, then start the slices"
        )
    shares = (int(rank), int(world)) if part else None
    return Job(workers=workers, engine=engine, gpus=_gpus(), overwrite=overwrite, part=shares)


def _gpus() -> int:
    """Count the GPUs without paying for the import of torch where there is no driver."""
    if not any(map(os.path.exists, DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()
