"""Shared by all tests: where things are, and the command line as a user runs it."""

import hashlib
import json
import os
import shlex
import time
from pathlib import Path

from warm import HOME, Command
from warm_workers import started

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(OFFLINE)
GPU = "cpu" if os.environ.get("REHEARSE_GPU") else "cuda"  # where the tests marked `gpu` run

PATIENCE_S = 600  # nothing waits longer than it must; what is waited for this long does not come
BESIDE = ("log.jsonl", ".seen.json")  # when a run was, and when its input was written: no part of an artefact


def curate(*words, check=True, **options):
    """Run the command line in a process of its own; returns it ended, with stdout and stderr as text.

    options: as Command takes them.
    """
    ended = Command("curate", *words, **{"cwd": ROOT, **options})
    ended.wait()
    if check:
        assert ended.returncode == 0, ended.stderr[-2000:]
    return ended


def close_folders(monkeypatch, name):
    """Let every folder of a name refuse to be listed, as one of another user does; root may list them all."""
    scandir = os.scandir

    def refuse(place):
        if os.path.basename(str(place)) == name:
            raise PermissionError(13, "Permission denied", place)
        return scandir(place)

    monkeypatch.setattr(os, "scandir", refuse)


def until(condition, pause_s=0.01):
    """Wait until a condition holds, however busy the machine is; returns its value."""
    deadline = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s in vain"
        time.sleep(pause_s)
    return value


def fingerprint(*directories):
    """Digest every file of the directories but those that tell of the run: equal ones mean byte-identical artefacts."""
    found = {}
    for directory in map(Path, directories):
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.name not in BESIDE:
                found[f"{directory.name}/{path.relative_to(directory)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def tree(pid):
    """List the processes that a process has started, or had forked for it, and that these have, and so on."""
    parents, noted = {}, started(HOME)
    forker = next((child for child, parent in noted.items() if parent == 0), None)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, parent, *_ = rest.split()
        child, parent = int(folder.name), int(parent)
        if state != "Z":
            parents.setdefault(noted.get(child, parent) if parent == forker else parent, []).append(child)
    found, queue = [], [pid]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def manifest(directory):
    return json.loads((Path(directory) / "manifest.json").read_text())


CLIP = f"local-dir:{ROOT / 'pipelines' / 'demo' / 'clip'}"


def parse(line):
    """Parse a command line by the verbs' own signatures, without carrying it out; returns the verb and its values."""
    import typer

    words = shlex.split(line)
    if words[:3] == ["python", "-m", "train"] or words[0] == "torchrun":
        from train.__main__ import app

        words = words[words.index("train") :]
    else:
        assert words[0] == "curate", line
        from curate.cli import app
    group = typer.main.get_command(app)
    context = group.make_context(words[0], words[1:])
    name, verb, rest = group.resolve_command(context, [*context._protected_args, *context.args])
    return name, verb.make_context(name, rest, parent=context).params
