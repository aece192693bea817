"""Released checkpoints, imitated from shrunk models under the authors' names and shapes."""

import json
import math
import pickle

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from toys import word_tokenizer

from train.__main__ import app
from train.config import Model
from train.errors import CheckpointError, UsageError
from train.model.compose import compose
from train.model.forward import normalise
from train.model.published import CONFIGS
from train.publish.released import checkpoint_files, load_released, our_name

TOWER, PROJECTOR, LM = "model.vision_tower.", "model.multi_modal_projector.", "model.language_model."
AUTHORS = {TOWER: "model.vision_tower.vision_tower.vision_model.", LM: "model."}
NATIVE = {TOWER: "vision_tower.vision_model.", PROJECTOR: "multi_modal_projector.", LM: "language_model.model."}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    word_tokenizer().save_pretrained(root / "tokenizer")
    vocabulary = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name, config in {
        "clip": tf.CLIPVisionConfig(image_size=224, patch_size=14),
        "siglip": tf.SiglipVisionConfig(image_size=224, patch_size=14),
        "dinov2": tf.Dinov2Config(image_size=224, patch_size=14),
        "phi": tf.PhiConfig(**vocabulary),
        "stablelm": tf.StableLmConfig(**vocabulary),
        "phi3": tf.Phi3Config(**vocabulary),
        "llama": tf.LlamaConfig(**vocabulary),
        "gemma": tf.GemmaConfig(**vocabulary),
        "small": tf.SiglipVisionConfig(image_size=28, patch_size=14, **small),
        "small_phi": tf.PhiConfig(**vocabulary, **small),
    }.items():
        config.save_pretrained(root / name)
    (root / "minicpm").mkdir()
    facts = (CONFIGS / "openbmb--MiniCPM-2B-history" / "config.json").read_text()
    (root / "minicpm" / "config.json").write_text(json.dumps({**json.loads(facts), "vocab_size": 300}))
    return root


def model_options(hub, tower, lm, seed=0, **more):
    tower_id = tower if "/" in tower else str(hub / tower)
    names = {"tower": tower_id, "lm": str(hub / lm), "tokenizer": str(hub / "tokenizer")}
    if tower == "small":  # small as it is, with as many keys as queries
        return Model(**names, tower_weights="fresh", lm_weights="fresh", seed=seed)
    return Model(**names, shrink="tiny", seed=seed, **more)


def trained(hub, tower, lm, **more):
    """A model whose weights all differ from what `compose` draws, norms and biases too."""
    composed = compose(model_options(hub, tower, lm, seed=7, **more))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in composed.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return composed


def released(composed, names=AUTHORS):
    """Its tensors under other names."""
    state = {}
    for name, tensor in composed.model.state_dict().items():
        for ours, theirs in {**names, f"{PROJECTOR}linear_1": "model.mm_projector.0"}.items():
            if names is NATIVE and "mm_projector" in theirs:
                continue
            if name.startswith(ours):
                name = theirs + name.removeprefix(ours)
                break
        name = name.replace(f"{PROJECTOR}linear_2", "model.mm_projector.2")
        if names is NATIVE:
            name = "language_model." + name if name.startswith("lm_head") else name
        state[name] = tensor.clone().contiguous()
    return state


def write(state, folder, **config):
    folder.mkdir()
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return checkpoint_files(folder)


def question(composed):
    size = composed.vision.image_size
    pixels = torch.randint(0, 255, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[composed.image_id] * composed.vision.tokens_per_image, 6, 7]])
    return ids, normalise(pixels, composed.vision, torch.float32)


def logits(composed):
    ids, pixels = question(composed)
    with torch.no_grad():
        return composed.model(input_ids=ids, pixel_values=pixels).logits


def imported(hub, tower, lm, files, **more):
    composed = compose(model_options(hub, tower, lm, scales=more.pop("scales", 1)))
    load_released(composed, files, **{"keep_tower": False, **more})
    return composed


@pytest.mark.parametrize(
    ("tower", "lm"), [("siglip", "phi"), ("siglip", "stablelm"), ("siglip", "phi3"), ("clip", "llama")]
)
def test_a_mapped_checkpoint_gives_equal_logits(hub, tmp_path, tower, lm):
    before = trained(hub, tower, lm)
    state = released(before)
    assert f"model.{'final_layernorm' if lm == 'phi' else 'norm'}.weight" in state
    assert ("model.layers.0.self_attn.qkv_proj.weight" in state) == (lm == "phi3")
    after = imported(hub, tower, lm, write(state, tmp_path / "released"))
    assert torch.equal(logits(after), logits(before))


EVA = "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"


def eva_names(state):
    """Bunny's names for EVA02-CLIP: below its own prefix those of the authors, with what a tower does not need."""
    out = {}
    words = {"encoder.layers.": "blocks.", ".layer_norm": ".norm", ".self_attn.": ".attn.", "out_proj": "proj"}
    words |= {"q_proj.bias": "q_bias", "v_proj.bias": "v_bias", "attn.norm.": "attn.inner_attn_ln."}
    words |= {"mlp.gate": "mlp.w1", "mlp.fc1": "mlp.w2", "mlp.norm.": "mlp.ffn_ln.", "mlp.fc2": "mlp.w3"}
    words |= {"embeddings.patch_embedding": "patch_embed.proj", "embeddings.class_embedding": "cls_token"}
    words |= {"embeddings.position_embedding": "pos_embed", "post_layernorm": "norm"}
    for name, tensor in state.items():
        prefix, found, below = name.partition(AUTHORS[TOWER])
        for ours, theirs in words.items() if found else ():
            below = below.replace(ours, theirs)
        out[f"model.vision_tower.vision_tower.model.{below}" if found else prefix] = tensor
    extra = ("head.weight", "rope.freqs_cos", "blocks.0.attn.rope.freqs_sin")
    return out | {f"model.vision_tower.vision_tower.model.{name}": torch.ones(2) for name in extra}


def test_bunnys_eva_gives_equal_logits(hub, tmp_path):
    before = trained(hub, EVA, "stablelm")
    state = eva_names(released(before))
    assert {f"model.vision_tower.vision_tower.model.blocks.1.{n}" for n in ("mlp.w3.bias", "attn.q_bias")} <= set(state)
    after = imported(hub, EVA, "stablelm", write(state, tmp_path / "released"))
    assert torch.equal(logits(after), logits(before))


@pytest.mark.parametrize("lm", ["phi3", "llama"])
def test_bunnys_s2_gives_equal_logits(hub, tmp_path, lm):
    before = trained(hub, "siglip", lm, scales=3)
    state = {name.replace(".vision_model.tower.", ".vision_model."): t for name, t in released(before).items()}
    assert "model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight" in state
    assert state["model.mm_projector.0.weight"].shape == (32, 3 * 32)
    after = imported(hub, "siglip", lm, write(state, tmp_path / "released"), scales=3)
    assert torch.equal(logits(after), logits(before))
    with pytest.raises(
        CheckpointError, match=r"mm_projector\.0\.weight is \[32, 96\] in the checkpoint and \[32, 32\]"
    ):
        imported(hub, "siglip", lm, checkpoint_files(tmp_path / "released"))


def test_bunnys_minicpm_gives_equal_logits(hub, tmp_path):
    """Its norm is as MiniCPM has it: what divides the logits is folded in on the way."""
    before = trained(hub, "siglip", "minicpm")
    state = released(before)
    factor = before.model.config.text_config.folded_logits_scaling
    assert factor == 9.0
    state["model.norm.weight"] = factor * state["model.norm.weight"]
    after = imported(hub, "siglip", "minicpm", write(state, tmp_path / "released"))
    torch.testing.assert_close(logits(after), logits(before), rtol=0, atol=1e-5)


def test_names_of_each_family():
    assert our_name("model.vision_tower.vision_tower.vision_model.head.probe") == "model.vision_tower.head.probe"
    assert (
        our_name(
            "model.vision_tower.vision_tower.encoder.layer.0.norm1.bias",
        )
        == f"{TOWER}encoder.layer.0.norm1.bias"
    )
    assert our_name("model.mm_projector.2.bias") == f"{PROJECTOR}linear_2.bias"
    assert our_name("language_model.lm_head.weight") == "lm_head.weight"
    assert our_name("model.image_newline") is None


@pytest.mark.parametrize("how", ["fold", "drop"])
def test_buffers_are_left_out_and_the_bias_of_phis_head_is_folded(hub, tmp_path, how):
    before = trained(hub, "siglip", "phi")
    bias = torch.linspace(-2, 2, 300)
    state = released(before) | {
        "lm_head.bias": bias,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(4)[None],
    }
    after = imported(hub, "siglip", "phi", write(state, tmp_path / "released"), head_bias=how)
    expected = logits(before) + (bias if how == "fold" else 0)
    torch.testing.assert_close(logits(after), expected, rtol=0, atol=1e-5)


def test_fused_attention_is_taken_apart_by_head(hub, tmp_path):
    before = trained(hub, "small", "small_phi")
    state = released(before)
    for layer in range(2):
        stem = f"model.layers.{layer}.self_attn."
        for kind in ("weight", "bias"):
            parts = [state.pop(f"{stem}{letter}_proj.{kind}") for letter in "qkv"]
            rows = [part[head * 8 : head * 8 + 8] for head in range(4) for part in parts]
            state[f"{stem}query_key_value.{kind}"] = torch.cat(rows)
    after = imported(hub, "small", "small_phi", write(state, tmp_path / "fused"))
    assert torch.equal(logits(after), logits(before))


def test_a_tower_may_end_at_the_features_or_be_left_out(hub, tmp_path, caplog):
    before = trained(hub, "siglip", "stablelm")
    state = {
        name: tensor
        for name, tensor in released(before).items()
        if not any(word in name for word in ("encoder.layers.1.", "vision_model.head.", "post_layernorm"))
    }
    after = imported(hub, "siglip", "stablelm", write(state, tmp_path / "trimmed"))
    assert torch.equal(logits(after), logits(before))
    headless = {name: tensor for name, tensor in state.items() if "vision_tower" not in name}
    files = write(headless, tmp_path / "headless")
    with caplog.at_level("INFO", "train"):
        imported(hub, "siglip", "stablelm", files, keep_tower=True)
    assert "holds no vision tower" in caplog.text
    with pytest.raises(CheckpointError, match="not in the checkpoint: model.vision_tower"):
        imported(hub, "siglip", "stablelm", files)


def scaled_logits(composed, projector):
    """Gemma as transformers ran it before 5.4: token and image embeddings merged, then all of them scaled."""
    ids, pixels = question(composed)
    inner = composed.model.model
    hidden = inner.vision_tower(pixels, output_hidden_states=True).hidden_states[composed.feature_index][:, 1:]
    merged = torch.nn.functional.embedding(ids, inner.language_model.embed_tokens.weight)
    merged[ids == composed.image_id] = projector(hidden)[0]
    merged = merged * math.sqrt(composed.model.config.text_config.hidden_size)
    return composed.model.lm_head(inner.language_model(inputs_embeds=merged).last_hidden_state).detach()


@pytest.mark.parametrize("names", [AUTHORS, NATIVE], ids=["authors", "native"])
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
def test_gemmas_scaled_image_features_are_folded(hub, tmp_path, names, tower):
    before = trained(hub, tower, "gemma")
    expected = scaled_logits(before, before.model.model.multi_modal_projector)
    state = released(before, names)
    if tower == "dinov2":
        state = {name.replace("vision_model.", ""): tensor for name, tensor in state.items()}
    if names is AUTHORS:
        del state["lm_head.weight"]  # tied
    files = write(state, tmp_path / "old", transformers_version="4.39.1")
    torch.testing.assert_close(logits(imported(hub, tower, "gemma", files)), expected, rtol=0, atol=1e-4)


def test_a_new_gemma_is_left_as_it_is(hub, tmp_path):
    before = trained(hub, "clip", "gemma")
    files = write(released(before, NATIVE), tmp_path / "new", transformers_version="5.23.0")
    assert torch.equal(logits(imported(hub, "clip", "gemma", files)), logits(before))
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(UsageError, match="no transformers_version"):
        imported(hub, "clip", "gemma", files)


def test_what_does_not_fit_is_named(hub, tmp_path):
    state = released(trained(hub, "clip", "llama"))
    odd = write({**state, "model.image_newline": torch.zeros(4)}, tmp_path / "odd")
    with pytest.raises(CheckpointError, match=r"1 tensors of the checkpoint have no place .*: model.image_newline"):
        imported(hub, "clip", "llama", odd)
    less = write({k: v for k, v in state.items() if k != "model.norm.weight"}, tmp_path / "less")
    with pytest.raises(CheckpointError, match=r"not in the checkpoint: model\.language_model\.norm\.weight"):
        imported(hub, "clip", "llama", less)
    wide = write({**state, "model.mm_projector.2.bias": torch.zeros(4)}, tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"mm_projector\.2\.bias is \[4\] in the checkpoint and \[32\]"):
        imported(hub, "clip", "llama", wide)
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match="merge it into its base"):
        checkpoint_files(tmp_path / "lora")
    with pytest.raises(UsageError, match="no model"):
        checkpoint_files(tmp_path)


class Trap:
    def __reduce__(self):
        return print, ("unpickled",)


def test_pickles_give_tensors_and_nothing_else(hub, tmp_path, capsys):
    before = trained(hub, "clip", "llama")
    torch.save(released(before), tmp_path / "pytorch_model.bin")
    after = imported(hub, "clip", "llama", checkpoint_files(tmp_path))
    assert torch.equal(logits(after), logits(before))
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Trap()}, protocol=2))
    with pytest.raises(CheckpointError, match="cannot be read as weights alone"):
        imported(hub, "clip", "llama", checkpoint_files(tmp_path))
    assert "unpickled" not in capsys.readouterr().out


def test_the_verb_writes_a_folder_that_transformers_loads(hub, tmp_path, capfd):
    before = trained(hub, "siglip", "phi3")
    write(released(before), tmp_path / "released")
    options = model_options(hub, "siglip", "phi3")
    words = ["import", tmp_path / "released", tmp_path / "model", "--set", "model.shrink=tiny", "--json"]
    for key in ("tower", "lm", "tokenizer"):
        words += ["--set", f"model.{key}={getattr(options, key)}"]
    (tmp_path / "dtype.toml").write_text('[export]\ndtype = "fp32"\n')
    words = [*words, "--config", tmp_path / "dtype.toml", "--overwrite"]
    app([str(word) for word in words], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["parameters"] > 0
    model = tf.AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    ids, pixels = question(before)
    with torch.no_grad():
        served = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(served, logits(before), rtol=0, atol=1e-5)
    assert "language_model.model.layers.0.self_attn.qkv_proj.weight" in load_file(tmp_path / "model/model.safetensors")
