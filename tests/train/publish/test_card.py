"""The model card that `export` writes, read as its reader does: what it says, its Python, its scores."""

import json
import re
import subprocess
import sys

import pytest
from test_cli import call
from toys import picture

from train.__main__ import app


@pytest.fixture(scope="module")
def home(world, tmp_path_factory):
    """align, tuned and model, an exported folder."""
    home = tmp_path_factory.mktemp("card")
    config = ["--config", world / "config.toml"]
    steps = ["--set", "align.steps=2", "--set", "finetune.steps=2"]
    for words in (
        ["align", *config, "--data", world / "captions", "--out", home / "align", *steps, "--val", "0.2"],
        ["finetune", *config, "--data", world / "mixed", "--align", home / "align", "--out", home / "tuned", *steps],
        ["export", home / "tuned", "--out", home / "model", *config],
    ):
        app([str(word) for word in words], standalone_mode=False)
    return home


def test_it_tells_what_the_manifests_tell(home):
    card = (home / "model" / "README.md").read_text()
    result = json.loads((home / "tuned" / "manifest.json").read_text())["result"]
    assert f"{result['samples']:,} samples" in card and f"first loss {result['first_loss']:.4f}" in card
    assert "### align" in card and "### finetune" in card and "validation loss" in card and 'tune = "lora"' in card
    assert "template `qa`" in card and "vllm serve model" in card and str(home) not in card
    assert "{" not in re.sub(r"```.*?```", "", card, flags=re.DOTALL)


def test_its_python_runs(home, tmp_path):
    card = (home / "model" / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
    (home / "X.jpg").write_bytes(picture("red", True, 0))
    words = [sys.executable, "-c", code.replace("max_new_tokens=128", "max_new_tokens=2")]
    done = subprocess.run(words, cwd=home, capture_output=True, text=True, env={"PATH": "/usr/bin"})
    assert done.returncode == 0, done.stderr


def test_scores_of_this_model_are_put_in_and_others_refused(world, home, tmp_path, capfd):
    model = home / "model"
    words = ("eval", model, "--data", world / "llava" / "data.json", "--out", tmp_path / "answers.jsonl")
    assert call(capfd, *words, "--limit", 2)[0] == 0
    scored = ("export", home / "tuned", "--out", model, "--config", world / "config.toml")
    scored = (*scored, "--scores", tmp_path / "answers.manifest.json")
    assert call(capfd, *scored)[0] == 0
    card = (model / "README.md").read_text()
    assert "| answers | 2 | accuracy" in card and "### finetune" in card
    assert call(capfd, *scored, "--overwrite")[0] == 0
    assert (model / "README.md").read_text() == card, "exported anew it is the same model"
    manifest = json.loads((tmp_path / "answers.manifest.json").read_text())
    (tmp_path / "other").mkdir()
    manifest["result"]["questions"] = 7
    (tmp_path / "other/answers.manifest.json").write_text(json.dumps(manifest))
    twice = ("--scores", tmp_path / "other/answers.manifest.json", "--scores", tmp_path / "answers.manifest.json")
    assert call(capfd, *scored, *twice)[0] == 0
    card = (model / "README.md").read_text()
    assert card.count("| answers | 2 |") == card.count("| answers | 7 |") == 1, "of one name both, of one file one"
    manifest["request"]["weights"] = "0"
    (tmp_path / "answers.manifest.json").write_text(json.dumps(manifest))
    code, _, err = call(capfd, *scored)
    assert code == 2 and "belong to another model" in err
    code, _, err = call(capfd, *scored[:-1], tmp_path / "nothing")
    assert code == 2 and "no results of `eval` there" in err


def test_other_benchmarks_are_handed_to_lmms_eval(home, tmp_path, capfd, monkeypatch):
    words = ("eval", home / "model", "--tasks", "mmstar", "--out", tmp_path / "out", "--limit", 3)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = call(capfd, *words)
    assert code == 2 and "unknown task 'mmstar'" in err and "pip install lmms-eval" in err
    monkeypatch.undo()
    (tmp_path / "lmms_eval").mkdir()
    (tmp_path / "lmms_eval" / "__init__.py").write_text("")
    (tmp_path / "lmms_eval" / "__main__.py").write_text("import sys; open('typed', 'w').write(' '.join(sys.argv[1:]))")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert call(capfd, *words)[0] == 0
    typed = (tmp_path / "typed").read_text()
    assert (
        f"--model data_curate --model_args pretrained={home / 'model'} --tasks mmstar" in typed and "--limit 3" in typed
    )
    (tmp_path / "lmms_eval" / "__main__.py").write_text("raise SystemExit(3)")
    code, _, err = call(capfd, *words)
    assert code == 1 and "lmms-eval ended with exit code 3" in err
