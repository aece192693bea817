"""What travels in the wheel: both programs, the shipped pipelines and the demo's models."""

import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from house import ROOT

PIPELINES = sorted((ROOT / "pipelines").glob("*.toml"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools", minversion="77", reason="building a wheel offline needs setuptools")
    out = tmp_path_factory.mktemp("wheel")
    tree = out / "tree"
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((ROOT / name).read_bytes())
    words = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(tree)]
    subprocess.run(words, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_carries_everything_that_runs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(path.relative_to(ROOT)) for folder in ("curate", "train") for path in (ROOT / folder).rglob("*.py")}
    wanted |= {f"pipelines/{path.name}" for path in PIPELINES}
    wanted |= {"pipelines/demo/clip/open_clip_model.safetensors", "pipelines/demo/lm/model.safetensors"}
    assert wanted <= names
    assert not [name for name in names if name.startswith("tests/")]


def test_the_installed_command_finds_the_shipped_pipelines(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = f"import sys; sys.path.insert(0, {str(site)!r}); sys.argv = ['curate', 'run', '--list']"
    code += "; import curate.cli; curate.cli.main()"
    listed = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert listed.returncode == 0, listed.stderr
    assert all(path.stem in listed.stdout for path in PIPELINES)


@pytest.mark.parametrize("path", PIPELINES, ids=lambda path: path.stem)
def test_every_shipped_pipeline_fits_the_signatures_of_both_programs(path):
    from curate import options
    from curate.mix.mix import MixOptions, read_table
    from curate.mix.sources import SourceOptions
    from curate.run import pipeline
    from train import config

    plan = pipeline.load(str(path), None)
    assert plan.tables["about"]
    if "mix" in plan.tables:
        for name, source in options.build(MixOptions, read_table(str(path)), "mix").sources.items():
            options.build(SourceOptions, source, f"mix.sources.{name}")
    config.load(str(path))


def test_the_constraints_pin_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split()}
    for wanted in [*project["dependencies"], *project["optional-dependencies"]["dev"]]:
        name = re.split(r"[;>=\[]", wanted)[0].strip().lower().replace("_", "-")
        assert name in pinned or "faiss-cpu" in name, name


def test_the_makefile_finds_the_lower_bound_of_every_dependency():
    [rule] = re.findall(r"sed -nE '(.+)' pyproject.toml > \$\(OLDEST\)", (ROOT / "Makefile").read_text())
    words = ["sed", "-nE", rule.replace("$$", "$"), "pyproject.toml"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert found == [line.split(";")[0].replace(">=", "==") for line in wanted]


def test_the_shipped_models_stay_small():
    for folder in ("clip", "tower", "lm"):
        size_bytes = sum(path.stat().st_size for path in (ROOT / "pipelines" / "demo" / folder).glob("*"))
        assert 0 < size_bytes <= 5 << 20, folder
