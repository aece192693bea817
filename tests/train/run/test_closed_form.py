"""The projector in closed form: ridge regression by the book, two layers that hold it exactly, a run that starts so."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel

from train import config as configuration
from train.errors import UsageError
from train.run import closed_form
from train.run.closed_form import SHARES, bags, fit, place
from train.run.loop import Training
from train.run.stage import run_stage


def test_the_penalty_is_the_one_of_the_least_error_on_texts_left_out():
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    x = rng.normal(3, 1, (40, 7)) * [5, 4, 3, 2, 1, 0.5, 0.1]
    y = x @ rng.normal(0, 1, (7, 5)) + rng.normal(0, 4, (40, 5))
    top = np.linalg.svd(x - x.mean(0))[1][0] ** 2
    errors = []
    for share in SHARES:
        left = []
        for i in range(40):  # centred once, on all: the book's shortcut for a column of ones goes by leverage
            others = np.arange(40) != i
            left.append(y[i] - Ridge(alpha=share * top).fit(x[others], y[others]).predict(x[i : i + 1])[0])
        errors.append(np.mean(np.square(left)))
    best = Ridge(alpha=SHARES[int(np.argmin(errors))] * top).fit(x, y).coef_.T
    found, centre, kept = fit(torch.tensor(x), torch.tensor(y), norm=2.0)
    np.testing.assert_allclose(found / found.norm(), best / np.linalg.norm(best), atol=1e-9)
    assert float(((torch.tensor(x) - centre) @ found).norm(dim=1).mean()) == pytest.approx(2.0)
    assert kept == pytest.approx(1 - min(errors) / y.var(0).mean(), abs=0.02)


@pytest.mark.parametrize("hidden", [6, 8, 20])
def test_two_layers_hold_the_map_as_far_as_their_units_go(hidden):
    torch.manual_seed(0)
    first, second = nn.Linear(5, hidden), nn.Linear(hidden, 9)
    x, centre, offset = torch.randn(30, 5), torch.randn(5).double(), torch.randn(9).double()
    whole = torch.randn(5, 9).double()
    u, s, vt = torch.linalg.svd(whole, full_matrices=False)
    rank = min(5, hidden // 2)
    best = (u[:, :rank] * s[:rank]) @ vt[:rank]
    with torch.no_grad():
        place(first, second, whole, centre, offset)
        told = second(nn.functional.gelu(first(x)))
    torch.testing.assert_close(told, ((x.double() - centre) @ best + offset).float(), rtol=1e-4, atol=1e-4)


def test_rare_words_count_and_words_of_all_texts_do_not():
    words = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    y, norm = bags([[0, 1], [0, 2], [0, 2, 3, 3]], words)
    way = nn.functional.normalize(words.double() - words.double().mean(0), dim=1)
    torch.testing.assert_close(y[0], np.log(3) * way[1] / 2**0.5)
    torch.testing.assert_close(y[2], (np.log(1.5) * way[2] + 2 * np.log(3) * way[3]) / 2)
    assert norm == pytest.approx(float((words - words.mean(0))[:4].double().norm(dim=1).mean()))


def test_a_run_starts_from_words_and_goes_on_from_its_checkpoint(world, tmp_path, caplog, monkeypatch):
    def run(name, *settings):
        options = configuration.load(str(world / "config.toml"), ["align.steps=4", *settings])
        run_stage("align", options, str(world / "captions"), tmp_path / name)
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows], load_file(tmp_path / name / "projector.safetensors")

    caplog.set_level("INFO", "train")
    losses, weights = run("words", "align.start=words", "align.save_every=2")
    cached, same = run("cached", "align.start=words", "align.cache_features_mb=64")
    assert "the projector starts from the words of" in caplog.text
    assert cached == pytest.approx(losses, rel=1e-5)
    assert losses[0] != run("drawn")[0][0]
    for name, tensor in weights.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-4, atol=1e-5)
    step, caplog_from = Training._step, len(caplog.records)

    def stopped(self, number, *more):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Training, "_step", stopped)
        run("again", "align.start=words", "align.save_every=2")
    more = run("again", "align.start=words", "align.save_every=2")[1]
    assert all(torch.equal(more[name], tensor) for name, tensor in weights.items())
    said = [record.getMessage() for record in caplog.records[caplog_from:]]
    assert sum(line.startswith("the projector starts from the words") for line in said) == 1
    assert any(line.startswith("resuming from") for line in said)


def test_where_it_does_not_fit_it_says_so(world, tmp_path):
    with pytest.raises(UsageError, match=r"align\.start does not go with align\.shard"):
        configuration.load(None, ["align.start=words", "align.shard=true"])
    options = configuration.load(str(world / "config.toml"), ["finetune.start=words"])
    with pytest.raises(UsageError, match="the projector starts from only one of them"):
        run_stage("finetune", options, str(world / "mixed"), tmp_path / "out", align=tmp_path / "align")


@pytest.mark.parametrize("kind", ["llama", "gemma", "gemma3_text"])
def test_features_start_as_large_as_words_are_read(kind, monkeypatch):
    """Gemma's table multiplies by the square root of the width as it is read, and image features are not."""
    sizes = {"vocab_size": 200, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "head_dim": 32}
    lm = AutoModel.from_config(AutoConfig.for_model(kind, num_attention_heads=2, num_key_value_heads=1, **sizes))
    projector = nn.ModuleDict({"linear_1": nn.Linear(16, 128), "linear_2": nn.Linear(128, 64)})
    projector.linear_1, projector.linear_2 = projector["linear_1"], projector["linear_2"]
    inner = SimpleNamespace(language_model=lm, multi_modal_projector=projector)
    means, texts = torch.randn(60, 16), [torch.randint(3, 200, (6,)).tolist() for _ in range(60)]
    monkeypatch.setattr(closed_form, "_collect", lambda _: (means, texts))
    composed = SimpleNamespace(model=SimpleNamespace(model=inner), feature_scale=1.0)
    closed_form.start_from_words(
        SimpleNamespace(composed=composed, runtime=SimpleNamespace(first=lambda solve: solve()))
    )
    with torch.no_grad():
        read = lm.get_input_embeddings()(torch.arange(200))
        shown = projector.linear_2(nn.functional.gelu(projector.linear_1(means)))
    norms = [float((x - read.mean(0)).norm(dim=1).mean()) for x in (shown, read)]
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    another = (
        0.0,
        [torch.full_like(parameter, 7) for parameter in projector.parameters()],
    )  # as the first rank solved it
    closed_form.start_from_words(
        SimpleNamespace(composed=composed, runtime=SimpleNamespace(first=lambda solve: another))
    )
    assert all(bool((parameter == 7).all()) for parameter in projector.parameters())
