"""model.compile = "layers": equal losses, one compilation of each kind of layer, and refusals in words."""

import shutil

import pytest
import torch
from test_loop import losses, run

from train import config as configuration
from train.errors import UsageError
from train.model import attention, regional

STEADY = ("finetune.lora_dropout=0.0", "finetune.micro_tokens=120")


@pytest.fixture(autouse=True)
def afresh():
    """Nothing compiled is left behind, in either direction."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    attention.register()


@pytest.fixture(scope="module")
def steady(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("steady") / "run"
    run(world, out, *STEADY)
    return out


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_compiled_layers_learn_the_same_and_are_compiled_once_a_kind(
    world, tmp_path, monkeypatch, steady, checkpointing
):
    """What torch traces is run as it is, which is quick; the next test compiles it."""
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(regional, "BACKEND", counted)
    compiled = (*STEADY, "model.compile=layers", f"model.gradient_checkpointing={checkpointing}")
    run(world, tmp_path / "run", *compiled)
    assert losses(tmp_path / "run") == pytest.approx(losses(steady), abs=1e-5)
    few = len(graphs)
    graphs.clear()
    run(world, tmp_path / "more", *compiled, "finetune.steps=3", "finetune.batch_size=11")
    assert len(graphs) <= few, "other rows, other documents: nothing is compiled for them"
    # A probe; a layer before and behind its attention, the last layer likewise; the blocks of the tower. To torch 2.9
    # the first layer, whose input is a view, is a kind of its own, before its attention and behind it.
    assert few <= (10 if torch.__version__.startswith("2.9.") else 8), few


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a processor")
def test_what_the_compiler_makes_learns_the_same(world, tmp_path, steady):
    run(world, tmp_path / "run", *STEADY, "model.compile=layers", "finetune.steps=1")
    assert losses(tmp_path / "run") == pytest.approx(losses(steady)[:1], abs=1e-4)


def test_what_cannot_be_compiled_is_refused_in_words(world, tmp_path, monkeypatch):
    for option in ("shard=true", "quantize=nf4"):
        with pytest.raises(UsageError, match=f"compile does not go with finetune.{option.split('=')[0]}"):
            configuration.load(None, ["model.compile=layers", "finetune.tune=lora", f"finetune.{option}"])

    def broken(graph, inputs):
        raise RuntimeError("no compiler is installed")

    monkeypatch.setattr(regional, "BACKEND", broken)
    with pytest.raises(UsageError, match=r"needs a C\+\+ compiler .* no compiler is installed.*compile=\"\""):
        run(world, tmp_path / "run", *STEADY, "model.compile=layers")
