"""Language models inside of other models, families that do not fit, and the rows of a new token."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from test_attention import FEWER, SMALL, enlarge
from test_recurrent import HYBRIDS
from toys import word_tokenizer

from train.config import Model, Stage
from train.errors import UsageError
from train.model.compose import blueprint, compose
from train.model.language import load_lm, load_tokenizer
from train.model.learn import prepare
from train.model.native import load_native
from train.publish.export import write_folder
from train.run.stage import make_encoder

TEXT = {**FEWER, "vocab_size": 80}
SEES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
QWEN_SEES = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
GEMMA4 = {**TEXT, "head_dim": 8, "hidden_size_per_layer_input": 0}
COMPOSITES = {
    "gemma3": tf.Gemma3Config(
        text_config={**TEXT, "head_dim": 8}, vision_config={**SEES, "image_size": 28, "patch_size": 14}
    ),
    "gemma4": tf.Gemma4Config(text_config=GEMMA4, vision_config={**SEES, "num_key_value_heads": 2, "head_dim": 8}),
    "mistral3": tf.Mistral3Config(text_config=tf.MistralConfig(**TEXT), vision_config=tf.PixtralVisionConfig(**SEES)),
    "qwen2_audio": tf.Qwen2AudioConfig(
        text_config=tf.Qwen2Config(**TEXT),
        audio_config={"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32},
    ),
    "qwen3_5": tf.Qwen3_5Config(
        text_config={**HYBRIDS["qwen3_5"].to_dict(), "vocab_size": 80}, vision_config=QWEN_SEES
    ),
}


@pytest.fixture
def saved(tmp_path, world):
    """Save a model, all its weights drawn, with a tokenizer; return the options that compose it."""

    def save(model, **more):
        enlarge(model)
        model.save_pretrained(tmp_path / "lm")
        word_tokenizer().save_pretrained(tmp_path / "lm")
        return Model(tower=f"local-dir:{world / 'clip'}", lm=str(tmp_path / "lm"), feature_strategy="full", **more)

    return save


@pytest.mark.parametrize("family", COMPOSITES)
def test_the_language_model_is_taken_out_of_a_composite(saved, family):
    torch.manual_seed(0)
    whole = tf.AutoModelForMultimodalLM.from_config(COMPOSITES[family]).eval()
    options = saved(whole)
    composed = compose(options)
    ids = torch.randint(4, 70, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = whole(input_ids=ids).logits
        torch.testing.assert_close(composed.model(input_ids=ids).logits, theirs, rtol=1e-4, atol=1e-4)
    text = composed.model.config.text_config
    assert composed.can_pack and text.architectures[0].endswith("ForCausalLM")
    assert blueprint(options)[0].config.text_config.model_type == text.model_type


def test_lora_finds_layers_in_lists_and_no_others(saved):
    """Zamba 2 numbers small linear layers in its own way; where layers share weights there is no LoRA for each."""
    mamba = {"mamba_d_state": 8, "mamba_ngroups": 1, "mamba_headdim": 16, "n_mamba_heads": 4, "chunk_size": 8}
    kinds = ["mamba", "hybrid", "mamba", "hybrid"]
    sizes = {**TEXT, "num_hidden_layers": 4, "attention_head_dim": 16, "attention_hidden_size": 64}
    config = tf.Zamba2Config(**sizes, **mamba, layers_block_type=kinds, hybrid_layer_ids=[1, 3], num_mem_blocks=1)
    options = saved(tf.Zamba2ForCausalLM(config))
    with pytest.raises(UsageError, match="zamba2 share their weights, .* take tune ="):
        prepare(compose(options), Stage(tune="lora"))
    assert prepare(compose(options), Stage(tune="full"))
    composed = compose(options)
    composed.model.model.language_model.layers = composed.model.model.language_model.layers[:2]
    assert any("gate_up_proj_adapter_list.0.1.lora_A" in name for name in prepare(composed, Stage(tune="lora")))


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_language_model_whose_files_lack_weights_is_refused(saved, family, tmp_path):
    kind = tf.AutoModelForCausalLM if family == "llama" else tf.AutoModelForImageTextToText
    options = saved(kind.from_config(tf.LlamaConfig(**TEXT) if family == "llama" else COMPOSITES[family]))
    file = tmp_path / "lm" / "model.safetensors"
    state = {name: tensor for name, tensor in load_file(file).items() if "layers.1.mlp.up_proj" not in name}
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"its files lack 1 weights, among them .*layers\.1\.mlp\.up_proj"):
        compose(options)


def test_a_head_of_its_own_stays_whatever_the_configuration_says(saved, tmp_path):
    """transformers 5 ties no head that the files hold with other values: what is learnt with it must be exported."""
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, tie_word_embeddings=True)))
    file = tmp_path / "lm" / "model.safetensors"
    head = torch.randn(80, 32, generator=torch.Generator().manual_seed(1))
    save_file({**load_file(file), "lm_head.weight": head}, file, metadata={"format": "pt"})
    composed = compose(options)
    torch.testing.assert_close(composed.model.lm_head.weight, head)
    (tmp_path / "out").mkdir()
    write_folder(composed, make_encoder(composed, options, Stage()), tmp_path / "out", torch.float32)
    torch.testing.assert_close(load_native(tmp_path / "out", torch.float32)[0].lm_head.weight, head)


def test_files_with_more_than_the_configuration_has(saved, tmp_path, caplog):
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    file = tmp_path / "lm" / "model.safetensors"
    state = load_file(file)
    caplog.set_level("INFO", "train")
    save_file({**state, "v_head.summary.weight": torch.ones(1, 32)}, file, metadata={"format": "pt"})
    compose(options)
    assert any("left out" in line and "v_head.summary.weight" in line for line in caplog.messages)
    save_file({**state, "model.layers.0.self_attn.q_proj.bias": torch.ones(32)}, file, metadata={"format": "pt"})
    with pytest.raises(
        UsageError, match=r"hold model\.layers\.0\.self_attn\.q_proj\.bias, for which its config.json has no place"
    ):
        compose(options)
    (tmp_path / "lm" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="holds a LoRA adapter; merge it"):
        compose(options)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"weight_map": {', "is not a complete index"),
        ("{}", "is not a complete index"),
        ('{"weight_map": null}', "is not a complete index"),
        ('{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}', "names model-00002-of-00002"),
    ],
)
def test_a_broken_index_of_shards_is_named(saved, tmp_path, text, said):
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    (tmp_path / "lm" / "model.safetensors").rename(tmp_path / "lm" / "model-00001-of-00002.safetensors")
    (tmp_path / "lm" / "model.safetensors.index.json").write_text(text)
    with pytest.raises(
        UsageError, match=rf"cannot be loaded \(model\.safetensors\.index\.json {said}.*model\.lm=FOLDER"
    ):
        compose(options)


@pytest.mark.parametrize("method", ["bitsandbytes", "awq", "gptq", "no such"])
def test_weights_of_few_bits_that_nothing_can_be_merged_into_are_refused(saved, tmp_path, method):
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    rewrite(tmp_path / "lm", quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UsageError, match=rf"is quantised \({method}\).* name the model that it was made from"):
        compose(options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_eight_bits_are_made_whole(saved, tmp_path, dtype):
    pytest.importorskip("accelerate")
    plain = tf.Qwen3ForCausalLM(tf.Qwen3Config(**TEXT, head_dim=8))
    options = saved(plain)
    file = tmp_path / "lm" / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if "_proj" in name]:
        scale = state[name].abs().max() / 448
        state[name], state[f"{name}_scale_inv"] = (state[name] / scale).to(torch.float8_e4m3fn), scale.view(1, 1)
    save_file(state, file, metadata={"format": "pt"})
    how = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    rewrite(tmp_path / "lm", quantization_config=how)
    lm = load_lm(options, load_tokenizer(options), dtype)
    assert {p.dtype for p in lm.parameters()} == {dtype} and not hasattr(lm.config, "quantization_config")
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(lm.get_parameter(name).float(), weight, rtol=0.07, atol=0.02)


def rewrite(folder, **values):
    """Change values of a folder's config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("model.safetensors", lambda data: POINTER, r"model\.safetensors is a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", lambda data: POINTER, r"tokenizer\.json is a Git LFS pointer"),
        ("model.safetensors", lambda data: data[: len(data) // 2], r"model\.safetensors is not a complete safetensors"),
        ("model.safetensors", lambda data: b"", r"model\.safetensors is not a complete safetensors file"),
        ("model.safetensors", lambda data: (1 << 62).to_bytes(8, "little") + data[8:], "header too large"),
        (
            "model.safetensors",
            lambda data: data.replace(b"[48,32]", b"[32,48]"),
            r"is \[32, 48\] in its files but \[48",
        ),
        (
            "tokenizer.json",
            lambda data: data.replace(b'"WordLevel"', b'"Other"'),
            r"model\.tokenizer .* cannot be loaded",
        ),
        ("tokenizer_config.json", lambda data: b"[]", r"model\.tokenizer .* cannot be loaded"),
        ("config.json", lambda data: b"null", "cannot be loaded"),
        ("config.json", lambda data: data.replace(b": 32,", b': "wide",'), "expected int, got str"),
    ],
)
def test_files_that_are_not_as_they_should_be_are_refused_in_one_line(saved, tmp_path, name, change, told):
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    file = tmp_path / "lm" / name
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(UsageError, match=told) as error:
        compose(options)
    assert "\n" not in str(error.value) and "give another folder" in str(error.value)


def test_a_pickle_of_more_than_tensors_is_refused_without_advice_to_run_it(saved, tmp_path):
    options = saved(tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT)))
    state = load_file(tmp_path / "lm" / "model.safetensors")
    (tmp_path / "lm" / "model.safetensors").unlink()
    torch.save({**state, "more": print}, tmp_path / "lm" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="hold more than a table of tensors") as error:
        compose(options)
    assert "weights_only" not in str(error.value)


def test_minicpm3_divides_its_logits(saved):
    heads = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8}
    config = tf.MiniCPM3Config(**SMALL, **heads, qk_rope_head_dim=8, v_head_dim=8, dim_model_base=8)
    torch.manual_seed(0)
    lm = tf.AutoModelForCausalLM.from_config(config).eval()
    composed = compose(saved(lm))
    ids = torch.randint(4, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(composed.model(input_ids=ids).logits, lm(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (tf.GPT2Config(vocab_size=80, n_embd=32, n_layer=1, n_head=4), "does not fit into the llava class"),
        (tf.FalconConfig(**{**SMALL, "vocab_size": 80}), "does not fit into the llava class"),
        (
            tf.Gemma4TextConfig(**{**GEMMA4, "hidden_size_per_layer_input": 8}),
            "second embedding of tokens in each layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(saved, config, word):
    options = saved(tf.AutoModelForCausalLM.from_config(config))
    with pytest.raises(UsageError, match=word) as error:
        compose(options)
    assert "\n" not in str(error.value)


def test_what_is_no_language_model_is_refused(world):
    with pytest.raises(UsageError, match="is a 'clip_vision_model', which has no causal language model"):
        tf.CLIPVisionConfig(**SEES).save_pretrained(world / "sees")
        compose(Model(tower=f"local-dir:{world / 'clip'}", lm=str(world / "sees"), tokenizer=str(world / "lm")))


@pytest.mark.parametrize("tied", [False, True])
def test_new_rows_are_the_mean_of_the_others(saved, tied):
    rows = len(word_tokenizer())
    lm = tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": rows, "tie_word_embeddings": tied}))
    composed = compose(saved(lm, image_token="<picture>"))
    tables = {"model.language_model.embed_tokens.weight": lm.get_input_embeddings().weight}
    tables["lm_head.weight"] = lm.get_output_embeddings().weight
    state = composed.model.state_dict()
    assert composed.image_id == rows
    for name, before in tables.items():
        new = state[name][rows:]
        assert len(new)
        mean = before.detach().bfloat16().float().mean(0)
        torch.testing.assert_close(new, mean.expand_as(new), rtol=1e-4, atol=1e-6)


def test_a_tokenizer_of_a_larger_model_is_refused(saved):
    rows = len(word_tokenizer()) - 3
    with pytest.raises(
        UsageError, match=f"has 3 tokens beyond the {rows} rows .* name the right one with model.tokenizer"
    ):
        compose(saved(tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": rows}))))
