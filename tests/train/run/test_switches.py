"""The published scripts' known defects: each is a switch, off unless asked for, and does what its name says."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from train import config as configuration
from train.config import ADDED, Model, Stage
from train.data.batches import Plan
from train.data.measuring import measure
from train.data.sources import Measured, encode, open_source
from train.errors import UsageError
from train.model.compose import compose
from train.model.learn import prepare
from train.run.loop import group_weights
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


@pytest.mark.parametrize("arranged", ["micro_tokens=40", "micro_tokens=16384", "packing=false", "norm_samples=3"])
def test_a_mean_of_means_is_over_samples_as_the_scripts_ran_them(world, tmp_path, arranged):
    """loss_norm = microbatch: mean over passes of 8 samples of the mean over their tokens, however we pack them."""
    import pyarrow as pa

    size = 3 if "norm_samples" in arranged else 8
    settings = ("batch_size=20", "lora_dropout=0.0", "loss_norm=microbatch", "losses=true", arranged)
    rows, _ = run(world, tmp_path / "run", "finetune", *(f"finetune.{setting}" for setting in settings))
    with pa.memory_map(str(tmp_path / "run" / "losses" / "000000.arrow")) as file:
        noted = pa.ipc.open_file(file).read_all().to_pylist()
    options = load(world, "finetune.steps=3", "finetune.batch_size=20").finetune
    encoder = make_encoder(compose(load(world).model), load(world).model, options)
    plan = Plan(measure(open_source(str(world / "mixed")), encoder, 64), options)
    samples = plan.samples(2)  # the last step, so that what is noted is of it
    means = []
    for at in range(0, len(samples), size):
        group = [noted[i] for i in samples[at : at + size]]
        assert all(row["step"] == 3 for row in group)
        means.append(sum(r["loss"] * r["tokens"] for r in group) / sum(r["tokens"] for r in group))
    assert rows[2]["loss"] == pytest.approx(sum(means) / len(means), rel=1e-5)


def test_the_weights_of_a_mean_of_means_by_hand():
    measured = Measured(np.full(5, 9, np.int32), np.array([1, 2, 3, 4, 5], np.int32), np.zeros(5, np.int32), 0, {})
    plan = Plan(measured, Stage(batch_size=5, steps=1))
    a, b, c, d, e = plan.samples(0)
    tokens = {i: int(measured.supervised[i]) for i in range(5)}
    weights = group_weights(plan, 0, {}, 2)
    groups = [(a, b), (c, d), (e,)]
    assert weights == pytest.approx({i: 1 / (3 * sum(tokens[j] for j in g)) for g in groups for i in g})
    assert sum(weights[i] * tokens[i] for i in range(5)) == pytest.approx(1)
    weights = group_weights(plan, 0, {e, a}, 2)
    assert weights[b] == pytest.approx(1 / (2 * tokens[b])) and weights[e] == 0
    twice = Plan(measured, Stage(batch_size=10, steps=1))
    weights = group_weights(twice, 0, {}, 5)
    assert weights == pytest.approx(dict.fromkeys(range(5), 1 / 30))


def test_dropout_of_the_language_model_is_on_where_it_is_said_to_be(tmp_path):
    """lm_dropout: Phi-2's resid_pdrop; in the scripts it was on while the language model was frozen, too."""
    from toys import make_clip, word_tokenizer
    from transformers import PhiConfig, PhiForCausalLM

    words = word_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    PhiForCausalLM(PhiConfig(vocab_size=len(words), resid_pdrop=0.1, **sizes)).save_pretrained(tmp_path / "lm")
    words.save_pretrained(tmp_path / "lm")
    make_clip(tmp_path / "clip")
    model = Model(tower=f"local-dir:{tmp_path / 'clip'}", lm=str(tmp_path / "lm"))
    for tune, lm_dropout, on in (
        ("projector", "learning", False),
        ("projector", "always", True),
        ("lora", "learning", True),
        ("lora", "never", False),
        ("full", "never", False),
    ):
        composed = compose(model)
        prepare(composed, Stage(tune=tune, lm_dropout=lm_dropout, lora_dropout=0.2))
        dropouts = dict(composed.model.model.language_model.named_modules())
        own = [m for n, m in dropouts.items() if n.endswith("resid_dropout")]
        assert own and all((m.training and m.p == 0.1) == on for m in own), (tune, lm_dropout)
        lora = [m for n, m in dropouts.items() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)]
        assert (tune != "lora") or (lora and all(m.training and m.p == 0.2 for m in lora))


def test_an_older_manifest_lacks_the_newer_options_and_still_fits(world, tmp_path):
    run(world, tmp_path / "run", "finetune")
    stage = json.loads((tmp_path / "run" / "manifest.json").read_text())["request"]["stage"]
    assert not stage.keys() & ADDED
    run(world, tmp_path / "other", "finetune", "finetune.norm_samples=4")
    stage = json.loads((tmp_path / "other" / "manifest.json").read_text())["request"]["stage"]
    assert stage["norm_samples"] == 4


def test_a_run_from_before_chat_was_the_default_says_how_to_go_on(world, tmp_path):
    run(world, tmp_path / "run", "finetune", "model.template=vicuna")
    found = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (tmp_path / "run" / ".plan.json").write_text(json.dumps({"request": found["request"]}))
    (tmp_path / "run" / "manifest.json").unlink()
    with pytest.raises(UsageError, match="'vicuna', not 'chat'; .*To continue it, type --set model.template=vicuna"):
        run(world, tmp_path / "run", "finetune", "model.template=chat")
    run(world, tmp_path / "run", "finetune", "model.template=vicuna")


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
