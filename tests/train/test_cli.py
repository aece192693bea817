"""The verbs as typed: exit codes, one-line errors, results on stdout alone."""

import io
import json
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys import picture

from house import PATIENCE_S, Command
from train.__main__ import app, main
from train.data.prompts import Turn
from train.eval.generate import Speaker

REPO = Path(__file__).parents[2]


def call(capfd, *words):
    """Run the command line in this process; return exit code, stdout and stderr."""
    code = 0
    try:
        main(lambda: app([str(word) for word in words], standalone_mode=False))
    except SystemExit as exit_:
        code = exit_.code
    out, err = capfd.readouterr()
    return code, out, err


def test_the_road_from_shards_to_an_answer(world, tmp_path, capfd, monkeypatch):
    config = ("--config", world / "config.toml")
    align, tuned, model = tmp_path / "run" / "align", tmp_path / "run" / "finetune", tmp_path / "model"
    code, out, _ = call(capfd, "align", *config, "--data", world / "captions", "--out", align, "--json")
    assert code == 0 and json.loads(out)["steps"] == 8
    words = ("finetune", *config, "--data", world / "mixed", "--align", align, "--out", tuned, "--json")
    assert json.loads(call(capfd, *words)[1])["samples"] == 40
    assert call(capfd, *words)[0] == 0, "finished is finished"
    code, out, err = call(capfd, *words, "--set", "finetune.steps=7")
    assert code == 2 and err.count("\n") == 1 and "stage.steps = 6, not 7" in err and "--overwrite" in err
    assert call(capfd, "export", tuned, "--out", model, *config)[0] == 0
    data = world / "llava" / "data.json"
    words = ("eval", model, "--data", data, "--out", tmp_path / "a.jsonl", "--show", 2)
    code, out, _ = call(capfd, *words, "--limit", 5)
    assert code == 0 and out.count("truth") == 2 and "all" in out
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 5
    stamp = (tmp_path / "a.jsonl").stat().st_mtime_ns
    assert call(capfd, *words, "--limit", 5)[:2] == (0, out), "what stands already is shown again"
    assert (tmp_path / "a.jsonl").stat().st_mtime_ns == stamp
    assert call(capfd, *words, "--limit", 6)[0] == 0 and len((tmp_path / "a.jsonl").read_text().splitlines()) == 6
    code, _, err = call(capfd, *words, "--limit", 4)
    assert code == 2 and "a.jsonl was made with limit = 6, not 4" in err and "--overwrite" in err
    (tmp_path / "x.jpg").write_bytes(picture("red", True, 0))
    words = ("generate", model, "--image", tmp_path / "x.jpg", "--prompt", "what colour is it ?", "--json")
    assert "answer" in json.loads(call(capfd, *words)[1])
    full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. See documentation for more")
    with monkeypatch.context() as patched:  # wherever it runs out: a line, no traceback
        patched.setattr(Speaker, "answers", lambda *_: (_ for _ in ()).throw(full))
        code, _, err = call(capfd, *words)
    told = err.splitlines()[-1]
    assert code == 1 and "Traceback" not in err and told.startswith("error: CUDA out of memory. Tried to allocate 2")
    asked = []
    monkeypatch.setattr(
        Speaker, "answers", lambda _, turns, images, __: asked.append((list(turns[0]), images)) or ["it"]
    )
    for prompt in (("--prompt", "what ?"), ()):  # a question, and a conversation
        monkeypatch.setattr("sys.stdin", io.StringIO("what ?\nwhere ?\n"))
        words = ("generate", model, "--image", tmp_path / "x.jpg", *prompt, "--set", "generate.system=be small")
        assert call(capfd, *words)[:2] == (0, "it\n" if prompt else "it\nit\n")
    first = [Turn("system", ("be small",)), Turn("user", (None, "what ?"))]
    assert [turns for turns, _ in asked] == [
        first,
        first,
        [*first, Turn("assistant", ("it",)), Turn("user", ("where ?",))],
    ]


def test_one_process_carries_out_many_commands(world, tmp_path):
    """Each answer has its command's exit code and output; a request that fails does not end the process."""
    requests = [
        ["check", "--config", str(world / "config.toml"), "--json"],
        ["check", "--set", "align.lrr=1"],
        ["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "model")],
        ["no-such-verb"],
        {"not": "a list"},
        ["check", "--json"],
    ]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    words = [sys.executable, "-m", "train", "work"]
    ended = subprocess.run(words, input=lines, capture_output=True, text=True, cwd=REPO, check=True)
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [answer["exit"] for answer in answers] == [0, 2, 2, 2, 2, 0]
    assert json.loads(answers[0]["said"])["model"]["template"] == "qa"
    assert "did you mean 'lr'" in answers[1]["error"] and "no-such-verb" in answers[3]["error"]
    assert json.loads(answers[5]["said"])["align"]["template"] == "plain"


def test_a_trainer_whose_parent_is_killed_ends_though_its_stdin_stays_open():
    start = "import os, subprocess, sys; own = subprocess.Popen([sys.executable, *sys.argv[1:], str(os.getpid())])"
    start += "; print(own.pid, flush=True); own.wait()"
    words = [sys.executable, "-c", start, *["-m", "train", "work", "--parent"]]
    parent = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPO)
    trainer = int(parent.stdout.readline())
    parent.stdin.write(json.dumps(["check", "--json"]).encode() + b"\n")
    parent.stdin.flush()
    assert json.loads(parent.stdout.readline())["exit"] == 0  # it is up, and waits for more
    parent.kill()
    ready, _, _ = select.select([parent.stdout], [], [], PATIENCE_S)
    assert ready and parent.stdout.read() == b"", f"trainer {trainer} goes on"
    parent.wait()


def test_inspect_shows_what_is_learnt(world, capfd):
    words = ("inspect", "--config", world / "config.toml", "--data", world / "mixed", "--num", 1)
    code, out, _ = call(capfd, *words)
    assert code == 0
    assert "<5 image tokens>question : what colour is it ? answer :[[red <eos>]]" in out
    assert "40 usable samples of 40" in out and "text only 20.0%" in out


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("check", "--set", "align.lrr=1"), "did you mean 'lr'"),
        (("check", "--set", "model.template=vicunna"), "did you mean 'vicuna'"),
        (("align", "--data", "nowhere", "--out", "x"), "no such file or folder"),
        (("export", "nowhere", "--out", "x"), "not a finished run"),
        (("generate", "nowhere", "--prompt", "x"), "not an exported model"),
        (("eval", "nowhere", "--data", "x", "--out", "y"), "no such file"),
        (("eval", "nowhere", "--tasks", "pope", "--eval-root", ".", "--out", "y"), "not an exported model"),
        (("inspect", "--data", "x"), "model.lm is not set"),
        (("align", "--data", Path(__file__).parent, "--out", "/dev/null/x"), "no *.tar in that folder"),
    ],
)
def test_wrong_requests_end_with_two(words, hint, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(capfd, *words)
    assert code == 2 and hint in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("generate", "--prompt", "x"), ("eval", "--data", "d.json", "--out", "a.jsonl")])
def test_a_run_in_the_place_of_a_model_is_refused_with_what_makes_one_of_it(words, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d.json").write_text('[{"conversations": [{"from": "human", "value": "a"}]}]')
    (tmp_path / "run" / "tuned").mkdir(parents=True)
    (tmp_path / "run" / "tuned" / "manifest.json").write_text("{}")
    code, _, err = call(capfd, words[0], "run/tuned", *words[1:])
    assert code == 2 and "run/tuned is a run, not a model" in err
    assert "python -m train export run/tuned --out run/model" in err


def test_check_prints_every_option(world, capfd):
    code, out, _ = call(capfd, "check", "--config", world / "config.toml", "--json")
    assert code == 0 and json.loads(out)["finetune"]["lora_rank"] == 4


def test_help_and_module_entry(tmp_path):
    done = Command("train", "--help", cwd=tmp_path)
    assert done.wait() == 0
    verbs = ("align", "finetune", "export", "import", "merge", "eval", "score", "generate", "inspect", "bench", "check")
    for verb in verbs:
        assert verb in done.stdout
    assert Command("train", "alig", cwd=tmp_path).wait() == 2
