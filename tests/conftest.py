"""Shared by all tests: where things are, a small demo made once, and the command line as a user runs it."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
REAL_DATA = ROOT.parent / "shared" / "data"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.update(OFFLINE)


def pytest_collection_modifyitems(items):
    for item in items:
        if "realdata" in item.keywords and not REAL_DATA.is_dir():
            item.add_marker(pytest.mark.skip(reason=f"real data is not at {REAL_DATA}"))
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def curate(*words, check=True, **options):
    """Run the command line in a process of its own; returns it ended, with stdout and stderr as text."""
    command = [sys.executable, "-m", "curate", *map(str, words)]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, **options)
    if check:
        assert ended.returncode == 0, ended.stderr[-2000:]
    return ended


def fingerprint(*directories):
    """Digest every file of the directories but the logs: two equal fingerprints mean byte-identical artefacts."""
    found = {}
    for directory in map(Path, directories):
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.name != "log.jsonl":
                found[f"{directory.name}/{path.relative_to(directory)}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def manifest(directory):
    return json.loads((Path(directory) / "manifest.json").read_text())


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A dirty demo of 600 rows in 3 shards, with its truth, instruction data and tests."""
    from curate.demo import render

    out = tmp_path_factory.mktemp("demo")
    render(out, rows=600, seed=11, shards=3, dirt="dirty", instruct=60, tests=1)
    return out


CLIP = f"local-dir:{ROOT / 'pipelines' / 'demo' / 'clip'}"
