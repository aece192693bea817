"""The arithmetic of a step, against what torch counts as it runs, and its way into the metrics."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import word_tokenizer

from train import config as configuration
from train.bench.step import Reference
from train.config import Model, Stage
from train.data.batches import Batch
from train.data.sources import Measured
from train.model.compose import Composed, blueprint, compose
from train.model.forward import hidden_states, token_losses, tower_features
from train.model.learn import prepare
from train.model.skip_unlabelled import skip_unlabelled
from train.run.flops import Cost, peak_flops, published
from train.run.stage import run_stage


def count(work):
    """Run and return the result and the operations of its matrix products and convolutions."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = work()
    return result, counter.get_total_flops()


@pytest.mark.parametrize("tune", ["projector", "lora", "full"])
def test_counts_what_torch_counts(world, tune):
    composed = compose(configuration.load(str(world / "config.toml")).model)
    stage = Stage(tune=tune, lora_rank=4, lora_alpha=8, lora_dropout=0.0)
    prepare(composed, stage)
    skip_unlabelled(composed.model.model.language_model)
    config, size = composed.model.config.text_config, composed.vision.image_size
    ids = torch.tensor([[5, *[composed.image_id] * 5, *range(6, 20)]])
    supervised, length = torch.arange(10, 15), ids.shape[1]
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    feats, tower = count(lambda: tower_features(composed, pixels))

    def step():
        hidden = hidden_states(composed, ids, torch.arange(length)[None], feats, [length], supervised)
        token_losses(composed.model, hidden[0][supervised], ids[0][supervised + 1]).sum().backward()

    _, counted = count(step)
    batch = Batch(ids, ids, supervised, supervised, supervised, None, [0], [length])
    cost = Cost.of(composed, stage)
    projector = composed.model.model.multi_modal_projector
    counted += 2 * projector.linear_1.weight.numel() * 5  # the formula's gradient of features, which nothing needs
    counted -= 6 * config.num_hidden_layers * config.hidden_size * length**2  # torch counts what causality masks
    rotary = counted - cost.flops(batch, cached=True)
    assert 0 <= rotary < 2e-3 * counted  # torch counts the angles of positions too
    patch = composed.model.model.vision_tower.embeddings.patch_embedding.weight.numel()
    assert cost.tower - 2 * patch == tower  # the class token has no patch
    assert cost.flops(batch, cached=False) == cost.flops(batch, cached=True) + cost.tower


@pytest.mark.parametrize("tune", ["projector", "lora", "full"])
def test_a_mixture_counts_the_experts_that_a_token_goes_to(tune, tmp_path):
    sizes = {"vocab_size": 80, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    sizes |= {"num_hidden_layers": 2, "intermediate_size": 96}
    kinds = {
        "dense": tf.Qwen3Config(**sizes),
        "qwen3_moe": tf.Qwen3MoeConfig(**sizes, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48),
        "ernie4_5_moe": tf.Ernie4_5_MoeConfig(
            **sizes,
            moe_num_experts=8,
            moe_k=2,
            moe_intermediate_size=48,
            moe_num_shared_experts=0,
            moe_layer_start_index=0,
        ),
    }
    word_tokenizer().save_pretrained(tmp_path / "words")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    tf.SiglipVisionConfig(**small, image_size=28, patch_size=14).save_pretrained(tmp_path / "tower")
    totals = {}
    for name, config in kinds.items():
        config.save_pretrained(tmp_path / name)
        options = Model(tower=str(tmp_path / "tower"), lm=str(tmp_path / name), tokenizer=str(tmp_path / "words"))
        model, vision = blueprint(options)
        stage = Stage(tune=tune, lora_rank=1, lora_dropout=0.0)
        composed = Composed(model, None, vision, options.image_token, "", 2)
        prepare(composed, stage)
        cost = Cost.of(composed, stage)
        adapters = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        totals[name] = cost.token + cost.target - 6 * adapters
    assert totals["qwen3_moe"] == totals["ernie4_5_moe"] == totals["dense"]


@pytest.mark.parametrize("tune", ["projector", "lora"])
def test_counts_what_the_published_step_computes(world, tune):
    """Two samples, one shorter, through the bench's own reference; images as long as the text is not."""
    composed = compose(configuration.load(str(world / "config.toml"), ["model.attention=sdpa"]).model)
    stage = Stage(tune=tune, lora_rank=4, lora_alpha=8, lora_dropout=0.0)
    trainable, lm = prepare(composed, stage), composed.model.model.language_model
    lm.activation_checkpointing_enable({"use_reentrant": True})
    lm.train()
    width, size, config = 20, composed.vision.image_size, composed.model.config.text_config
    ids = torch.tensor([[5, *[composed.image_id] * 5, *range(6, 20)], [*range(6, 18), *[0] * 8]])
    positions, learnt = torch.arange(width).expand(2, -1), torch.tensor([10, 30])
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    batch = Batch(ids, positions, learnt, learnt, learnt, pixels, [0], [width, 12])
    work = Reference(composed, stage, trainable, *[None] * 5)
    _, counted = count(lambda: work.token_losses(batch).sum().backward())
    measured = Measured(np.array([width, 12]), np.array([1, 1]), np.array([1, 0]), 0, {})
    cost = published(composed, stage)
    parts = cost.parts(measured, [[[0], [1]]], padded=True)
    inner, squares = composed.model.model, 2 * config.num_hidden_layers * config.hidden_size * width**2
    counted += 2 * inner.multi_modal_projector.linear_1.weight.numel() * 5 - 8 * squares  # as above; 4 more, recomputed
    counted += 2 * inner.vision_tower.embeddings.patch_embedding.weight.numel()
    assert abs(counted - sum(parts.values())) < 2e-3 * counted
    ours = Cost.of(composed, stage).parts(measured, [[[0, 1]]], padded=False)
    assert all(ours[part] <= count for part, count in parts.items()) and ours["tower"] == parts["tower"] == cost.tower


@pytest.mark.parametrize("scales", [1, 3])
@pytest.mark.parametrize(
    "tower", ["google/siglip-so400m-patch14-384", "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"]
)
def test_counts_the_tiles_of_several_scales(world, tower, scales):
    composed = compose(Model(tower=tower, lm=str(world / "lm"), scales=scales, shrink="tiny"))
    prepare(composed, Stage())
    size, inner = composed.vision.image_size, composed.model.model.vision_tower
    pixels = torch.zeros(1, 3, size, size, dtype=torch.uint8)
    _, tower_flops = count(lambda: tower_features(composed, pixels))
    patch = getattr(inner, "tower", inner).embeddings.patch_embedding.weight.numel()
    first = composed.vision.has_class_token or (scales > 1 and "eva" in tower)
    tiles = 14 if scales == 3 else 1
    assert Cost.of(composed, Stage()).tower == pytest.approx(tower_flops + 2 * patch * tiles * first, rel=1e-3)


def test_metrics_hold_mfu_where_a_peak_is_known(world, tmp_path):
    for settings in ((), ("finetune.peak_tflops=0.001",)):
        options = configuration.load(str(world / "config.toml"), (*settings, "finetune.steps=2"))
        run_stage("finetune", options, str(world / "mixed"), tmp_path / f"run{len(settings)}")
    rows = [json.loads(line) for line in (tmp_path / "run0" / "metrics.jsonl").read_text().splitlines()]
    assert all("mfu" not in row and row["peak_memory_gb"] > 0.01 and row["tflop"] > 0 for row in rows)
    for line in (tmp_path / "run1" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        assert row["mfu"] == pytest.approx(row["tflop"] * 1e12 / (row["step_s"] * 1e9), rel=0.02)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of a process is forgotten on Linux")
def test_the_peak_of_memory_is_that_of_this_run(world, tmp_path):
    before = np.ones(1 << 26)  # 0.5 GiB, of another command of this process
    held = float(before.sum()) and before.nbytes / 1e9
    del before
    options = configuration.load(str(world / "config.toml"), ("finetune.steps=1",))
    run_stage("finetune", options, str(world / "mixed"), tmp_path / "run")
    peak = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())["peak_memory_gb"]
    now = int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024 / 1e9
    assert 0.01 < peak < now + held / 2


def test_a_cpu_has_no_peak_unless_given():
    assert peak_flops(torch.device("cpu"), torch.bfloat16, 0.0) is None
    assert peak_flops(torch.device("cpu"), torch.float32, 1.5) == 1.5e12


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a seventh of the card
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", None),
    ],
)
def test_a_part_of_a_gpu_is_not_held_against_the_whole(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    found = peak_flops(torch.device("cuda"), torch.bfloat16, 0.0)
    assert found == (tflops and tflops * 1e12)
