"""The README's commands run as they are written, in order, in one folder."""

import re
import shlex
import subprocess
import sys

import pytest

from house import ROOT

SLOW = ("make coreset", "make train", "make test", "make bench", "git clone")


def commands(name, marker="```sh run"):
    text = (ROOT / name).read_text()
    blocks = re.findall(re.escape(marker) + r"\n(.*?)```", text, flags=re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def test_the_readme_has_commands_to_run():
    assert len(commands("README.md")) >= 6


@pytest.mark.parametrize("name", ["README.md"])
def test_the_commands_run_as_written(name, tmp_path):
    (tmp_path / "pipelines").symlink_to(ROOT / "pipelines")
    for line in commands(name):
        words = shlex.split(line)
        assert words[0] in ("curate", "python"), line
        program = [sys.executable, "-m", "curate"] if words[0] == "curate" else [sys.executable]
        environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)}
        ended = subprocess.run([*program, *words[1:]], cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert ended.returncode == 0, f"{line}\n{ended.stderr[-1500:]}"


def test_every_verb_of_the_readme_and_makefile_exists():
    text = (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, flags=re.M)):
        target = "".join(target)
        assert re.search(rf"^{target}:", makefile, flags=re.M), target
    from curate.cli import app

    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    for verb in filter(None, map("".join, set(re.findall(r"`curate ([a-z]+)|^curate ([a-z]+)", text, flags=re.M)))):
        assert verb in verbs, verb
    for command in app.registered_commands:
        help_text = command.callback.__doc__
        assert "Example: `curate " in help_text, command.callback.__name__
