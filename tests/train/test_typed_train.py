"""Options of the trainer's verbs as they are typed, where the other tests do not: each is taken and has its effect.

tests/test_every_option.py says which are typed nowhere.
"""

import json

import pytest
from test_cli import call
from toys import picture

from train.data.sources import open_source


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """An align run and a finetune run on a LLaVA JSON with an image folder."""
    from train.__main__ import app

    home = tmp_path_factory.mktemp("typed")
    data = world / "llava" / "data.json"
    align = ["align", "--config", world / "config.toml", "--data", data, "--out", home / "align"]
    align = [*align, "--images", world / "llava" / "images", "--overwrite", "--set", "align.steps=2"]
    words = ["finetune", "--config", world / "config.toml", "--data", data, "--align", home / "align"]
    words = [*words, "--images", world / "llava" / "images", "--losses", "--out", home / "tuned", "--overwrite"]
    for each in (align, [*words, "--set", "finetune.steps=2"]):
        app([str(word) for word in each], standalone_mode=False)
    return home


def test_a_run_takes_images_and_losses_as_typed(tuned):
    assert json.loads((tuned / "align" / "manifest.json").read_text())["result"]["steps"] == 2
    assert (tuned / "tuned" / "losses").is_dir()


def test_export_merge_and_parts(world, tuned, tmp_path, capfd):
    for name in ("one", "two"):
        words = ("export", tuned / "tuned", "--out", tmp_path / name, "--set", "export.dtype=fp32", "--json")
        code, out, _ = call(capfd, *words, "--overwrite", "--config", world / "config.toml")
        assert code == 0 and json.loads(out)
    code, _, _ = call(capfd, "export", tmp_path / "one", "--parts", "--out", tmp_path / "parts")
    assert code == 0 and list((tmp_path / "parts").iterdir())
    words = (
        "merge",
        tmp_path / "one",
        tmp_path / "two",
        "--weight",
        0.25,
        "--weight",
        0.75,
        "--out",
        tmp_path / "both",
    )
    code, out, _ = call(capfd, *words, "--json", "--overwrite")
    assert code == 0 and json.loads(out) and (tmp_path / "both" / "model.safetensors").exists()


def test_eval_and_generate(world, tuned, tmp_path, capfd):
    model, config = tmp_path / "model", world / "config.toml"
    assert call(capfd, "export", tuned / "tuned", "--out", model, "--config", config)[0] == 0
    words = ("eval", model, "--data", world / "llava" / "data.json", "--images", world / "llava" / "images")
    words = (*words, "--config", config, "--out", tmp_path / "a.jsonl", "--limit", 3, "--json", "--overwrite")
    code, out, _ = call(capfd, *words)
    assert code == 0 and json.loads(out)["questions"] == 3
    (tmp_path / "x.jpg").write_bytes(picture("blue", False, 3))
    words = ("generate", model, "--image", tmp_path / "x.jpg", "--prompt", "what colour is it ?", "--config", config)
    code, out, _ = call(capfd, *words, "--set", "generate.max_new_tokens=1", "--json")
    assert code == 0 and len(json.loads(out)["answer"].split()) <= 1


def test_inspect(world, capfd):
    words = ("inspect", "--config", world / "config.toml", "--data", world / "llava" / "data.json", "--num", 1)
    words = (*words, "--images", world / "llava" / "images", "--stage", "align", "--set", "align.template=qa")
    code, out, _ = call(capfd, *words)
    assert code == 0 and "20 usable samples of 20" in out
    assert len(open_source(str(world / "llava" / "data.json"), str(world / "llava" / "images"))) == 20


def test_bench(world, tmp_path, capfd):
    from transformers import LlamaConfig

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaConfig(vocab_size=1024, **size).save_pretrained(tmp_path / "lm")
    words = ("bench", "--config", world / "config.toml", "--steps", 2, "--batch-size", 2, "--json")
    code, _, err = call(capfd, *words)
    assert code == 2 and "has a vocabulary of" in err and err.count("\n") == 1
    code, out, _ = call(capfd, *words, "--set", f"model.lm={tmp_path / 'lm'}", "--out", tmp_path / "bench.json")
    assert code == 0 and json.loads(out)["stages"].keys() == {"align", "finetune"}
    assert json.loads((tmp_path / "bench.json").read_text())["steps"] == 2
