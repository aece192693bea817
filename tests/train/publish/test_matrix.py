"""Every family at toy size: packed as alone, LoRA learns, the export loads with equal logits; or refused in words.

There is no third outcome. train/README.md has the table.
"""

from pathlib import Path

import pytest
import transformers as tf
from promises import learns_and_returns, write_lm

from train.config import Model
from train.errors import UsageError
from train.model.compose import compose

README = Path(__file__).parents[3] / "train" / "README.md"
EQUAL = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
EQUAL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FEWER = {**EQUAL, "num_key_value_heads": 2}
HEADS = {**FEWER, "head_dim": 8}
WINDOW = {"sliding_window": 4}  # shorter than the documents
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
FOUR = {"num_hidden_layers": 4}
MIXED = {**FOUR, "layer_types": ["conv", "full_attention"] * 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
PACKED = {
    "qwen2": tf.Qwen2Config(**FEWER),
    "qwen3": tf.Qwen3Config(**HEADS),
    "qwen3_moe": tf.Qwen3MoeConfig(**HEADS, **EXPERTS),
    "qwen3_5_text": tf.Qwen3_5TextConfig(**{**HEADS, **FOUR}, **LINEAR),
    "gemma": tf.GemmaConfig(**HEADS),
    "gemma3_text": tf.Gemma3TextConfig(**{**HEADS, "num_hidden_layers": 6}, **WINDOW),
    "llama": tf.LlamaConfig(**FEWER),
    "smollm3": tf.SmolLM3Config(**FEWER),
    "phi": tf.PhiConfig(**EQUAL),
    "phi3": tf.Phi3Config(**FEWER, **WINDOW),
    "phimoe": tf.PhimoeConfig(**FEWER, num_local_experts=4, num_experts_per_tok=2),
    "stablelm": tf.StableLmConfig(**FEWER),
    "olmo2": tf.Olmo2Config(**FEWER),
    "olmo3": tf.Olmo3Config(**{**FEWER, **FOUR}, **WINDOW),
    "granite": tf.GraniteConfig(**FEWER, logits_scaling=4.0),
    "minicpm3": tf.MiniCPM3Config(**EQUAL, **LATENT, dim_model_base=8),
    "mistral": tf.MistralConfig(**FEWER, **WINDOW),
    "ministral": tf.MinistralConfig(**HEADS, **WINDOW),
    "glm4": tf.Glm4Config(**HEADS),
    "exaone4": tf.Exaone4Config(**{**FEWER, **FOUR}, **WINDOW),
    "hunyuan_v1_dense": tf.HunYuanDenseV1Config(**HEADS),
    "ernie4_5": tf.Ernie4_5Config(**HEADS),
    "seed_oss": tf.SeedOssConfig(**HEADS),
    "gpt_oss": tf.GptOssConfig(**HEADS, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
    "lfm2": tf.Lfm2Config(**{**FEWER, **MIXED}),
    "cwm": tf.CwmConfig(**{**FEWER, **FOUR}, **WINDOW),  # whose bos must be a number
    "falcon_h1": tf.FalconH1Config(**FEWER, **MAMBA, mamba_chunk_size=8, lm_head_multiplier=0.5),
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}
UNPACKED = {"jamba": tf.JambaConfig(**FEWER, **JAMBA, num_experts=2)}
STATES = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8}
REFUSED = {
    "gemma2": tf.Gemma2Config(**HEADS),
    "gemma4_text": tf.Gemma4TextConfig(**HEADS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=80),
    "llama4_text": tf.Llama4TextConfig(**HEADS, intermediate_size_mlp=48, num_local_experts=2),
    "nanochat": tf.NanoChatConfig(**FEWER),
    "vaultgemma": tf.VaultGemmaConfig(**HEADS),
    "cohere2": tf.Cohere2Config(**FEWER),
    "falcon": tf.FalconConfig(**EQUAL),
    "mamba2": tf.Mamba2Config(**STATES),
    "minimax": tf.MiniMaxConfig(**HEADS, block_size=4, num_local_experts=4),
    "gpt2": tf.GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4),
}
SIGLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SIGLIP |= {"image_size": 28, "patch_size": 14}


@pytest.fixture
def options(tmp_path):
    """Write a language model of a configuration, all weights drawn, and a SigLIP; return what composes them."""

    def write(lm):
        write_lm(lm, tmp_path / "lm")
        tf.SiglipVisionConfig(**SIGLIP).save_pretrained(tmp_path / "tower")
        return Model(tower=str(tmp_path / "tower"), tower_weights="fresh", lm=str(tmp_path / "lm"), template="qa")

    return write


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs(family, options, tmp_path):
    assert learns_and_returns(options(PACKED[family]), tmp_path / "out")


@pytest.mark.parametrize("family", UNPACKED)
def test_a_family_that_trains_without_packing(family, options, tmp_path):
    assert not learns_and_returns(options(UNPACKED[family]), tmp_path / "out")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_refused(family, options):
    with pytest.raises(UsageError, match="model.lm") as error:
        compose(options(REFUSED[family]))
    assert "\n" not in str(error.value) and "--set model.attention" not in str(error.value), "none helps"


def test_the_readme_lists_each_family_where_it_belongs():
    lines = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")]
    rows = {line[0]: line[1] for line in lines if len(line) > 1}
    for title, families in (("packed", PACKED), ("unpacked", UNPACKED), ("refused", REFUSED)):
        listed = {word.strip(" `") for word in rows[title].split(",")}
        assert set(families) <= listed, title
