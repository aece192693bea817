"""Held-out samples: by picture, not by row; their loss is that of a plain pass and chooses the weights kept."""

import json
import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from train import config as configuration
from train.__main__ import app
from train.data.holding_out import held_of, hold_out
from train.data.measuring import measure
from train.data.sources import open_source
from train.dist import Runtime
from train.errors import Interrupted, UsageError
from train.model.compose import compose
from train.run import loop
from train.run.stage import make_encoder, run_stage


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 12), max_size=3), min_size=1, max_size=30), st.floats(0.05, 0.9), st.integers(0, 3)
)
def test_no_picture_is_on_both_sides(pictures, share, seed):
    held = set(held_of(dict(enumerate(pictures)), share, seed).tolist())
    assert len(held) <= share * len(pictures)
    learnt = {picture for i, own in enumerate(pictures) if i not in held for picture in own}
    assert not learnt & {picture for i in held for picture in pictures[i]}


def test_the_order_of_samples_changes_nothing():
    pictures = {i: [i % 7] for i in range(50)}
    backwards = {i: pictures[49 - i] for i in range(50)}
    one, other = held_of(pictures, 0.3, 0), held_of(backwards, 0.3, 0)
    assert {pictures[i][0] for i in one} == {backwards[i][0] for i in other} and len(one) in range(8, 16)


def test_pictures_are_known_by_their_bytes(world, tmp_path):
    """The same picture under two names, in two samples: both are held out, or neither is."""
    records = json.loads((world / "llava" / "data.json").read_text())[:4]
    (tmp_path / "images").mkdir()
    for number, record in enumerate(records):
        record["image"] = f"{number}.jpg"
        same = (world / "llava" / "images" / f"00000{number // 2}.jpg").read_bytes()
        (tmp_path / "images" / record["image"]).write_bytes(same)
    (tmp_path / "data.json").write_text(json.dumps(records))
    options = configuration.load(str(world / "config.toml"))
    source = open_source(str(tmp_path / "data.json"))
    measured = measure(source, make_encoder(compose(options.model), options.model, options.finetune), 64)
    learnt, held = hold_out(source, measured, 0.5, 0, Runtime.detect("fp32", 0))
    assert len(held.usable) == 2 and held.usable[1] == held.usable[0] + 1 and held.usable[0] % 2 == 0
    assert sorted([*learnt.usable, *held.usable]) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="holds out none"):
        hold_out(source, measured, 0.3, 0, Runtime.detect("fp32", 0))


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run whose learning rate ruins it after its first steps, so that its best checkpoint is not its last."""
    out = tmp_path_factory.mktemp("val") / "run"
    words = ["finetune", "--config", world / "config.toml", "--data", world / "mixed", "--val", "0.25", "--out", out]
    words += ["--set", "finetune.save_every=2", "--set", "finetune.lr=0.5", "--set", "finetune.warmup=1"]
    app([*map(str, words), "--set", "finetune.clip=0"], standalone_mode=False)
    return out


def test_the_weights_of_the_lowest_validation_loss_are_kept(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    told = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}
    assert list(told) == [2, 4, 6]
    best = min(told, key=told.get)
    result = json.loads((run / "manifest.json").read_text())["result"]
    assert result["best_step"] == best and math.isclose(result["val_loss"], told[best], abs_tol=1e-7)
    assert result["samples"] == 30, "of 40 samples 10 are held out"
    kept, saved = (
        load_file(run / name) for name in ("projector.safetensors", f"checkpoints/step-{best:06d}/weights.safetensors")
    )
    assert all(torch.equal(tensor, saved[f"model.{name}"]) for name, tensor in kept.items())


def test_a_run_that_was_stopped_chooses_among_the_same_weights(world, tmp_path, monkeypatch):
    """At a stop there is no time to validate, and its weights are none that an undisturbed run would have compared."""
    words = ["finetune", "--config", world / "config.toml", "--data", world / "mixed", "--val", "0.25"]
    words += ["--set", "finetune.save_every=6", "--set", "finetune.lr=0.5", "--set", "finetune.warmup=1"]
    words += ["--set", "finetune.clip=0"]

    def go(out):
        app([*map(str, words), "--out", str(tmp_path / out)], standalone_mode=False)
        rows = [json.loads(line) for line in (tmp_path / out / "metrics.jsonl").read_text().splitlines()]
        return [row["step"] for row in rows if "val_loss" in row]

    assert go("undisturbed") == [6]
    step = loop.Training._step

    def signalled(training, number, *rest):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(training, number, *rest)

    monkeypatch.setattr(loop.Training, "_step", signalled)
    with pytest.raises(Interrupted):
        go("stopped")
    monkeypatch.undo()
    assert (tmp_path / "stopped" / "checkpoints" / "step-000002").is_dir() and go("stopped") == [6]
    undisturbed, stopped = (
        [(tmp_path / out / name).read_bytes() for name in ("manifest.json", "projector.safetensors")]
        for out in ("undisturbed", "stopped")
    )
    assert undisturbed == stopped


def test_it_is_the_mean_over_supervised_tokens(world, tmp_path):
    """Held-out data of their own, and cached features: the loss is that of a plain pass over them, sample by sample."""
    from train.eval.generate import load_speaker
    from train.publish.export import export

    options = configuration.load(
        str(world / "config.toml"),
        [
            "finetune.steps=1",
            "finetune.lr=1e-9",
            "finetune.cache_features_mb=64",
            f"finetune.val={world / 'llava' / 'data.json'}",
        ],
    )
    manifest = run_stage("finetune", options, str(world / "mixed"), tmp_path / "run")
    export(tmp_path / "run", tmp_path / "model", dtype="fp32")
    speaker, source = load_speaker(tmp_path / "model"), open_source(str(world / "llava" / "data.json"))
    from train.data.prompts import parse
    from train.data.sources import decode_image

    total, tokens = 0.0, 0
    for index in range(len(source)):
        record = source.record(index)
        turns = parse(record.conversations, len(record.images))
        images = [decode_image(source.image_bytes(location)) for location in record.images]
        for at in range(1, len(turns), 2):
            [(loss, count)] = speaker.truth_losses([turns[:at]], [images], [turns[at].text])
            total, tokens = total + loss, tokens + count
    assert np.isclose(manifest["result"]["val_loss"], total / tokens, rtol=1e-4)


def test_val_that_is_nothing_is_refused(world, tmp_path):
    for val, words in (("nowhere.json", "no such file or folder"), ("1.5", "less than 1")):
        with pytest.raises(UsageError, match=words):
            options = configuration.load(str(world / "config.toml"), [f'finetune.val="{val}"'])
            run_stage("finetune", options, str(world / "mixed"), tmp_path / "run")
