"""What composing finds out by itself: other logits than the language model's own, and documents that see each other."""

import pytest
import torch
import transformers as tf
from test_attention import FEWER, enlarge
from test_recurrent import HYBRIDS
from toys import word_tokenizer

from train.config import Model
from train.errors import UsageError
from train.model import verify
from train.model.compose import compose

FALCON = {"lm_head_multiplier": 0.5, "embedding_multiplier": 3.0}


@pytest.fixture
def written(tmp_path, world):
    """Write a language model of a configuration, all its weights drawn; return the options that compose it."""

    def write(config):
        torch.manual_seed(0)
        lm = tf.AutoModelForCausalLM.from_config(config)
        enlarge(lm)
        lm.save_pretrained(tmp_path / "lm")
        word_tokenizer().save_pretrained(tmp_path / "lm")
        return Model(tower=f"local-dir:{world / 'clip'}", lm=str(tmp_path / "lm"), feature_strategy="full"), lm.eval()

    return write


@pytest.mark.parametrize("tied", [False, True])
def test_falcons_multipliers_are_kept(written, tied):
    values = {**HYBRIDS["falcon_h1"].to_dict(), **FALCON, "vocab_size": 80, "tie_word_embeddings": tied}
    options, lm = written(tf.FalconH1Config(**values))
    composed = compose(options)
    ids = torch.randint(4, 70, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = lm(input_ids=ids).logits
        torch.testing.assert_close(composed.model(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-5)
    assert composed.can_pack and composed.model.config.text_config.lm_head_multiplier == 1.0


def test_other_logits_are_refused_with_their_difference(written, monkeypatch):
    options, _ = written(tf.GraniteConfig(**{**FEWER, "vocab_size": 80}, logits_scaling=4.0))
    assert compose(options).can_pack
    monkeypatch.setattr("train.model.compose.fold_scales", lambda lm: None)
    with pytest.raises(UsageError, match=r"\(granite\): .* logits differ from its own by 3 of their size"):
        compose(options)


def test_a_family_whose_documents_cannot_be_isolated_trains_unpacked(written, caplog):
    mixed = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}
    config = tf.JambaConfig(**{**FEWER, "vocab_size": 80}, **mixed, num_experts=2)
    assert not compose(written(config)[0]).can_pack
    assert any("jamba: documents in a row would see each other" in message for message in caplog.messages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_comparison_draws_nothing(written, dtype, caplog, monkeypatch):
    def drawing_nothing(function):
        def wrapped(*given):
            before = torch.get_rng_state()
            out = function(*given)
            assert torch.equal(torch.get_rng_state(), before)
            ran.append(function.__name__)
            return out

        return wrapped

    ran = []
    for function in (verify.reference, verify.packs):
        monkeypatch.setattr(f"train.model.compose.{function.__name__}", drawing_nothing(function))
    sizes = {**FEWER, "vocab_size": 80, "attention_dropout": 0.5}
    options, _ = written(tf.Qwen3MoeConfig(**sizes, head_dim=8, num_experts=4, num_experts_per_tok=2))
    assert compose(options, dtype).can_pack and ran == ["reference", "packs"] and not caplog.messages


def test_a_class_that_cannot_answer_is_refused(written):
    """MiniMax keeps its state in a cache of its own; Moshi's class keeps a usual one wrong."""
    sizes = {**FEWER, "vocab_size": 80}
    options, _ = written(tf.MiniMaxConfig(**sizes, head_dim=8, block_size=4, num_local_experts=4))
    with pytest.raises(UsageError, match=r"does not fit .*MiniMax uses cache of its own"):
        compose(options)
    options, _ = written(tf.MoshiConfig(**sizes, head_dim=8, ffn_dim=48, sliding_window=4))
    with pytest.raises(UsageError, match=r"\(moshi\): generating token by token, .* differ by 0"):
        compose(options)
