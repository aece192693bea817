"""Training on message trees is training on their questions as samples of their own."""

import json
from types import SimpleNamespace

import pytest
import transformers as tf
from test_loop import assert_same_weights, losses, run

from train import config as configuration
from train.errors import UsageError
from train.model.attention import NAME
from train.model.compose import Composed
from train.run.inspection import describe

STEADY = ("finetune.steps=3", "finetune.lora_dropout=0.0")


@pytest.fixture(scope="module")
def apart(world, tmp_path_factory):
    """The world's twenty records, and the same with each question as a record of its own."""
    records, alone = json.loads((world / "llava" / "data.json").read_text()), []
    for record in records:
        said = record["conversations"]
        for n in range(0, len(said), 2):
            mark = "<image>\n" if "image" in record and n else ""
            asked = {"from": "human", "value": mark + said[n]["value"]}
            alone.append({**record, "id": f"{record['id']}-{n}", "conversations": [asked, said[n + 1]]})
    path = tmp_path_factory.mktemp("apart") / "data.json"
    path.write_text(json.dumps(alone))
    return path, len(records), len(alone)


@pytest.mark.parametrize("more", [(), ("model.gradient_checkpointing=true",), ("finetune.micro_tokens=48",)])
def test_a_step_learns_what_the_questions_alone_teach(world, apart, tmp_path, caplog, more):
    path, records, questions = apart
    images = str(world / "llava" / "images")
    run(world, tmp_path / "alone", *STEADY, f"finetune.batch_size={questions}", data=path, images=images)
    with caplog.at_level("INFO", "train"):
        settings = (*STEADY, *more, f"finetune.batch_size={records}", "finetune.message_trees=short")
        told = run(world, tmp_path / "trees", *settings, data="llava/data.json", images=images)
    assert "20 samples (16 with an image, 16 message trees, 0 cut" in caplog.text
    assert told["request"]["stage"]["message_trees"] == "short"
    assert losses(tmp_path / "trees") == pytest.approx(losses(tmp_path / "alone"), abs=1e-4)
    assert_same_weights(tmp_path / "trees", tmp_path / "alone", atol=5e-4)
    run(world, tmp_path / "joined", *STEADY, f"finetune.batch_size={records}", data="llava/data.json", images=images)
    assert abs(losses(tmp_path / "joined")[-1] - losses(tmp_path / "alone")[-1]) > 1e-3, "and a conversation does not"
    tokens = [
        json.loads((tmp_path / name / "manifest.json").read_text())["result"]["tokens"] for name in ("trees", "alone")
    ]
    assert tokens[0] < 0.8 * tokens[1]


def test_inspection_shows_trunk_and_branches(world):
    options = configuration.load(str(world / "config.toml"), ["finetune.message_trees=all"])
    first, *_ = describe(options, "finetune", str(world / "mixed"), None, 1, False)
    _, trunk, *branches = first.splitlines()
    assert "image tokens>" in trunk and len(branches) == 2 and all(line.startswith("  ├ ") for line in branches)
    assert "what colour is it" in branches[0] and "how big is it" in branches[1]


def test_what_cannot_branch_says_so(world, tmp_path):
    with pytest.raises(UsageError, match="finetune.message_trees needs finetune.packing: padded rows"):
        configuration.load(None, ["finetune.message_trees=all", "finetune.packing=false"])
    with pytest.raises(
        UsageError, match='finetune.message_trees: only model.attention = "documents" supports branches'
    ):
        run(world, tmp_path / "run", "finetune.message_trees=all", "model.attention=sdpa")


def test_families_that_cannot_branch_are_named():
    def against(config, max_length=64, **more):
        lm = SimpleNamespace(config=config, **more)
        config._attn_implementation = NAME
        inside = SimpleNamespace(model=SimpleNamespace(language_model=lm))
        return Composed(inside, None, None, "", "", 0, can_pack=more.get("can_pack", True)).against_trees(max_length)

    assert against(tf.LlamaConfig()) == ""
    assert "llama carry a state along the row" in against(tf.LlamaConfig(), has_recurrent_layers=True)
    assert "llama cannot be packed" in against(tf.LlamaConfig(), can_pack=False)
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "original_max_position_embeddings": 32}
    long = {"rope_theta": 1e4, "rope_type": "longrope", **factors}
    sizes = {"max_position_embeddings": 128, "original_max_position_embeddings": 32, "pad_token_id": 0}
    phi = tf.Phi3Config(rope_parameters=long, **sizes)
    assert "of phi3 change at 32 tokens; --set model.max_length=32" in against(phi)
    assert against(phi, max_length=32) == ""
