"""Every verb's help: one sentence, an example that its own signature takes, and the files that it writes."""

import re
import subprocess
import sys
import tarfile

import pytest

from curate.cli import app as curate_app
from curate.cluster.options import ClusterOptions
from curate.command import build
from curate.demo.options import DemoOptions
from curate.embed.options import EmbedOptions
from curate.emit.options import EmitOptions
from curate.ingest.options import ImportOptions, PackOptions
from curate.report.options import ReportOptions
from curate.select.options import SelectOptions
from house import ROOT, Command, curate, parse
from train.__main__ import app as train_app

PROGRAMS = {"curate": curate_app, "train": train_app}
VERBS = [(name, command) for name, app in PROGRAMS.items() for command in app.registered_commands]


HEAVY = {"torch", "transformers", "numpy", "pyarrow", "faiss", "scipy", "sklearn", "open_clip", "PIL"}


def name_of(program, command):
    return f"{program} {command.name or command.callback.__name__}"


@pytest.mark.parametrize("program, command", VERBS, ids=[name_of(*each) for each in VERBS])
def test_help_has_a_sentence_an_example_and_the_files_written(program, command):
    sentence, _, rest = command.callback.__doc__.strip().partition("\n\n")
    assert sentence.endswith(".") and "\n" not in sentence and 20 < len(sentence) < 120
    example = re.match(r"Example: `([^`]+)`\s+writes\s+\S", " ".join(rest.split()))
    assert example, rest
    verb, _ = parse(example[1])
    assert verb == (command.name or command.callback.__name__)


def test_the_version_is_that_of_the_package():
    assert re.fullmatch(r"curate \d+\.\d+\.\d+", curate("--version").stdout.strip())


@pytest.mark.parametrize("program", ["curate", "train"])
def test_help_of_the_program_names_every_verb_at_once(program):
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", program, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    loaded = {line.rpartition("|")[2].strip() for line in told.stderr.splitlines()}
    assert told.returncode == 0 and not loaded & HEAVY
    for each, command in VERBS:
        if each == program:
            assert re.search(rf"\b{command.name or command.callback.__name__}\b", told.stdout)


@pytest.mark.parametrize(
    "line, expected",
    [
        ("curate pack s o", PackOptions()),
        (
            "curate embed p o --columns 'a, b' --seed 3 --batch-size 7",
            EmbedOptions(columns=("a", "b"), batch_size=7, seed=3),
        ),
        ("curate import s o --layout npy", ImportOptions("npy")),
        ("curate cluster e o --k 7 --seed 3 --floor 0.5", ClusterOptions(k=7, seed=3, floor=0.5)),
        (
            "curate select c o --step 'cap(a, 2)' --step 'sample(3, seed=1)'",
            SelectOptions(("cap(a, 2)", "sample(3, seed=1)")),
        ),
        ("curate select c o --n 2%", SelectOptions(n="2%")),
        ("curate emit s o", EmitOptions()),
        ("curate demo o --seed 4", DemoOptions(seed=4)),
        ("curate report d o", ReportOptions()),
    ],
)
def test_what_is_typed_becomes_the_options_of_the_stage(line, expected):
    _, values = parse(line)
    assert build(type(expected), values) == expected


def test_brackets_in_help_are_shown():
    told = Command("train", "align", "--help", cwd=ROOT)
    assert told.wait() == 0 and "[model]" in told.stdout


def test_a_dry_run_says_what_is_read_and_does_nothing(tmp_path):
    pool = tmp_path / "pool"
    pool.mkdir()
    with tarfile.open(pool / "a.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("0.txt"))
    told = curate("embed", pool, tmp_path / "emb", "--dry-run").stdout
    first, second = told.splitlines()
    assert first.startswith(f"would read {pool}: a pool of 1 tar, ") and second == f"would write {tmp_path / 'emb'}"
    assert not (tmp_path / "emb").exists()
    refused = curate("cluster", tmp_path / "typo", tmp_path / "clu", "--dry-run", check=False)
    assert refused.returncode == 2 and "is not a directory" in refused.stderr
