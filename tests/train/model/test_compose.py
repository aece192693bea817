"""Composition, freezing, packing, and the loss at label positions, against transformers' own forward."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import picture, word_tokenizer

from train.config import Model, Stage
from train.data.batches import Collator
from train.data.sources import decode_image
from train.errors import UsageError
from train.model.compose import compose
from train.model.forward import hidden_states, normalise, token_losses, tower_features
from train.model.layer import feature_layer_index
from train.model.learn import lora_targets, prepare, recompute
from train.model.tower import load_tower, make_image_processor

TOWERS = ("clip", "siglip", "dinov2")
LMS = ("phi", "gemma", "stablelm", "phi3", "llama", "qwen2")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Folders with the published classes' configurations only, and a tokenizer."""
    import transformers as tf

    root = tmp_path_factory.mktemp("hub")
    word_tokenizer().save_pretrained(root / "tokenizer")
    vocabulary = {"vocab_size": 300, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    configs = {
        "clip": tf.CLIPVisionConfig(image_size=224, patch_size=14),
        "siglip": tf.SiglipVisionConfig(image_size=224, patch_size=14),
        "dinov2": tf.Dinov2Config(image_size=224, patch_size=14),
        "phi": tf.PhiConfig(**vocabulary),
        "gemma": tf.GemmaConfig(**vocabulary),
        "stablelm": tf.StableLmConfig(**vocabulary),
        "phi3": tf.Phi3Config(**vocabulary),
        "llama": tf.LlamaConfig(**vocabulary),
        "qwen2": tf.Qwen2Config(**vocabulary),
    }
    for name, config in configs.items():
        config.save_pretrained(root / name)
    return root


def options(hub, tower="clip", lm="llama", **more):
    return Model(tower=str(hub / tower), lm=str(hub / lm), tokenizer=str(hub / "tokenizer"), shrink="tiny", **more)


def image_rows(composed, num, tail):
    ids = [5, *[composed.image_id] * composed.vision.tokens_per_image, *tail]
    side = composed.vision.image_size
    pixels = torch.randint(0, 255, (num, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return torch.tensor([ids] * num), pixels


@pytest.mark.parametrize("lm", LMS)
@pytest.mark.parametrize("tower", TOWERS)
def test_composes_and_runs_like_the_native_class(hub, tower, lm):
    composed = compose(options(hub, tower, lm))
    ids, pixels = image_rows(composed, 2, [6, 7, 8])
    native = composed.model(input_ids=ids, pixel_values=normalise(pixels, composed.vision, torch.float32)).logits
    trainable = prepare(composed, Stage(tune="lora", lora_rank=2))
    composed.model.eval()
    positions = torch.arange(ids.shape[1]).expand(2, -1)
    hidden = hidden_states(composed, ids, positions, tower_features(composed, pixels))
    torch.testing.assert_close(composed.model.lm_head(hidden), native, rtol=0, atol=1e-5)
    assert all(name.startswith(("model.multi_modal_projector.", "model.language_model.")) for name in trainable)
    assert composed.model.config.text_config.architectures[0].endswith("ForCausalLM")


def test_the_same_options_give_the_same_weights(hub):
    first, second = compose(options(hub)), compose(options(hub))
    assert first.fingerprint == second.fingerprint
    assert compose(options(hub, seed=1)).fingerprint != first.fingerprint
    a, b = first.model.model.multi_modal_projector, second.model.model.multi_modal_projector
    assert torch.equal(a.linear_1.weight, b.linear_1.weight)


@pytest.mark.parametrize(
    ("stage", "learns"),
    [
        (Stage(tune="projector"), {"multi_modal_projector"}),
        (Stage(tune="lora", lora_rank=2), {"multi_modal_projector", "lora"}),
        (Stage(tune="full"), {"multi_modal_projector", "language_model", "lm_head"}),
        (Stage(tune="full", tune_tower=True), {"multi_modal_projector", "language_model", "lm_head", "vision_tower"}),
    ],
)
def test_frozen_means_frozen(hub, stage, learns):
    composed = compose(options(hub))
    trainable = prepare(composed, stage)
    kinds = {"lora" if "lora_" in name else name.removeprefix("model.").split(".")[0] for name in trainable}
    assert kinds == learns
    assert not composed.model.model.vision_tower.training
    before = {name: p.clone() for name, p in composed.model.named_parameters()}
    ids, pixels = image_rows(composed, 2, [6, 7, 8])
    feats = tower_features(composed, pixels, tuned=stage.tune_tower)
    assert feats.requires_grad == stage.tune_tower
    hidden = hidden_states(composed, ids, torch.arange(ids.shape[1]).expand(2, -1), feats)
    token_losses(composed.model, hidden[:, -2], torch.tensor([8, 8])).sum().backward()
    torch.optim.SGD(trainable.values(), lr=1.0).step()
    changed = {name for name, p in composed.model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and changed <= set(trainable)
    assert any("projector" in name for name in changed)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_tower_learns_in_half_precision(hub, tower):
    composed = compose(options(hub, tower), torch.bfloat16)
    trainable = prepare(composed, Stage(tune="lora", lora_rank=2, tune_tower=True))
    _, pixels = image_rows(composed, 2, [])
    with torch.autocast("cpu", torch.bfloat16):
        feats = tower_features(composed, pixels, tuned=True)
        composed.model.model.multi_modal_projector(feats).sum().backward()
    still = [name for name, p in trainable.items() if "vision_tower" in name and p.grad is None]
    assert all("mask_token" in name for name in still)


def test_recomputing_wakes_no_dropout_of_a_frozen_model(hub):
    composed = compose(options(hub, "siglip", "phi"))
    prepare(composed, Stage())
    recompute(composed.model.model.language_model)
    awake = {type(module).__name__ for module in composed.model.modules() if module.training}
    assert "PhiDecoderLayer" in awake and "Dropout" not in awake and "PhiAttention" not in awake


def test_lora_leaves_the_tower_and_the_head_alone(hub):
    composed = compose(options(hub, "clip", "llama"))
    targets = lora_targets(composed.model)
    assert len(targets) == 14 and all(target.startswith("model.language_model.layers.") for target in targets)


def test_an_openclip_tower_pools_to_the_same_vector(world):
    import open_clip

    reference = open_clip.create_model(f"local-dir:{world / 'clip'}").eval()
    tower, vision = load_tower(Model(tower=f"local-dir:{world / 'clip'}", feature_strategy="full"), torch.float32)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = tower(pixels).pooler_output @ reference.visual.proj
        torch.testing.assert_close(ours, reference.encode_image(pixels), rtol=0, atol=1e-6)
    assert (vision.tokens_per_image, vision.image_size, vision.mean[0]) == (5, 32, 0.43)


@pytest.mark.parametrize(
    ("vision_cfg", "tensor", "told"),
    [
        ({}, "transformer.resblocks.1.ls_1.gamma", "it has 'transformer.resblocks.1.ls_1.gamma'"),
        ({"norm_kwargs": {"eps": 1e-3}}, "", "it has 'norm_kwargs'"),
        ({"layers": 2}, "", "it has 'transformer.resblocks.2.attn.in_proj_bias' and 11 more"),
        ({"layers": 4}, "", "cannot be loaded .KeyError: .*transformer.resblocks.3"),
        ({"mlp_ratio": 2.0}, "", "cannot be loaded .*size mismatch"),
        ({}, "cut short", "open_clip_model.safetensors is not a complete safetensors file"),
    ],
)
def test_an_openclip_tower_that_its_class_does_not_hold_is_refused(world, tmp_path, vision_cfg, tensor, told):
    shutil.copytree(world / "clip", tmp_path / "clip")
    config, weights = tmp_path / "clip" / "open_clip_config.json", tmp_path / "clip" / "open_clip_model.safetensors"
    document = json.loads(config.read_text())
    document["model_cfg"]["vision_cfg"] |= vision_cfg
    config.write_text(json.dumps(document))
    if tensor == "cut short":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif tensor:
        save_file({**load_file(weights), f"visual.{tensor}": torch.full((64,), 0.5)}, weights)
    with pytest.raises(UsageError, match=told) as error:
        load_tower(Model(tower=f"local-dir:{tmp_path / 'clip'}"), torch.float32)
    assert "\n" not in str(error.value)


def test_an_openclip_tower_sees_the_same_pixels(world):
    import open_clip

    transform = open_clip.create_model_and_transforms(f"local-dir:{world / 'clip'}")[2]
    _, vision = load_tower(Model(tower=f"local-dir:{world / 'clip'}"), torch.float32)
    rng = np.random.default_rng(0)
    from PIL import Image

    image = Image.fromarray(rng.integers(0, 255, (50, 70, 3), dtype=np.uint8))
    ours = torch.from_numpy(make_image_processor(vision)([image], return_tensors="np")["pixel_values"])[0]
    torch.testing.assert_close(ours, transform(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["square", "pad"])
def test_pixels_of_training_are_those_of_the_processor(hub, mode):
    composed = compose(options(hub, "clip", "llama", image=mode))
    processor = make_image_processor(composed.vision)
    collator = Collator.__new__(Collator)
    collator.image_processor, image = processor, decode_image(picture("red", True, 0)).resize((40, 25))
    uint8 = processor([image], do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
    assert uint8.dtype == np.uint8
    ours = normalise(torch.from_numpy(uint8), composed.vision, torch.float32)
    theirs = torch.from_numpy(processor([image], return_tensors="np")["pixel_values"])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_logits_in_slices_give_the_same_loss_and_gradient(hub, monkeypatch):
    composed = compose(options(hub))
    hidden = torch.randn(10, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(10) * 7
    results = []
    for chunk in (1 << 25, 3 * 300):
        monkeypatch.setattr("train.model.forward.LOGIT_CHUNK", chunk)
        leaf = hidden.clone().requires_grad_()
        losses = token_losses(composed.model, leaf, targets)
        losses.sum().backward()
        results.append((losses.detach(), leaf.grad))
    logits = composed.model.lm_head(hidden)
    reference = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    for losses, gradient in results:
        torch.testing.assert_close(losses, reference, rtol=0, atol=1e-6)
        torch.testing.assert_close(gradient, results[0][1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("lm", LMS)
def test_packed_documents_do_not_see_each_other(hub, lm):
    composed = compose(options(hub, "siglip", lm))
    assert composed.model.model.language_model.config._attn_implementation == "documents"
    image = [composed.image_id] * composed.vision.tokens_per_image
    documents = [[5, *image, 6, 7], [9, 10, 11, 12], [*image, 8, 5, 4]]
    pixels = image_rows(composed, 2, [])[1]
    feats = tower_features(composed, pixels)
    apart = [
        hidden_states(composed, torch.tensor([d]), torch.arange(len(d))[None], feats[i : i + 1] if i != 9 else None)
        for d, i in zip(documents, (0, 9, 1), strict=True)
    ]
    packed = torch.tensor([sum(documents, [])])
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    together = hidden_states(composed, packed, positions, feats, [len(d) for d in documents])
    torch.testing.assert_close(together[0], torch.cat([a[0] for a in apart]), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"tower": "nowhere/at-all"}, "model.tower"),
        ({"lm": ""}, "model.lm is not set"),
        ({"feature_layer": 99}, "hidden states 1 to 2"),
        ({"feature_layer": 0}, "hidden states 1 to 2, or -2 to -1"),
        ({"feature_layer": -3}, "hidden states 1 to 2, or -2 to -1"),
        ({"tower": "local-dir:/nowhere"}, "open_clip_config.json is missing"),
    ],
)
def test_bad_models_are_refused_in_one_line(hub, change, word, monkeypatch):
    import dataclasses

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError) as error:
        compose(dataclasses.replace(options(hub), **change))
    assert word in str(error.value) and "\n" not in str(error.value)


def test_siglip_keeps_all_patches(hub):
    assert compose(options(hub, "siglip")).vision.tokens_per_image == 4
    with pytest.raises(UsageError, match="no class token"):
        compose(options(hub, "siglip", feature_strategy="default"))


def test_feature_layers_count_from_both_ends():
    assert [feature_layer_index(layer, 24) for layer in (-1, -2, 1, 24)] == [24, 23, 1, 24]
