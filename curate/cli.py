"""The command line: every verb is a thin layer over one documented call.

Inputs come first, the output directory last, and inputs are never modified. Results go to stdout (`--json`: one
object), progress to stderr. Exit 0: done. Exit 1: finished, but the listed shards failed; a rerun resumes. Exit 2: the
request was wrong.
"""

import json
import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from curate.cluster.options import ClusterOptions
from curate.command import Group, Json, Run, failures, log_to, verb
from curate.demo.options import DemoOptions
from curate.embed.options import EmbedOptions
from curate.emit.options import EmitOptions
from curate.errors import CurateError, UsageError
from curate.faults import LASTING
from curate.ingest.options import ImportOptions, PackOptions
from curate.report.options import ReportOptions
from curate.select.options import SelectOptions
from pipelines import memory, terminal
from pipelines.terminal import printable

log = logging.getLogger("curate")
app = typer.Typer(
    cls=Group,
    help="Condense image-text pools into coresets. A pool is a directory of tar shards; each verb makes one directory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="markdown",
)


def _tell_version(asked: bool) -> None:
    if asked:
        typer.echo(f"curate {version('data-curate')}")
        raise typer.Exit


@app.callback()
def _about(
    version: Annotated[
        bool, typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


def main() -> None:
    """Run the command line; an error meant for the user becomes one line and an exit code."""
    memory.one_arena()
    terminal.open_closed()
    try:
        with terminal.stoppable():
            log_to(verbose=False)
            app()
    except CurateError as error:
        log.debug("", exc_info=True)
        sys.stderr.write(f"error: {printable(str(error))}\n")
        sys.exit(error.exit_code)
    except OSError as error:
        log.debug("", exc_info=True)
        told = printable(f"error: {error.strerror or error}{f': {error.filename}' if error.filename else ''}")
        lasting = isinstance(error, LASTING)
        sys.stderr.write(f"{told}\n" if lasting else f"{told}; run again to resume\n")
        sys.exit(UsageError.exit_code if lasting else 1)
    except (KeyboardInterrupt, terminal.Stopped) as stop:
        sys.stderr.write("stopped; run the same command again to resume\n")
        sys.exit(getattr(stop, "exit_code", terminal.Stopped.exit_code))


@verb(app, but=("seed",))
def pack(
    source: Annotated[str, typer.Argument(help="A folder of files, or parquet files with images in a column.")],
    out: Annotated[str, typer.Argument(help="Directory for the pool.")],
    *,
    options: PackOptions,
    run: Run,
) -> None:
    """Pack images that are not in tars yet into a pool, byte for byte.

    Example: `curate pack download/ pool/` writes `pool/{folder}.tar`.
    """
    from curate.ingest.pack import pack as stage

    run.make(out, lambda job: stage(source, out, options, job))


@verb(app)
def embed(
    pool: Annotated[str, typer.Argument(help="Tars: a directory, glob, brace pattern or URL.")],
    out: Annotated[str, typer.Argument(help="Directory for the embeddings.")],
    *,
    options: EmbedOptions,
    run: Run,
) -> None:
    """Embed images and captions with CLIP, shard by shard, and score how well they match.

    Example: `curate embed shards/ emb/ --model ViT-L-14-quickgelu --pretrained openai` writes `emb/{shard}.arrow`.
    """
    from curate.embed.embed import embed as stage

    run.make(out, lambda job: stage(pool, out, options, job))


@verb(app, "import")
def import_(
    source: Annotated[str, typer.Argument(help="The folder of published embeddings.")],
    out: Annotated[str, typer.Argument(help="Directory for the embeddings.")],
    *,
    options: ImportOptions,
    run: Run,
) -> None:
    """Import published embeddings as sidecars, as they are or joined to your own download.

    Example: `curate import laion/ emb/ --layout clip-retrieval --pool shards/ --join url` writes `emb/{shard}.arrow`.
    """
    from curate.ingest.published import import_layout

    run.make(out, lambda job: import_layout(source, out, options, job))


@verb(app)
def cluster(
    embeddings: Annotated[str, typer.Argument(help="A directory made by `curate embed` or `import`.")],
    out: Annotated[str, typer.Argument(help="Directory for the clusters.")],
    *,
    options: ClusterOptions,
    run: Run,
) -> None:
    """Cluster the images by k-means, assign every row, and link near-duplicates within clusters.

    Example: `curate cluster emb/ clu/ --k 10000` writes `clu/centroids.npy`, `clu/{shard}.arrow` and `clu/edges.arrow`.
    """
    from curate.cluster.cluster import cluster as stage

    run.make(out, lambda job: stage(embeddings, out, options, job))


@verb(app, but=("part",))
def select(
    source: Annotated[
        str, typer.Argument(help="A directory made by `curate cluster`, or by `embed` if no step needs clusters.")
    ],
    out: Annotated[str, typer.Argument(help="Directory for the selection.")],
    *,
    options: SelectOptions,
    run: Run,
) -> None:
    """Run a funnel of steps, and record for every dropped row which step dropped it.

    Example: `curate select clu/ sel/ --recipe bunny --n 2000000` writes `sel/{shard}.arrow` and `sel/funnel.json`.

    With your own steps:
    `curate select clu/ sel/ --step 'dedup(0.9)' --step 'rank(clip_score, 0, 0.5)' --step 'sample(10_000)'`;
    `curate steps` lists them all.
    """
    from curate.select.select import select as stage

    run.make(out, lambda job: stage(source, out, options, job))
    if not run.as_json and not run.dry_run:
        from curate.report.show import selection_lines

        typer.echo("\n".join(selection_lines(out)))


@app.command()
def steps() -> None:
    """List the steps, columns and recipes of `curate select`, one line each.

    Example: `curate steps` writes nothing: it prints them.
    """
    from curate.report.show_steps import step_lines

    for line in step_lines():
        typer.echo(line)


@verb(app)
def emit(
    selection: Annotated[str, typer.Argument(help="A directory made by `curate select`.")],
    out: Annotated[str, typer.Argument(help="Directory for the coreset.")],
    *,
    options: EmitOptions,
    pool: Annotated[str, typer.Option(help="Where the pool is now, if it has moved.")] = "",
    run: Run,
) -> None:
    """Write the coreset, ready to train on: the original members of each kept sample, byte for byte.

    Example: `curate emit sel/ coreset/` writes `coreset/{000000}.tar` and `coreset/{000000}.arrow`.
    """
    from curate.emit.emit import emit as stage

    run.make(out, lambda job: stage(selection, out, options, job, pool or None))


@verb(app, but=("part", "seed"))
def mix(
    table: Annotated[str, typer.Argument(help="A TOML file with a [mix] table and [mix.sources.NAME] tables.")],
    out: Annotated[str, typer.Argument(help="Directory for the mixed shards.")],
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="mix.KEY=VALUE", help="Override.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed for sampling and ordering.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at faults and repeated ids instead of counting them.")
    ] = False,
    *,
    run: Run,
) -> None:
    """Mix instruction data from several sources, including text-only ones, to exact shares and counts.

    Example: `curate mix pipelines/bunny_695k.toml mix/` writes `mix/{000000}.tar` and each source's account.
    """
    from curate import options
    from curate.mix.mix import mix as stage
    from curate.mix.mix import read_table

    tables = {"mix": read_table(table)}
    flags = [*([f"mix.seed={seed}"] if seed is not None else []), *(["mix.strict=true"] if strict else [])]
    for setting in [*(settings or []), *flags]:
        options.assign(tables, setting)
    run.make(out, lambda job: stage(tables["mix"], out, job))


@verb(app, but=("engine", "part"))
def demo(
    out: Annotated[str, typer.Argument(help="Directory for the demo.")],
    *,
    options: DemoOptions,
    run: Run,
) -> None:
    """Render a pool of captioned pictures with planted faults, instruction data and tests.

    Example: `curate demo out/demo` writes `out/demo/{pool,instruct,test}/`, `truth.arrow` and `text.json`.
    """
    from curate.demo.render import render_demo

    run.make(out, lambda job: render_demo(out, options, job))


@verb(app, but=("workers", "engine", "part"))
def report(
    directory: Annotated[str, typer.Argument(help="A directory that a verb made, or one that holds such directories.")],
    out: Annotated[str, typer.Argument(help="The HTML file.")],
    *,
    options: ReportOptions,
    run: Run,
) -> None:
    """Write one self-contained HTML page: funnel, scores with movable cuts, clusters, twins, mixes, runs, ablations.

    Example: `curate report out/demo out/demo/report.html` writes that file, which needs no network.
    """
    from curate.report.report import report as stage

    run.make(out, lambda job: stage(directory, out, options, job))


@app.command()
def find(
    directory: Annotated[str, typer.Argument(help="A directory of embed, import, cluster or select.")],
    texts: Annotated[list[str] | None, typer.Argument(help="What to look for: one or more texts.")] = None,
    image: Annotated[list[str] | None, typer.Option(help="Look for pictures similar to this one. Repeatable.")] = None,
    without: Annotated[
        list[str] | None, typer.Option("--not", help="A text that the rows should not match. Repeatable.")
    ] = None,
    n: Annotated[int, typer.Option(help="Rows for each text or picture.")] = 50,
    out: Annotated[str, typer.Option(help="Write an HTML page on which the pictures can be marked.")] = "",
    model: Annotated[str, typer.Option(help="The model that made the embeddings, if they do not name it.")] = "",
    pretrained: Annotated[str, typer.Option(help="Its tag, or a local checkpoint.")] = "",
    as_json: Json = False,
) -> None:
    """Find the rows whose images are nearest to texts or pictures, and say what became of them.

    Example: `curate find sel/ "a photo of a watermark" --out found.html` writes a page and prints keys and scores.
    """
    from curate.ask.find import find as search
    from curate.report.found import lines, page
    from curate.report.report import write_page

    embedded, found = search(directory, texts or [], image or [], without or [], n, model, pretrained)
    if out:
        write_page(out, page(embedded, found, directory, without or []))
    if as_json:
        rows = [
            {"for": name, "score": h.score, "stem": h.stem, "row": h.row, **h.facts}
            for name in found
            for h in found[name]
        ]
        typer.echo(json.dumps(rows, ensure_ascii=False))
        return
    for line in lines(found):
        typer.echo(printable(line))


@app.command()
def probe(
    directory: Annotated[str, typer.Argument(help="A directory of embed, import, cluster or select.")],
    labels: Annotated[str, typer.Argument(help="A file of `key TAB label` lines, as saved from a page of `find`.")],
    head: Annotated[str, typer.Argument(help="The head to write, a .safetensors file.")],
    n: Annotated[int, typer.Option(help="How many rows to propose for labelling next.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed for splitting into folds.")] = 0,
    as_json: Json = False,
) -> None:
    """Fit a linear head to rows that a person marked, and say how well it does on held-out ones.

    Example: `curate probe emb/ marked.tsv good.safetensors` writes the head, for use in a step:
    `--step 'above(head("good.safetensors", "good"), 0.5)'`.
    """
    from curate.ask.probe import lines
    from curate.ask.probe import probe as fit

    told = fit(directory, labels, head, n, seed)
    if as_json:
        return typer.echo(json.dumps(told, ensure_ascii=False))
    for line in lines(told, head):
        typer.echo(printable(line))


@app.command()
def show(
    directory: Annotated[str, typer.Argument(help="A pool, a pipeline's OUT, or any directory that a verb made.")],
    key: Annotated[str, typer.Option(help="Say what became of this one sample.")] = "",
    as_json: Json = False,
) -> None:
    """Say what a directory is, how it was made, and what became of one sample.

    Example: `curate show out/demo/selection --key 000000123` writes nothing: it prints one screen.
    """
    from curate.report.show import show as describe
    from curate.report.show_sample import facts_of, show_key
    from curate.storage.manifest import open_input

    if as_json:
        found = facts_of(directory, key) if key else [open_input(directory).manifest]
        typer.echo("\n".join(json.dumps(facts, ensure_ascii=False) for facts in found))
        return
    for line in show_key(directory, key) if key else describe(directory):
        typer.echo(printable(line))


@verb(app, but=("part", "seed"))
def run(
    pipeline: Annotated[str, typer.Argument(help="A TOML file, or the name of a shipped pipeline.")] = "",
    out: Annotated[str, typer.Option(help="The directory that holds all others [out/NAME].")] = "",
    pool: Annotated[str, typer.Option(help="Use this pool instead of the pipeline's.")] = "",
    recipe: Annotated[str, typer.Option(help="Use this recipe instead of the pipeline's steps.")] = "",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override.")] = None,
    only: Annotated[str, typer.Option(help="Run one stage only, or one group: coreset or train.")] = "",
    names: Annotated[bool, typer.Option("--list", help="List the shipped pipelines.")] = False,
    *,
    run: Run,
) -> None:
    """Run every stage of a pipeline, resuming where the last run stopped.

    Example: `curate run demo --out out/demo --only coreset` writes `out/demo/{embeddings,clusters,selection,coreset}`.
    """
    from curate.run import pipeline as pipelines
    from curate.run import stages

    if names or not pipeline:
        for name, about in pipelines.listing():
            typer.echo(f"{name:<30} {about}")
        return
    plan = pipelines.load(pipeline, out or None, pool=pool or None, recipe=recipe or None, settings=settings or [])
    if "ablation" in plan.tables:
        from curate.ablation.run import command

        if not command(plan, run.job, only, dry_run=run.dry_run, as_json=run.as_json, echo=typer.echo):
            raise typer.Exit(1)
        return
    if run.dry_run:
        from curate.run.dry_run import lines

        for line in lines(plan, only or None, run.job.gpus):
            typer.echo(line)
        return
    made = stages.run(plan, run.job, only or None, echo=(lambda _: None) if run.as_json else typer.echo)
    if run.as_json:
        typer.echo(json.dumps({label: manifest.get("counts", {}) for label, manifest in made.items()}))
    broken = {label: manifest["failed"] for label, manifest in made.items() if manifest.get("failed")}
    for label, failed in broken.items():
        typer.echo(f"{label}: {failures(failed, run.job.passing, plan.out)}", err=True)
    if broken:
        raise typer.Exit(1)
