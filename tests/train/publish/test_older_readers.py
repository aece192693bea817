"""Exports as transformers 4 reads them: beside the new fields the plain ones, and in 4.57 itself the same logits.

TRANSFORMERS4 names the interpreter of an environment with transformers 4.57, for the test marked slow.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from toys import word_tokenizer

from train.config import Model, Stage
from train.model.compose import compose
from train.publish.export import write_folder
from train.publish.parts import write_parts
from train.run.stage import make_encoder

SIZES = {
    "vocab_size": 80,
    "hidden_size": 80,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "num_hidden_layers": 2, "num_key_value_heads": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
CONFIGS = {  # none of them with its family's default share and base
    "phi": tf.PhiConfig(**SIZES, rope_parameters={"rope_theta": 5e3, "partial_rotary_factor": 0.4}),
    "stablelm": tf.StableLmConfig(**SIZES, rope_parameters={"rope_theta": 5e3, "partial_rotary_factor": 0.5}),
    "phi3": tf.Phi3Config(**SIZES, rope_parameters={"rope_theta": 5e3}),
    "qwen2": tf.Qwen2Config(**SIZES, rope_parameters={"rope_theta": 1e6}),
    "llama": tf.LlamaConfig(**SIZES, max_position_embeddings=256, rope_parameters=LLAMA3),
    "granite": tf.GraniteConfig(**SIZES, logits_scaling=4.0),
    "gemma3": tf.Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, head_dim=8, sliding_window=4),
}
FEWER = {**SIZES, "hidden_size": 32, "num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 8}
HALF = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
NEW = {  # whose angles version 4 has no fields for, or whose experts version 5 keeps in one tensor
    "gemma4": tf.Gemma4TextConfig(**FEWER, hidden_size_per_layer_input=0, final_logit_softcapping=None),
    "lfm3": tf.Lfm3Config(**FEWER),
    "qwen3_moe": tf.Qwen3MoeConfig(**FEWER, **HALF, num_experts=4),
    "mixtral": tf.MixtralConfig(**FEWER, num_experts_per_tok=2, num_local_experts=4),
    "granitemoe": tf.GraniteMoeConfig(**FEWER, num_experts_per_tok=2, num_local_experts=4),
    "laguna": tf.LagunaConfig(**FEWER, **HALF, num_experts=4, shared_expert_intermediate_size=16),
}
LOAD = """
import sys, numpy, torch, transformers
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, out = sys.argv[1:]
model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
assert not info["missing_keys"] and all(key.endswith("lm_head.bias") for key in info["unexpected_keys"]), info
processor = AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what colour is it ?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True)
image = Image.linear_gradient("L").convert("RGB").crop((0, 0, 90, 60))
inputs = processor(images=image, text=text, return_tensors="pt")
with torch.no_grad():
    numpy.savez(out, ids=inputs["input_ids"], logits=model(**inputs).logits, version=transformers.__version__)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory, world):
    """Write a model of a family, not trained, as an export; return its folder."""
    root = tmp_path_factory.mktemp("older")

    def write(family):
        lm, folder = root / f"{family}-lm", root / family
        if not folder.exists():
            torch.manual_seed(0)
            model = tf.AutoModelForCausalLM.from_config((CONFIGS | NEW)[family])
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn(parameter.shape))
            model.save_pretrained(lm)
            word_tokenizer().save_pretrained(lm)
            names = {"tower": f"local-dir:{world / 'clip'}", "lm": str(lm), "template": "qa"}
            options = Model(**names, feature_strategy="full", image_token="<picture>")
            composed = compose(options)
            folder.mkdir()
            write_folder(composed, make_encoder(composed, options, Stage()), folder, torch.float32)
        return folder

    return write


def logits(python, folder, out):
    done = subprocess.run([python, "-c", LOAD, str(folder), str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return np.load(out)


def test_the_plain_fields_stand_beside_the_new_ones(exported):
    text = json.loads((exported("phi") / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["partial_rotary_factor"], text.get("rope_scaling")) == (5e3, 0.4, None)
    assert text["rope_parameters"] == {"rope_theta": 5e3, "partial_rotary_factor": 0.4, "rope_type": "default"}
    assert "_name_or_path" not in text
    text = json.loads((exported("llama") / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5e5
    assert text["rope_scaling"] == {key: value for key, value in LLAMA3.items() if key != "rope_theta"}
    text = json.loads((exported("gemma3") / "config.json").read_text())["text_config"]
    assert (text["rope_theta"], text["rope_local_base_freq"]) == (1e6, 1e4)
    words = json.loads((exported("phi") / "tokenizer_config.json").read_text())
    assert words["additional_special_tokens"] == ["<picture>"] and "extra_special_tokens" not in words
    images = json.loads((exported("phi") / "preprocessor_config.json").read_text())
    assert images == json.loads((exported("phi") / "processor_config.json").read_text())["image_processor"]


@pytest.mark.parametrize("family", NEW)
def test_the_language_models_weights_are_named_as_in_its_own_files(exported, family):
    folder = exported(family)
    inside = "language_model."
    ours = {
        n.removeprefix(inside): t for n, t in load_file(folder / "model.safetensors").items() if n.startswith(inside)
    }
    theirs = load_file(folder.with_name(f"{family}-lm") / "model.safetensors")
    assert set(ours) - {"lm_head.weight"} == set(theirs) - {"lm_head.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if "norm" not in name and "embed" not in name)
    _, found = tf.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]


@pytest.mark.parametrize("family", CONFIGS | NEW)
def test_a_config_with_both_is_read_as_one_with_the_new_fields(exported, family):
    again = tf.AutoConfig.from_pretrained(exported(family)).text_config
    assert again.rope_parameters == (CONFIGS | NEW)[family].rope_parameters
    tokenizer = tf.AutoTokenizer.from_pretrained(exported(family))
    assert "<picture>" in tokenizer.all_special_tokens and 47 in tokenizer("a <picture>")["input_ids"]


def test_phi_carries_the_bias_that_vllm_adds(exported, tmp_path):
    """By vLLM's weight map: PhiForCausalLM has `lm_head.bias`, LlavaForConditionalGeneration reads `language_model.`"""
    bias = load_file(exported("phi") / "model.safetensors")["language_model.lm_head.bias"]
    assert bias.shape == (80,) and not bias.any()
    assert "language_model.lm_head.bias" not in load_file(exported("llama") / "model.safetensors")
    model = tf.AutoModelForImageTextToText.from_pretrained(exported("phi"))
    processor = tf.AutoProcessor.from_pretrained(exported("phi"))
    write_parts(model, processor.tokenizer, processor.image_processor, tmp_path / "parts", torch.float32)
    config = json.loads((tmp_path / "parts" / "language_model" / "config.json").read_text())
    assert (config["rope_theta"], config["partial_rotary_factor"]) == (5e3, 0.4)


# How vLLM names what it loads: the prefixes that its LlavaForConditionalGeneration renames,
# read off vllm/model_executor/models (llava, phi, llama, qwen2, clip) of 0.11.0 and
# 0.33.0. Each part then goes to the class of its own name, whose weights are called as in transformers 4's.
VLLM_PREFIXES = {"model.language_model.": "language_model.model.", "model.vision_tower.": "vision_tower."}
VLLM_PREFIXES |= {"model.multi_modal_projector.": "multi_modal_projector.", "lm_head.": "language_model.lm_head."}


@pytest.mark.parametrize("family", CONFIGS)
def test_vllm_finds_a_place_for_each_tensor_and_a_tensor_for_each_place(exported, family):
    names = set(load_file(exported(family) / "model.safetensors"))
    renamed = {
        next((new + n.removeprefix(old) for old, new in VLLM_PREFIXES.items() if n.startswith(old)), n) for n in names
    }
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[family])
    places = {f"language_model.{name}" for name in model.state_dict()}
    places -= {"language_model.lm_head.weight"} if model.config.tie_word_embeddings else set()
    places |= {f"multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
    tower = tf.CLIPVisionModel(tf.AutoConfig.from_pretrained(exported(family)).vision_config)
    places |= {f"vision_tower.vision_model.{name.removeprefix('vision_model.')}" for name in tower.state_dict()}
    assert renamed == {name for name in places if not name.endswith("position_ids")}
    # 0.11's PhiForCausalLM has a bias in its head and fills it with nothing; 0.33 registers one where a file has one.
    assert ("language_model.lm_head.bias" in renamed) == (family == "phi")


def test_an_export_names_no_place_of_this_machine(exported):
    folder = exported("phi")
    for file in folder.glob("*.json"):
        assert str(folder.parent) not in file.read_text() and "/tmp" not in file.read_text(), file.name


@pytest.mark.slow
@pytest.mark.skipif("TRANSFORMERS4" not in os.environ, reason="TRANSFORMERS4 names no interpreter")
@pytest.mark.parametrize("family", CONFIGS)
def test_transformers_4_gives_equal_ids_and_logits(exported, family, tmp_path):
    new = logits(sys.executable, exported(family), tmp_path / "new.npz")
    old = logits(os.environ["TRANSFORMERS4"], exported(family), tmp_path / "old.npz")
    assert str(old["version"]).startswith("4.57") and (old["ids"] == new["ids"]).all()
    np.testing.assert_allclose(old["logits"], new["logits"], rtol=0, atol=1e-5 * np.abs(new["logits"]).max())
