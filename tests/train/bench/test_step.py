"""The bench: both ways see the same samples and lose the same; the samples are as long as they are said to be."""

import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from train.bench import quick_draws, workload
from train.bench.step import Padded, bench, loading_pace, table
from train.config import Model, Stage
from train.data.batches import Passes, Plan
from train.data.encoder import Encoder
from train.data.measuring import measure
from train.data.prompts import get_template
from train.data.sources import Measured, open_source
from train.model.compose import load_tokenizer


def test_both_ways_lose_the_same(monkeypatch):
    for name, value in {"LAYERS": 2, "WIDTH": 32, "HEADS": 2, "TOWER_LAYERS": 1, "TOWER_WIDTH": 32}.items():
        monkeypatch.setattr(f"train.bench.step.{name}", value)
    result = bench(None, steps=2, batch_size=9)
    for stage in result["stages"].values():
        assert stage["loss_difference"] < 1e-5 and stage["ours"]["losses"][0] != stage["ours"]["losses"][1]
        assert stage["ours"]["padding"] == 0 < stage["reference"]["padding"]
        assert stage["speedup"] > 0 and stage["speedup_cpu"] > 0
    assert "finetune" in table(result) and json.dumps(result)


def test_the_mix_is_as_long_as_it_is_said_to_be(tmp_path):
    tokenizer = load_tokenizer(Model(lm=str(workload.tokenizer(tmp_path / "t"))))
    encoder = Encoder(tokenizer, get_template("bunny"), "<image>", workload.IMAGE_TOKENS)
    source = open_source(str(workload.write_instructions(tmp_path / "d", 600, workload.IMAGE_TOKENS)))
    measured = measure(source, encoder, 2048)
    assert not measured.reasons
    assert (measured.images == 0).mean() == pytest.approx(40 / 664, abs=0.03)
    assert 700 < measured.lengths.mean() < 900, "published runs process 780 to 850 tokens a sample"
    assert measured.lengths.max() == 2048
    captions = open_source(str(workload.write_captions(tmp_path / "c", 200, workload.IMAGE_TOKENS)))
    plain = Encoder(tokenizer, get_template("plain"), "<image>", workload.IMAGE_TOKENS)
    supervised = measure(captions, plain, 2048).supervised
    assert 11 < supervised.mean() < 16 and (np.quantile(supervised, 0.5) - 1) == pytest.approx(12, abs=2)


def test_the_loaders_own_pace_is_told_where_few_steps_wait_for_nothing():
    """Ten passes of .1 s, decoded while the first step starts up: the others find them ready."""

    def decode(rows):
        time.sleep(0.1)
        return SimpleNamespace(lengths=[7] * len(rows[0]))

    plan = SimpleNamespace(micro_batches=lambda step, world: [[[step, step, step]]])
    coming, waits = Passes(plan, decode, 0, 1).steps(0, 5, 1, False), []
    for step in range(5):
        began = time.perf_counter()
        next(coming)
        waits.append(time.perf_counter() - began)
        time.sleep(0.0 if step else 0.6)
    assert max(waits[1:]) < 0.1 / 2
    assert 1 < loading_pace(Passes(plan, decode, 0, 1), 10, 1) <= 3 / 0.1


def test_the_reference_pads_a_few_samples_at_a_time():
    measured = Measured(*(np.full(20, 5, np.int32) for _ in range(3)), 0, {})
    plan = Padded(measured, Stage(batch_size=20))
    groups = plan.micro_batches(0, 2)
    assert [len(group) for group in groups] == [8, 8, 4, 0]
    assert [i for group in groups for row in group for i in row] == Plan(measured, Stage(batch_size=20)).samples(0)


def test_large_fresh_weights_repeat_what_was_drawn_and_small_ones_are_drawn(monkeypatch):
    monkeypatch.setattr(quick_draws, "BLOCK", 50)
    with quick_draws.quick_draws():
        large, small = torch.nn.Linear(10, 12), torch.nn.Linear(5, 10)
        torch.nn.init.normal_(large.weight, std=3.0)
    flat = large.weight.detach().view(-1)
    assert flat[:50].equal(flat[50:100]) and flat[:20].equal(flat[100:]) and 1.5 < float(flat.std()) < 6
    for again in (small, torch.nn.Linear(10, 12)):
        assert len(again.weight.detach().view(-1).unique()) == again.weight.numel()
