"""Every family at toy size: packed as alone, LoRA learns, the export loads with equal logits; or refused in words.

There is no third outcome. train/README.md has the table.
"""

from pathlib import Path

import pytest
import torch
import transformers as tf
from toys import word_tokenizer

from train.config import Model, Stage
from train.errors import UsageError
from train.model.compose import compose
from train.model.forward import hidden_states, token_losses, tower_features
from train.model.learn import prepare
from train.model.skip_unlabelled import skip_unlabelled
from train.publish.export import merge_trained, write_folder
from train.run.stage import make_encoder

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
    "falcon_h1": tf.FalconH1Config(**FEWER, **MAMBA, mamba_chunk_size=8, lm_head_multiplier=0.5),
}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8, "use_mamba_kernels": False}
UNPACKED = {"jamba": tf.JambaConfig(**FEWER, **JAMBA, num_experts=2)}
REFUSED = {
    "gemma2": tf.Gemma2Config(**HEADS),
    "gemma4_text": tf.Gemma4TextConfig(**HEADS, hidden_size_per_layer_input=8, vocab_size_per_layer_input=80),
    "nanochat": tf.NanoChatConfig(**FEWER),
    "vaultgemma": tf.VaultGemmaConfig(**HEADS),
    "cohere2": tf.Cohere2Config(**FEWER),
    "falcon": tf.FalconConfig(**EQUAL),
    "gpt2": tf.GPT2Config(vocab_size=80, n_embd=32, n_layer=2, n_head=4),
}
SEES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SEES |= {"image_size": 28, "patch_size": 14}
TOWERS = {
    "clip": tf.CLIPVisionConfig(**SEES),
    "siglip": tf.SiglipVisionConfig(**SEES),
    "dinov2": tf.Dinov2Config(**SEES),
}
NO_TOWERS = {
    "dinov2_with_registers": tf.Dinov2WithRegistersConfig(**SEES),
    "dinov3_vit": tf.DINOv3ViTConfig(**SEES),
    "siglip2_vision_model": tf.Siglip2VisionConfig(**{k: v for k, v in SEES.items() if k != "image_size"}),
}


@pytest.fixture
def options(tmp_path):
    """Write a language model of a configuration, all weights drawn, and a tower's; return what composes them."""

    def write(lm, tower):
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(lm)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / "lm")
        word_tokenizer().save_pretrained(tmp_path / "lm")
        tower.save_pretrained(tmp_path / "tower")
        return Model(tower=str(tmp_path / "tower"), tower_weights="fresh", lm=str(tmp_path / "lm"), template="qa")

    return write


def states(composed, texts, feats, packed):
    """The hidden states of documents, in one row or each by itself."""
    rows = [texts] if packed else [[text] for text in texts]
    out = []
    for row, picture in zip(rows, [feats] if packed else feats.split(1), strict=True):
        lengths = [len(text) for text in row]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        out.append(hidden_states(composed, torch.cat(row)[None], positions, picture, lengths if packed else ()))
    return torch.cat(out, 1)[0]


def learns_and_returns(options, folder):
    """Check all that is promised of a family; return whether it packs."""
    composed, stage = compose(options), Stage(tune="lora", lora_rank=2, lora_alpha=4, lora_dropout=0.0)
    side, image = composed.vision.image_size, [composed.image_id] * composed.vision.tokens_per_image
    pixels = torch.randint(0, 255, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    feats = tower_features(composed, pixels)
    texts = [torch.tensor([5, *image, *range(6, 13)]), torch.tensor([*image, 20, 21, 7, 30, 31])]
    with torch.no_grad():
        alone = states(composed, texts, feats, packed=False)
        if composed.can_pack:
            largest = float(alone.abs().max())
            torch.testing.assert_close(states(composed, texts, feats, packed=True), alone, rtol=0, atol=1e-5 * largest)

    trainable = prepare(composed, stage)
    skip_unlabelled(composed.model.model.language_model)
    optimizer = torch.optim.SGD(trainable.values(), lr=0.1)
    for _ in range(2):  # LoRA's first factor has no gradient before its second has moved
        optimizer.zero_grad()
        hidden = states(composed, texts, feats, packed=composed.can_pack)
        token_losses(composed.model, hidden[[8, 9, -2]], torch.tensor([9, 10, 31])).sum().backward()
        optimizer.step()
    moved = [name for name, p in trainable.items() if "lora_B" in name and p.grad is not None and p.grad.any()]
    assert moved and all(torch.isfinite(p).all() for p in trainable.values())

    again = compose(options)
    assert again.fingerprint == composed.fingerprint
    merge_trained(again.model, {name: p.detach() for name, p in trainable.items()}, 2.0)
    folder.mkdir()
    write_folder(again, make_encoder(again, options, stage), folder, torch.float32)
    native = tf.AutoModelForImageTextToText.from_pretrained(folder).eval()
    composed.model.eval()
    with torch.no_grad():
        ours = composed.model.lm_head(states(composed, texts, feats, packed=False))
        shown = {"pixel_values": ((pixels.float() / 255) - torch.tensor(composed.vision.mean).view(1, 3, 1, 1))}
        shown["pixel_values"] /= torch.tensor(composed.vision.std).view(1, 3, 1, 1)
        theirs = [
            native(input_ids=text[None], pixel_values=shown["pixel_values"][i : i + 1]).logits[0]
            for i, text in enumerate(texts)
        ]
    torch.testing.assert_close(torch.cat(theirs), ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
    return composed.can_pack


@pytest.mark.parametrize("family", PACKED)
def test_a_family_that_packs(family, options, tmp_path):
    assert learns_and_returns(options(PACKED[family], TOWERS["siglip"]), tmp_path / "out")


@pytest.mark.parametrize("family", UNPACKED)
def test_a_family_that_trains_without_packing(family, options, tmp_path):
    assert not learns_and_returns(options(UNPACKED[family], TOWERS["siglip"]), tmp_path / "out")


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_refused(family, options):
    with pytest.raises(UsageError, match="model.lm") as error:
        compose(options(REFUSED[family], TOWERS["siglip"]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_tower(tower, family, options, tmp_path):
    assert learns_and_returns(options(PACKED[family], TOWERS[tower]), tmp_path / "out")


@pytest.mark.parametrize("tower", NO_TOWERS)
def test_a_tower_that_is_refused(tower, options):
    with pytest.raises(UsageError, match=f"is a '{tower}'; expected"):
        compose(options(PACKED["llama"], NO_TOWERS[tower]))


def test_the_readme_lists_each_family_where_it_belongs():
    lines = [line.strip("| ").split(" | ") for line in README.read_text().splitlines() if line.startswith("| ")]
    rows = {line[0]: line[1] for line in lines if len(line) > 1}
    for title, families in (("packed", PACKED), ("unpacked", UNPACKED), ("refused", REFUSED)):
        listed = {word.strip(" `") for word in rows[title].split(",")}
        assert set(families) <= listed, title
    assert {word.strip(" `") for word in rows["towers refused"].split(",")} == set(NO_TOWERS)
