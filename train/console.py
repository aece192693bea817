"""What the command line prints: results on stdout, as text or one JSON object, and our own log lines on stderr."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from typer.core import TyperGroup

from pipelines import memory, terminal
from train import config as configuration
from train.errors import TrainError, UsageError, is_out_of_memory
from train.work import end_with

log = logging.getLogger("train")


def show(value: dict[str, Any], as_json: bool) -> None:
    """Print a result: tables as sections, or all of it as one JSON object."""
    if as_json:
        say(json.dumps(value, ensure_ascii=False))
        return
    for key, entry in value.items():
        if entry in ("", {}):
            continue
        if isinstance(entry, dict):
            say(f"[{key}]\n" + "\n".join(f"  {k} = {v!r}" for k, v in entry.items()))
        else:
            say(f"{key} = {entry}")


def say(text: str) -> None:
    """Print a line to stdout at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def is_first_rank() -> bool:
    """Return whether this process is the one, of those that torchrun started, that prints."""
    return os.environ.get("RANK", "0") == "0"


class Group(terminal.Commands, TyperGroup):
    """The verbs."""


class _Plain(logging.Formatter):
    """Log lines in which file names and sample keys cannot send control codes to the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal.printable(super().format(record), "\n\t")


def quiet() -> None:
    """Keep stderr for our own lines, from the first rank; otherwise transformers prints whole configurations."""
    memory.one_arena()  # before the first thread
    terminal.open_closed()
    end_with(int(os.environ.pop("TRAIN_PARENT", "0")))  # so that training ends with a killed pipeline
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warn at every fork
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # else it reports each attempt to reach an unavailable hub
    level = logging.INFO if is_first_rank() else logging.ERROR
    screen = logging.StreamHandler(sys.stderr)
    screen.setFormatter(_Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[screen])
    log.setLevel(level)


def end(error: BaseException) -> NoReturn:
    """Print an error, as one line if it is ours or the file system's, and end the process.

    It ends at once if it still belongs to a group on GPUs, since it must not wait for the other ranks.
    """
    code = error.exit_code if isinstance(error, TrainError) else TrainError.exit_code
    if isinstance(error, terminal.Stopped):
        code = error.exit_code
        sys.stderr.write("stopped\n")
    elif isinstance(error, TrainError | OSError):
        sys.stderr.write(f"error: {terminal.printable(str(error))}\n")
    elif is_out_of_memory(error):
        told = terminal.printable(re.split(r"\. (?:Of the allocated| ?See )|\n", str(error))[0]) or "out of memory"
        sys.stderr.write(
            f"error: {told}; see what else uses it (nvidia-smi, top), or lower batch_size or micro_tokens\n"
        )
    else:
        sys.__excepthook__(type(error), error, error.__traceback__)
    ranks = sys.modules.get("train.dist")  # only this module joins groups, and it imports torch
    if ranks is not None and ranks.in_nccl():
        sys.stdout.flush()
        sys.stderr.flush()
        if (scratch := sys.modules.get("train.data.scratch")) is not None:
            scratch.clear()
        os._exit(code)
    sys.exit(code)


def show_scores(results: dict[str, Any], options: configuration.Eval, as_json: bool) -> None:
    """Print benchmark scores beside the published ones."""
    from train.eval.answers import compare, table

    lines = compare(results, options.published, options.tolerance)
    if as_json:
        held = [dataclasses.asdict(line) for line in lines if line.published is not None]
        show({"tasks": results, "published": held, "tolerance": options.tolerance}, True)
        return
    say(table(lines, options.tolerance))
    for name, result in results.items():
        for told in result["left_out"]:
            say(terminal.printable(f"{name}: left out: {told}"))
        if "submission" in result:
            say(f"{name}: file for its server: {result['submission']}")


def show_answers(summary: dict[str, Any], out: Path, num: int, as_json: bool) -> None:
    """Print `num` of the answers in a file beside the true ones, and the accuracies."""
    if as_json:
        show(summary, True)
        return
    lines = out.read_bytes().splitlines()  # str.splitlines would also split at U+2028 and the like
    shown = min(num, len(lines))
    for line in (lines[(2 * i + 1) * len(lines) // (2 * shown)] for i in range(shown)):  # spread over the questions
        row = json.loads(line)
        mark, asked = "=" if row["right"] else "x", row["question"] or "(image)"
        told = f"{mark} {row['key']}  {asked[:60]!r}\n    answer  {row['answer']}\n    truth   {row['truth']}"
        say(terminal.printable(told, "\n\t"))
    for task, score in {"all": summary, **summary["tasks"]}.items():
        say(f"{task:<12} {score['questions']:>6} questions   accuracy {score['accuracy']:.3f}")
    for told in summary.get("left_out", ()):
        say(terminal.printable(f"left out: {told}"))
    if "ranked" in summary:
        own, gain, picture = (summary[f"{kind}ranked_first"] for kind in ("", "gain_", "picture_"))
        told = f"own text first: {own:.3f}, by what the image adds {gain:.3f}; own image first: {picture:.3f}"
        say(f"{'ranked':<12} {summary['ranked']:>6} pictures    {told}")


def questions() -> Iterator[str]:
    """Yield lines from stdin until it ends, with a prompt at a terminal."""
    while True:
        try:
            question = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return
        if question:
            yield question


def describe_memory(config: configuration.Config) -> dict[str, str]:
    """Say for each stage how many tokens a pass takes and how much memory of this GPU, or one of 80 GB, it needs."""
    import torch

    from train.model.compose import blueprint
    from train.model.learn import prepare
    from train.run.memory import Memory

    cuda = torch.cuda.is_available()
    total = float(torch.cuda.get_device_properties(0).total_memory) if cuda else 80e9
    world = int(os.environ.get("WORLD_SIZE", "0")) or (torch.cuda.device_count() if cuda else 8)
    found = {}
    for name in ("align", "finetune"):
        stage: configuration.Stage = getattr(config, name)
        native: Any = SimpleNamespace(model=blueprint(config.model)[0])
        prepare(native, dataclasses.replace(stage, quantize=""))  # the formula needs no bitsandbytes
        itemsize, checkpointing = 4 if stage.precision == "fp32" else 2, config.model.gradient_checkpointing
        memory = Memory.of(native.model, stage, itemsize, checkpointing=checkpointing, world=world)
        fit = memory.tokens(total) if stage.micro_tokens == configuration.Stage.micro_tokens else stage.micro_tokens
        tokens = min(stage.micro_tokens, fit)
        cut = f", sharded over {world} processes" if stage.shard else ""
        found[f"{name}_memory"] = f"{tokens:,} tokens: {memory.bytes(tokens) / 1e9:.0f} GB of {total / 1e9:.0f}{cut}"
    return found


def describe_model(model: configuration.Model) -> dict[str, Any]:
    """Count a model's parameters from its configuration alone; empty if none is set, `unknown` if it is unavailable."""
    if not (model.tower and model.lm):
        return {}
    from train.model.compose import blueprint, limits

    try:
        native, vision = blueprint(model)
    except UsageError as error:
        return {"unknown": str(error)}
    counts = {
        "parameters": sum(p.numel() for p in native.parameters()),
        "tokens_per_image": vision.tokens_per_image,
    }
    return {**counts, "template": describe_template(model), "limits": limits(native.config)}


def describe_template(model: configuration.Model) -> str:
    """Name the template of conversations, if the configuration leaves the choice to the tokenizer; else return ""."""
    from train.data.own_template import read_own_template
    from train.data.prompts import OWN
    from train.model.language import load_tokenizer
    from train.run.stage import template_name

    if model.template not in ("", OWN):
        return ""
    try:
        tokenizer = load_tokenizer(model)
    except UsageError as error:
        return f"unknown: {error}"
    name = template_name(model, tokenizer)
    return f"{name}: the language model's own, {read_own_template(tokenizer).end} ends answers" if name == OWN else name
