"""The command line: `python -m train VERB`, each also under `torchrun --nproc-per-node N -m train VERB`.

Results go to stdout (one JSON object with --json), everything else to stderr. Exit codes: 0 done; 1 the command failed;
2 the request was wrong; 130 stopped by Ctrl-C; 143 stopped by SIGTERM, or by either signal while training, which saves
a checkpoint first.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from pipelines import terminal
from train import config as configuration
from train import console
from train.console import describe_memory, describe_model, end, questions, quiet, say, show, show_answers, show_scores
from train.errors import UsageError

app = typer.Typer(
    cls=console.Group,
    help="Train small vision-language models from shards; verbs also run under `torchrun --nproc-per-node N -m train`.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigOption = Annotated[str | None, typer.Option("--config", help="TOML file with [model], [align], [finetune] …")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override an option: table.key=value. Repeatable.")]
DataOption = Annotated[str, typer.Option("--data", help="Folder of .tar shards, one shard, or a LLaVA .json/.jsonl.")]
ImagesOption = Annotated[str | None, typer.Option("--images", help="Folder of the images that the JSON names.")]
OutOption = Annotated[Path, typer.Option("--out", help="Output directory.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Delete what an earlier run left in --out.")]
LossesOption = Annotated[bool, typer.Option("--losses", help="Write each sample's loss to OUT/losses, for curate.")]
ValOption = Annotated[
    str | None, typer.Option("--val", help="Held-out data, or the share of --data to hold out, by picture (e.g. 0.02).")
]
EvalRootOption = Annotated[Path | None, typer.Option("--eval-root", help="Folder of benchmarks, as LLaVA lays it out.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def align(
    data: DataOption,
    out: OutOption,
    config: ConfigOption = None,
    settings: SetOption = None,
    images: ImagesOption = None,
    losses: LossesOption = False,
    val: ValOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train only the projector; the tower and the language model stay frozen.

    Example: `python -m train align --config pipelines/demo.toml --data coreset/ --out run/align` writes
    `run/align/projector.safetensors`, `metrics.jsonl` and `manifest.json`. After a kill, the same command resumes.
    """
    settings = _with_flags("align", settings, losses, val)
    _stage("align", config, settings, data, images, None, out, overwrite, as_json)


@app.command()
def finetune(
    data: DataOption,
    out: OutOption,
    align: Annotated[Path | None, typer.Option("--align", help="A finished align run, for its projector.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    images: ImagesOption = None,
    losses: LossesOption = False,
    val: ValOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the projector and the language model, the latter in full or with LoRA.

    Example: `python -m train finetune --config pipelines/demo.toml --data mix/ --align run/align --out run/tuned`
    writes `run/tuned/adapter/`, `projector.safetensors`, `metrics.jsonl` and `manifest.json`. After a kill, the same
    command resumes.
    """
    settings = _with_flags("finetune", settings, losses, val)
    _stage("finetune", config, settings, data, images, align, out, overwrite, as_json)


def _with_flags(name: str, settings: list[str] | None, losses: bool, val: str | None) -> list[str]:
    """Append to a stage's settings those that were given as flags of their own."""
    return [*(settings or ()), *[f"{name}.losses=true"] * losses, *([f"{name}.val={json.dumps(val)}"] if val else [])]


def _stage(
    name: Any,
    config: str | None,
    settings: list[str] | None,
    data: str,
    images: str | None,
    align: Path | None,
    out: Path,
    overwrite: bool,
    as_json: bool,
) -> None:
    options = configuration.load(config, settings or ())
    from train.run.stage import run_stage

    manifest = run_stage(name, options, data, out, images=images, align=align, overwrite=overwrite)
    if console.is_first_rank():
        result = {key: value for key, value in manifest["result"].items() if key not in ("trainable", "base")}
        show({"out": str(out), **result}, as_json)


def _first_rank_alone(command: Callable[..., None]) -> Callable[..., None]:
    """Run a command that cannot be shared in the first process only; under torchrun the others simply exit."""

    @functools.wraps(command)
    def alone(*args: Any, **options: Any) -> None:
        if console.is_first_rank():
            command(*args, **options)

    return alone


@app.command()
@_first_rank_alone
def export(
    run: Annotated[Path, typer.Argument(help="A finished align or finetune run; with --parts, also a model.")],
    out: OutOption,
    scores: Annotated[
        list[Path] | None, typer.Option("--scores", help="Results of eval for this model, for its card. Repeatable.")
    ] = None,
    parts: Annotated[bool, typer.Option("--parts", help="Write tower, projector and LM separately, for GGUF.")] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Merge a run into one llava-hf folder that transformers loads directly, or split such a folder into parts.

    Example: `python -m train export run/tuned --out run/model` writes `run/model/config.json`, `model.safetensors`,
    the files of tokenizer and processor, and a model card, README.md. With `--parts` it writes the language model, the
    tower and the projector separately, for GGUF converters.
    """
    options = configuration.load(config, settings or ())
    from train.publish.export import export as write

    found = write(run, out, dtype=options.export.dtype, overwrite=overwrite, parts=parts, scores=scores or ())
    show(found, as_json)


@app.command("import")
@_first_rank_alone
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="A released checkpoint of Bunny, LLaVA or LLaVA-Gemma.")],
    out: Annotated[Path, typer.Argument(help="Output directory.")],
    config: ConfigOption = None,
    settings: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Convert released weights of Bunny, LLaVA or LLaVA-Gemma to the form that export writes.

    Example: `python -m train import Bunny-v1_0-3B b3/ --config pipelines/bunny.toml` writes `b3/config.json` and
    `b3/model.safetensors`.
    """
    options = configuration.load(config, settings or ())
    from train.publish.released import import_released

    show(import_released(checkpoint, out, options, overwrite=overwrite), as_json)


@app.command()
@_first_rank_alone
def merge(
    models: Annotated[list[Path], typer.Argument(help="Exported models.")],
    out: OutOption,
    weight: Annotated[list[float], typer.Option("--weight", help="One per model, in order; must sum to 1.")],
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Average the weights of exported models.

    Example: `python -m train merge a/ b/ --weight 0.3 --weight 0.7 --out c/` writes `c/`, a model like `a/`.
    """
    from train.publish.export import merge as average

    show(average(models, weight, out, overwrite=overwrite), as_json)


@app.command("eval")
def evaluate(
    model: Annotated[Path, typer.Argument(help="An exported model.")],
    out: OutOption,
    data: Annotated[str | None, typer.Option("--data", help="Held-out records: shards, or a LLaVA .json.")] = None,
    images: ImagesOption = None,
    tasks: Annotated[str | None, typer.Option("--tasks", help="Benchmarks, instead of --data: pope,gqa,mme,…")] = None,
    eval_root: EvalRootOption = None,
    limit: Annotated[int | None, typer.Option("--limit", min=0, help="Ask at most this many; 0: all.")] = None,
    show: Annotated[int | None, typer.Option("--show", min=0, help="Print this many answers beside the truth.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer held-out questions, or those of benchmarks, and score the answers.

    Example: `python -m train eval run/model --tasks pope,gqa --eval-root playground/data/eval --out run/eval` writes
    `run/eval/{task}/answers.jsonl` and `manifest.json`; with `--data test.json --out answers.jsonl`, that file.
    """
    given = {"limit": limit, "show": show}
    settings = [*(settings or ()), *(f"eval.{key}={value}" for key, value in given.items() if value is not None)]
    options = configuration.load(config, settings).eval
    from train.dist import leave_group

    if (data is None) == (tasks is None):
        raise UsageError("eval needs either --data FILE or --tasks NAMES --eval-root DIR")
    if tasks is not None:
        from train.eval.answers import run_tasks
        from train.eval.lmms_command import hand_over, part_tasks
        from train.eval.tasks import check_published

        check_published(options.published)
        names, others = part_tasks(tasks)
        results = {}
        if names:
            results = run_tasks(model, names, _root(eval_root), out, options, overwrite=overwrite)
            leave_group()
        if others:
            hand_over(model, others, out, options)
        if names and console.is_first_rank():
            show_scores(results, options, as_json)
        return
    from train.eval.evaluate import evaluate as answer_all

    summary = answer_all(model, str(data), out, images=images, options=options, overwrite=overwrite)
    leave_group()
    if console.is_first_rank():
        show_answers(summary, out, options.show, as_json)


@app.command()
@_first_rank_alone
def score(
    task: Annotated[str, typer.Argument(help="A benchmark: pope, gqa, mme, …")],
    answers: Annotated[Path, typer.Option("--answers", help="Answers in LLaVA's form, one JSON object per line.")],
    eval_root: EvalRootOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file for the server, without suffix.")] = None,
    partial: Annotated[bool, typer.Option("--partial", help="Score only questions that have an answer.")] = False,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score an existing file of answers.

    Example: `python -m train score pope --answers answers.jsonl --eval-root playground/data/eval`
    writes nothing, unless `--out` is given: then the file that the benchmark's server takes.
    """
    options = configuration.load(config, settings or ()).eval
    from train.eval.answers import score_file
    from train.eval.tasks import check_published

    check_published(options.published)
    show_scores({task: score_file(task, answers, _root(eval_root), out, partial)}, options, as_json)


def _root(eval_root: Path | None) -> Path:
    if eval_root is None or not eval_root.is_dir():
        raise UsageError(f"--eval-root {eval_root}: give the folder that holds the benchmarks (pope/, gqa/, …)")
    return eval_root


@app.command()
def generate(
    model: Annotated[Path, typer.Argument(help="An exported model.")],
    image: Annotated[list[str] | None, typer.Option("--image", help="Image file. Repeatable.")] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question; without it, you chat.")] = None,
    config: ConfigOption = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Answer a question about one or more images, or start a conversation if no question is given.

    Example: `python -m train generate run/model --image x.jpg --prompt "What is it?"` writes nothing: it
    prints the answer. Each `<image>` in the prompt stands for the next image; without any, all images come first.
    """
    options = configuration.load(config, settings or ()).generate
    from train.eval.generate import ask, chat

    if prompt is None and not (image and not sys.stdin.isatty() and as_json):
        chat(model, image or [], questions(), say, options.max_new_tokens, options.system)
        return
    answer = ask(model, image or [], prompt or "", options.max_new_tokens, options.system)
    show({"answer": answer}, as_json) if as_json else say(answer)


@app.command()
@_first_rank_alone
def inspect(
    data: DataOption,
    config: ConfigOption = None,
    settings: SetOption = None,
    images: ImagesOption = None,
    stage: Annotated[str, typer.Option("--stage", help="align or finetune.")] = "finetune",
    num: Annotated[int, typer.Option("--num", min=0, help="How many samples.")] = 5,
) -> None:
    """Show samples as the model reads them, with the supervised tokens in colour.

    Example: `python -m train inspect --config pipelines/demo.toml --data mix/` writes nothing: it prints them.
    """
    options = configuration.load(config, settings or ())
    if stage not in ("align", "finetune"):
        raise UsageError(f"--stage {stage!r} is not one of align, finetune")
    from train.run.inspection import describe

    for text in describe(options, stage, data, images, num, colour=sys.stdout.isatty()):
        say(text)


@app.command()
def bench(
    config: ConfigOption = None,
    settings: SetOption = None,
    steps: Annotated[int, typer.Option("--steps", min=2, help="Steps of each run; the first is not timed.")] = 8,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=0, help="0: that of the stage; 16 for the small model.")
    ] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the result as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Time our training steps against steps with the published scripts' semantics.

    Example: `python -m train bench --config pipelines/bunny.toml` writes nothing, unless `--out` is given: then its
    result. It measures that model at full size with fresh weights; without `--config`, a small model.
    """
    options = configuration.load(config, settings or ()) if config else None
    from train.bench.step import bench as measure
    from train.bench.step import table
    from train.folder import write_json

    result = measure(options, steps, batch_size)
    if out is not None:
        write_json(out, result)
    show(result, True) if as_json else say(f"{result['model']}\n{table(result)}")


@app.command()
@_first_rank_alone
def check(config: ConfigOption = None, settings: SetOption = None, as_json: JsonOption = False) -> None:
    """Check a configuration and print all its options and the model's size.

    Example: `python -m train check --config pipelines/bunny.toml` writes nothing: it prints every option.
    """
    options = configuration.load(config, settings or ())
    from train.data.prompts import OWN, get_template
    from train.eval.tasks import check_published

    for stage in (options.align, options.finetune):
        if (name := stage.template or options.model.template) not in ("", OWN):
            get_template(name)
    check_published(options.eval.published)
    composed = describe_model(options.model)
    if "parameters" in composed:
        composed |= describe_memory(options)
    show({**dataclasses.asdict(options), "composed": composed}, as_json)


@app.command()
def work(
    parent: Annotated[int, typer.Option("--parent", help="Id of the process that started this one: exit with it.")] = 0,
) -> None:
    """Run commands from stdin in one process; each line is a command as a JSON list of words.

    Example: `python -m train work` writes what those commands write, and prints a line of JSON for each.
    """
    from train.work import answers, end_with

    end_with(parent)
    for answer in answers(sys.stdin, lambda words: app(words, standalone_mode=False)):
        say(json.dumps(answer, ensure_ascii=False))


def main(run: Callable[[], None] = app) -> None:
    """Run the command line and turn errors into exit codes; ours and the file system's are printed as one line."""
    quiet()
    try:
        with terminal.stoppable():  # the training loop, which saves first, handles both signals itself
            run()
    except (Exception, terminal.Stopped) as error:  # typer replaces sys.excepthook
        end(error)


if __name__ == "__main__":
    main()
