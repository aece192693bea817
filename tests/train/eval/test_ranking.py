"""Texts ranked behind pictures: as one slow pass for each picture and text, and as `train eval` tells it."""

import json
import math

import numpy as np
import pytest
import torch
from toys import write_captions

from train import config as configuration
from train.data.sources import open_source
from train.errors import UsageError
from train.eval.evaluate import collect, evaluate
from train.eval.generate import load_speaker
from train.eval.ranking import TOGETHER, deal, information, likelihoods, pairs_of, places, prompt, rank, summary
from train.publish.export import export
from train.run.stage import run_stage


@pytest.fixture(scope="module")
def aligned(world, tmp_path_factory):
    """An exported align run that has learnt its captions."""
    out = tmp_path_factory.mktemp("ranking")
    settings = ["align.template=plain", "align.steps=12", "align.lr=1e-2"]
    options = configuration.load(str(world / "config.toml"), settings)
    run_stage("align", options, str(world / "captions"), out / "align")
    export(out / "align", out / "model", dtype="fp32")
    return out / "model"


def slow_likelihood(speaker, image, text):
    first, tokenizer = prompt(speaker, [image]), speaker.processor.tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    whole = {**first, "input_ids": torch.cat([first["input_ids"], torch.tensor([ids])], 1)}
    with torch.no_grad():
        told = speaker.model(**whole).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)
    return float(told[range(len(ids)), ids].mean())


def slow_ranks(speaker, pairs, candidates):
    """The three places and the information, of one pass for each picture and text, by loops."""
    found, nats = [], []
    for group, counted in deal(len(pairs), candidates):
        images, texts = [pairs[i][0] for i in group], [pairs[i][1] for i in group]
        lengths = [len(speaker.processor.tokenizer(text)["input_ids"]) + 1 for text in texts]
        mean = [[slow_likelihood(speaker, image, text) for text in texts] for image in images]
        whole = [[value * n for value, n in zip(row, lengths, strict=True)] for row in mean]
        for i in range(counted):
            gains = []
            for j in range(candidates):
                others = [math.exp(whole[k][j]) for k in range(candidates) if k != i]
                gains.append(whole[i][j] - math.log(sum(others) / len(others)))
            own = [whole[k][i] for k in range(candidates)]
            nats.append(own[i] - math.log(sum(map(math.exp, own)) / candidates))
            found.append([sum(x >= scores[i] - 1e-6 for x in scores) for scores in (mean[i], gains, own)])
    told = {"ranked": len(found), "information": sum(nats) / len(nats)}
    for kind, ranks in zip(("", "gain_", "picture_"), zip(*found, strict=True), strict=True):
        told[f"{kind}ranked_first"] = round(sum(place == 1 for place in ranks) / len(ranks), 4)
        told[f"{kind}mean_rank"] = round(sum(ranks) / len(ranks), 4)
    return told


def test_every_picture_is_counted_once_in_a_whole_group():
    for count, size in ((7, 3), (6, 3), (5, 5), (4, 3)):
        dealt = list(deal(count, size))
        assert all(len(set(group)) == size for group, _ in dealt)
        assert sorted(i for group, counted in dealt for i in group[:counted]) == list(range(count))


def test_a_common_text_wins_by_likelihood_and_not_by_gain():
    rng = np.random.default_rng(0)
    seen = rng.normal(0, 0.1, (6, 6)) + np.eye(6)  # each picture makes its own text likelier by one nat
    common = np.array([9, 0, 0, 0, 0, 0])  # and one text is likely behind any picture
    found = places(seen + common - 20, np.ones(6, int))
    assert (found[:, 0] == 1).sum() == 1 and (found[:, 1:] == 1).all()
    longer = places((seen + common - 20) / 4, np.full(6, 4))
    assert (longer == found).all()


def test_information_is_what_a_text_tells_of_its_picture():
    blind, sure = np.zeros((4, 4)) + [3, 1, 4, 1], np.zeros((4, 4)) + 50 * np.eye(4)
    assert information(blind) == pytest.approx(0) and information(sure) == pytest.approx(np.log(4))
    wrong = information(50 * np.roll(np.eye(4), 1, 0))
    assert wrong == pytest.approx(np.log(4) - 50)
    totals = np.random.default_rng(4).normal(0, 3, (5, 5))
    slow = [np.log(np.exp(totals[i, i]) / np.exp(totals[:, i]).mean()) for i in range(5)]
    assert information(totals) == pytest.approx(slow)
    assert information(totals + np.arange(5)) == pytest.approx(slow)  # how common a text is falls out


def test_likelihoods_are_those_of_one_pass_for_each_picture_and_text(world, aligned):
    speaker, source = load_speaker(aligned, torch.device("cpu")), open_source(str(world / "captions"), None)
    given = [pair for _, pair in pairs_of(source, collect(source)[0])]
    pairs = [(show(), text) for show, text in given]
    assert len({image.tobytes() for image, _ in pairs}) == len(pairs)
    texts = ["red", *(text for _, text in pairs[:4]), "red, and of a very long description", "a", "red", "b c d"]
    images = [image for image, _ in pairs[: TOGETHER + 2]]
    found = likelihoods(speaker, images, texts)
    slow = [[slow_likelihood(speaker, image, text) for text in texts] for image in images]
    np.testing.assert_allclose(found, slow, atol=1e-5)
    assert (found[:, 0] == found[:, texts.index("red", 1)]).all()
    ranked, slowly = summary(rank(lambda: speaker, given, 4)), slow_ranks(speaker, pairs, 4)
    assert ranked.pop("information") == pytest.approx(slowly.pop("information"), abs=1e-4)  # rounded to four places
    assert ranked == slowly
    alike = [(show, "one text") for show, _ in given[:5]]
    assert [found["rank"] for found in rank(lambda: speaker, alike, 5)] == [5] * 5  # ties lose
    with pytest.raises(UsageError, match="eval.candidates = 6: expected 2 to 5"):
        rank(lambda: speaker, alike, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU multiplies in the export's own precision")
@pytest.mark.parametrize(("has", "dtype"), [("", torch.float32), ("amx_tile", torch.bfloat16)])
def test_a_processor_answers_in_bf16_where_it_has_the_instructions(aligned, tmp_path, monkeypatch, has, dtype):
    export(aligned.parent / "align", tmp_path / "half", dtype="bf16")
    monkeypatch.setattr("train.eval.generate.bf16_instructions", lambda: has)
    assert load_speaker(tmp_path / "half").model.dtype == dtype
    assert load_speaker(aligned).model.dtype == torch.float32  # an export in fp32 stays what it is


def test_a_gpu_without_bf16_answers_in_fp32(aligned, tmp_path, monkeypatch):
    for dtype in ("bf16", "fp16"):
        export(aligned.parent / "align", tmp_path / dtype, dtype=dtype)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_, **__: module)
    for own in (True, False):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True, own=own: including_emulation or own
        )
        found = {name: load_speaker(tmp_path / name, torch.device("cuda")).model.dtype for name in ("bf16", "fp16")}
        assert found == {"bf16": torch.bfloat16 if own else torch.float32, "fp16": torch.float16}


def test_eval_tells_the_ranks_beside_the_answers(aligned, tmp_path):
    write_captions(tmp_path / "held", 8)
    options = configuration.load(None, ["eval.candidates=3", "eval.max_new_tokens=2"]).eval
    told = evaluate(aligned, str(tmp_path / "held"), tmp_path / "answers.jsonl", options=options)
    assert told["ranked"] <= 8 and {"ranked_first", "gain_mean_rank", "picture_mean_rank", "information"} <= told.keys()
    record = json.loads((tmp_path / "answers.manifest.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    ranked = [row for row in rows if "gain_rank" in row]  # the first question about each picture
    assert len(ranked) == told["ranked"] == len({row["pictures"][0] for row in rows})
    assert summary(ranked) == {name: told[name] for name in summary(ranked)}
    assert record["request"]["candidates"] == 3 and record["result"]["ranked_first"] == told["ranked_first"]
