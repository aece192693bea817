"""The published scripts' known defects: each is a switch, off unless asked for, and does what its name says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train import config as configuration
from train.data.sources import encode, open_source
from train.model.compose import compose
from train.model.learn import prepare
from train.run.stage import make_encoder, run_stage


def load(world, *settings):
    return configuration.load(str(world / "config.toml"), settings)


def run(world, out, stage, *settings):
    options = load(world, *settings, f"{stage}.steps=3")
    run_stage(stage, options, str(world / ("captions" if stage == "align" else "mixed")), out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(out / "projector.safetensors")


@pytest.mark.parametrize(
    ("table", "key", "right"),
    [
        ("align", "clip", 1.0),
        ("finetune", "clip", 1.0),
        ("finetune", "loss_norm", "token"),
        ("align", "plain_eos", True),
        ("model", "lm_head_bias", "fold"),
        ("model", "scale_features", False),
    ],
)
def test_the_default_is_the_right_one(table, key, right):
    assert getattr(getattr(configuration.load(None), table), key) == right


def test_without_clipping_gradients_go_as_they_are(world, tmp_path):
    """clip = 0, as their DeepSpeed files left it: the norm is recorded either way, and only acts where it is cut."""
    runs = {clip: run(world, tmp_path / clip, "finetune", f"finetune.clip={clip}") for clip in ("0.0", "1e9", "1e-7")}
    norms = {clip: rows[0]["grad_norm"] for clip, (rows, _) in runs.items()}
    assert norms["0.0"] == norms["1e9"] == norms["1e-7"] > 1e-7
    free, loose, cut = (projector for _, projector in runs.values())
    assert all(torch.equal(free[name], loose[name]) for name in free)
    assert any(not torch.equal(free[name], cut[name]) for name in free)


def test_a_plain_caption_ends_with_eos_unless_switched_off(world):
    """plain_eos = false: LLaVA and Bunny end captions with a newline, and never teach to stop."""
    source = open_source(str(world / "captions"))
    ends = {}
    for flag in ("true", "false"):
        options = load(world, "align.template=plain", f"align.plain_eos={flag}")
        encoder = make_encoder(compose(options.model), options.model, options.align)
        _, encoded = encode(source, encoder, 0, 64)
        ends[flag] = encoder.end_id in encoded.labels[np.flatnonzero(encoded.labels >= 0)]
    assert ends == {"true": True, "false": False}


def test_a_mean_of_means_weighs_samples_unlike_tokens(world, tmp_path):
    """loss_norm = microbatch: micro-batches of unequal supervision count alike."""
    small = "finetune.micro_tokens=40"
    rows, _ = run(world, tmp_path / "token", "finetune", small)
    theirs, _ = run(world, tmp_path / "microbatch", "finetune", small, "finetune.loss_norm=microbatch")
    assert rows[0]["supervised"] == theirs[0]["supervised"] and rows[0]["loss"] != theirs[0]["loss"]


def test_a_tower_moves_only_where_it_is_told_to(world, tmp_path):
    """tune_tower = false: what Bunny's second runs did before its public code was mended."""
    for flag, moved in (("true", True), ("false", False)):
        options = load(world, f"finetune.tune_tower={flag}")
        names = prepare(compose(options.model), options.finetune)
        assert any("vision_tower" in name for name in names) == moved
        run(world, tmp_path / flag, "finetune", f"finetune.tune_tower={flag}")
        learnt = tmp_path / flag / "weights.safetensors"
        assert learnt.is_file() == moved
    before = dict(compose(load(world).model).model.named_parameters())
    after = load_file(tmp_path / "true" / "weights.safetensors")
    assert after and all(
        not torch.equal(tensor, before[name]) for name, tensor in after.items() if "k_proj.bias" not in name
    )
