"""The two towers that transformers lacks: EVA02-CLIP against timm's, S² against a slow reference, both as towers."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from toys import word_tokenizer

from train.config import Model, Stage
from train.data.batches import Collator
from train.errors import UsageError
from train.model.compose import compose, limits
from train.model.eva import EvaVisionConfig, EvaVisionModel, from_tensors
from train.model.forward import hidden_states, normalise, token_losses, tower_features
from train.model.layer import features
from train.model.learn import prepare
from train.model.multiscale import MultiscaleConfig, MultiscaleModel
from train.model.tower import describe_tower, load_tower, make_image_processor
from train.publish.parts import write_parts

TIMM = "eva02_large_patch14_clip_336"
EVA = "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"


def timm_eva(**sizes):
    """timm's own class of the published model, small, with weights that all matter."""
    import timm

    sizes = {"embed_dim": 128, "depth": 3, "num_heads": 2, "img_size": 56, "num_classes": 16, **sizes}
    model = timm.create_model(TIMM, **sizes).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def authors_names(state):
    """timm's names as the authors write them."""
    out = {"visual.rope.freqs_cos": torch.ones(2), "logit_scale": torch.ones(()), "text.ln_final.weight": torch.ones(2)}
    words = {"attn.q_proj.bias": "attn.q_bias", "attn.v_proj.bias": "attn.v_bias", "attn.norm.": "attn.inner_attn_ln."}
    words |= {"mlp.fc1_g": "mlp.w1", "mlp.fc1_x": "mlp.w2", "mlp.norm.": "mlp.ffn_ln.", "mlp.fc2": "mlp.w3"}
    for name, tensor in state.items():
        for theirs, authors in words.items():
            name = name.replace(theirs, authors)
        out[f"visual.{name}"] = tensor
    return out


def test_eva_sees_what_timms_sees():
    theirs = timm_eva()
    ours = from_tensors(theirs.state_dict().items()).eval()
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        blocks = theirs.forward_intermediates(
            pixels, norm=False, output_fmt="NLC", intermediates_only=True, return_prefix_tokens=True
        )
        out = ours(pixels)
        for (patches, first), hidden in zip(blocks, out.hidden_states[1:], strict=True):
            torch.testing.assert_close(hidden, torch.cat([first, patches], 1), rtol=0, atol=1e-4)
        torch.testing.assert_close(out.last_hidden_state, theirs.forward_features(pixels), rtol=0, atol=1e-5)
        # Bunny: 23 of 24 blocks, no last norm, the class token dropped.
        torch.testing.assert_close(features(ours, pixels, 2, "default"), blocks[1][0], rtol=0, atol=1e-4)


def test_eva_in_openclip_is_the_same():
    import open_clip
    import timm

    assert open_clip.get_model_config("EVA02-L-14-336")["vision_cfg"]["timm_model_name"] == TIMM
    with torch.device("meta"):
        trunk, ours = timm.create_model(TIMM), EvaVisionModel(EvaVisionConfig())
    shapes = {name: tensor.shape for name, tensor in from_names(trunk.state_dict()).items()}
    assert shapes == {name: tensor.shape for name, tensor in ours.state_dict().items()}


def from_names(state):
    from train.model.eva import our_name

    return {our_name(name): tensor for name, tensor in state.items() if our_name(name)}


@pytest.fixture(params=["open_clip", "timm", "authors", "file"])
def published(request, tmp_path):
    """The tower as it is found on a disk, in each of its published forms."""
    state = {name: tensor.contiguous() for name, tensor in timm_eva().state_dict().items()}
    folder = tmp_path / "eva"
    folder.mkdir()
    if request.param == "open_clip":
        save_file({f"visual.trunk.{n}": t for n, t in state.items()}, folder / "open_clip_model.safetensors")
        vision = {"image_size": 56, "timm_model_name": TIMM}
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": {"vision_cfg": vision}}))
        return f"local-dir:{folder}"
    if request.param == "timm":
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({"architecture": TIMM}))
        return str(folder)
    file = folder / "EVA02_CLIP_L_336_psz14_s6B.pt"
    torch.save(authors_names(state), file)
    return str(folder if request.param == "authors" else file)


def test_eva_loads_from_each_published_form(published):
    tower, vision = load_tower(Model(tower=published), torch.float32)
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    expected = timm_eva().forward_features(pixels)
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, rtol=0, atol=1e-5)
    assert (vision.tokens_per_image, vision.strategy, vision.mean[0]) == (16, "default", 0.48145466)
    assert (vision.image_size, vision.short_side) == (56, 56)


def test_what_is_no_eva_is_refused(tmp_path):
    save_file({"visual.trunk.blocks.0.other": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UsageError, match="visual.trunk.blocks.0.other is no tensor of eva02"):
        load_tower(Model(tower=str(tmp_path / "x.safetensors")), torch.float32)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    for text in ("not json", "[]", '{"model_cfg": []}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UsageError) as error:
            load_tower(Model(tower=str(tmp_path)), torch.float32)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    (tmp_path / "x.pt").write_bytes(b"nothing")
    with pytest.raises(UsageError, match="cannot be read as weights alone"):
        load_tower(Model(tower=str(tmp_path / "x.pt")), torch.float32)


# ---- Towers inside of other models, and files that lack weights ------------------------------------------------------

SEES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SEES |= {"image_size": 28, "patch_size": 14}
READS = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
READS |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
SIGLIP = {"model_type": "siglip_vision_model", **SEES}
PLAIN = {**SEES, "vocab_size": 80}
WHOLE = {  # published as one model, of which the tower is wanted
    "clip": (tf.CLIPConfig, {"vision_config": SEES, "text_config": PLAIN}),
    "siglip": (tf.SiglipConfig, {"vision_config": SEES, "text_config": PLAIN}),
    "metaclip2": (tf.MetaClip2Config, {"vision_config": SEES, "text_config": PLAIN}),
    "aimv2": (tf.Aimv2Config, {"vision_config": SEES, "text_config": PLAIN}),
    "llava": (tf.LlavaConfig, {"vision_config": tf.CLIPVisionConfig(**SEES), "text_config": tf.LlamaConfig(**READS)}),
    "paligemma": (tf.PaliGemmaConfig, {"vision_config": SIGLIP, "text_config": {"model_type": "gemma", **READS}}),
    "gemma3": (tf.Gemma3Config, {"vision_config": SIGLIP, "text_config": READS, "mm_tokens_per_image": 4}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_the_tower_is_taken_out_of_a_whole_model(kind, tmp_path):
    make, parts = WHOLE[kind]
    whole = tf.AutoModel.from_config(make(**parts)).eval()
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    whole.save_pretrained(tmp_path)
    tower, vision = load_tower(Model(tower=str(tmp_path)), torch.float32)
    kinds = (type(tower), tf.MetaClip2VisionModel)  # the latter is taken as CLIP's
    inside = next(part for part in whole.modules() if type(part) in kinds)
    pixels = torch.randn(2, 3, vision.image_size, vision.image_size)
    with torch.no_grad():
        ours, theirs = (part(pixels, output_hidden_states=True).hidden_states for part in (tower, inside))
    torch.testing.assert_close(ours, theirs)


def test_a_tower_whose_files_lack_weights_is_refused(tmp_path):
    tf.SiglipVisionModel(tf.SiglipVisionConfig(**SEES)).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({k: v for k, v in state.items() if ".head." not in k}, file, metadata={"format": "pt"})
    load_tower(Model(tower=str(tmp_path)), torch.float32)  # no feature layer lies behind its head
    save_file({k: v for k, v in state.items() if "layers.1.mlp.fc1" not in k}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="its files lack 2 weights, among them encoder.layers.1.mlp.fc1.bias"):
        load_tower(Model(tower=str(tmp_path)), torch.float32)


# ---- How a tower's own files say that images are prepared ----------------------------------------------------------

COLOURS = {
    "as CLIP": {},
    "not normalised": {"do_normalize": False},
    "not normalised nor scaled": {"do_normalize": False, "do_rescale": False},
    "normalised alone": {"do_rescale": False, "image_mean": [120.0, 127.5, 130.0], "image_std": [60.0, 70.0, 80.0]},
    "to -1 … 1": {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3},
    "one number for all colours": {"image_mean": 0.5, "image_std": 0.25},
}


@pytest.mark.parametrize("scales", [1, 2])
@pytest.mark.parametrize("how", COLOURS)
def test_a_tower_sees_the_colours_that_its_own_processor_makes(how, scales, tmp_path):
    from PIL import Image

    tf.CLIPVisionConfig(**SEES).save_pretrained(tmp_path)
    side = {"height": 28, "width": 28}
    said = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 28},
        "crop_size": side,
        "resample": 3,
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said | COLOURS[how]))
    _, vision = describe_tower(Model(tower=str(tmp_path), tower_weights="fresh", scales=scales))
    assert vision.image_size == 28 * scales
    side = vision.image_size
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 255, (3, side, side), dtype=torch.uint8, generator=generator)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    own = tf.AutoImageProcessor.from_pretrained(tmp_path, use_fast=False)
    theirs = own(picture, do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"][0].float()
    close = {"rtol": 0, "atol": 1e-6 * float(theirs.abs().max() + 1)}
    torch.testing.assert_close(normalise(pixels[None], vision, torch.float32)[0], theirs, **close)
    exported = make_image_processor(vision)(picture, return_tensors="pt")["pixel_values"][0].float()
    torch.testing.assert_close(exported, theirs, **close)


UNREADABLE = [{"size": [28, 28]}, {"resample": "bicubic"}, {"image_mean": [0.5, "x", 0.5]}, {"image_mean": [0.5]}]
UNREADABLE += [{"image_std": [0.0] * 3}, {"crop_size": 42}, {"size": {"height": -28, "width": 28}}]


@pytest.mark.parametrize("said", UNREADABLE)
def test_a_preparation_that_cannot_be_read_is_told_in_a_line(said, tmp_path):
    tf.CLIPVisionConfig(**SEES).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(
        UsageError, match=r"its preprocessor_config.json cannot be read \(.*\): .*three numbers"
    ) as error:
        describe_tower(Model(tower=str(tmp_path), tower_weights="fresh"))
    assert "\n" not in str(error.value)
    (tmp_path / "preprocessor_config.json").write_text("{")  # not the same as none
    with pytest.raises(UsageError, match="preprocessor_config.json' is not a valid JSON"):
        describe_tower(Model(tower=str(tmp_path), tower_weights="fresh"))


# ---- S² --------------------------------------------------------------------------------------------------------------


def slow_s2(see, image_chw, scales, size):
    """S² for one image, tile by tile and place by place."""
    per_scale = []
    for scale in range(1, scales + 1):
        resized = torch.nn.functional.interpolate(image_chw[None], size=scale * size, mode="bicubic")[0]
        rows = []
        for i in range(scale):
            tiles = [see(resized[:, i * size : (i + 1) * size, j * size : (j + 1) * size]) for j in range(scale)]
            rows.append(torch.cat(tiles, 1))  # [side, scale * side, width]
        whole = torch.cat(rows, 0)
        side = len(whole) // scale
        pooled = torch.stack(
            [
                torch.stack(
                    [whole[r * scale : (r + 1) * scale, c * scale : (c + 1) * scale].mean((0, 1)) for c in range(side)]
                )
                for r in range(side)
            ]
        )
        per_scale.append(pooled.flatten(0, 1))
    return torch.cat(per_scale, 1)


@pytest.fixture(scope="module")
def towers(tmp_path_factory):

    root = tmp_path_factory.mktemp("towers")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    small |= {"image_size": 42, "patch_size": 14}
    tf.SiglipVisionConfig(**small).save_pretrained(root / "siglip")
    tf.CLIPVisionConfig(**small).save_pretrained(root / "clip")
    tf.Dinov2Config(**{**small, "image_size": 42}).save_pretrained(root / "dinov2")
    tf.LlamaConfig(vocab_size=300, num_hidden_layers=2).save_pretrained(root / "llama")
    word_tokenizer().save_pretrained(root / "tokenizer")
    return root


@pytest.mark.parametrize("kind", ["siglip", "clip"])
@pytest.mark.parametrize("scales", [2, 3])
def test_s2_is_the_slow_reference(towers, kind, scales):
    options = Model(tower=str(towers / kind), tower_weights="fresh", scales=scales)
    whole, vision = load_tower(options, torch.float32)
    inner = whole.tower
    pixels = torch.randn(2, 3, 42 * scales, 42 * scales, generator=torch.Generator().manual_seed(0))

    def see(tile_chw):
        hidden = inner(tile_chw[None], output_hidden_states=True).hidden_states[-2][0]
        return hidden[int(kind == "clip") :].reshape(3, 3, -1)

    with torch.no_grad():
        ours = features(whole, pixels, 2, vision.strategy)
        slow = torch.stack([slow_s2(see, image, scales, 42) for image in pixels])
    assert ours.shape == (2, 9, 16 * scales) and vision.tokens_per_image == 9
    torch.testing.assert_close(ours, slow, rtol=0, atol=1e-5)


def test_s2_shows_its_tower_a_fixed_number_of_tiles_at_once(towers, monkeypatch):
    whole, vision = load_tower(Model(tower=str(towers / "siglip"), tower_weights="fresh", scales=3), torch.float32)
    pixels = torch.randn(3, 3, 126, 126, generator=torch.Generator().manual_seed(0))
    seen = []
    whole.tower.register_forward_pre_hook(lambda _module, given: seen.append(len(given[0])))
    with torch.no_grad():
        together = features(whole, pixels, 2, vision.strategy)
        monkeypatch.setattr("train.model.multiscale.TILES", 5)
        torch.testing.assert_close(features(whole, pixels, 2, vision.strategy), together, rtol=0, atol=1e-6)
    assert seen[:3] == [3, 12, 27] and max(seen[3:]) == 5 and sum(seen[3:]) == 3 * 14


def test_s2_of_the_published_size():
    options = Model(tower="google/siglip-so400m-patch14-384", tower_weights="fresh", scales=3)
    config, vision = describe_tower(options)
    assert (vision.image_size, vision.tokens_per_image, config.hidden_size, config.num_tiles) == (1152, 729, 3456, 14)
    processor = make_image_processor(vision)
    assert (processor.size["height"], processor.size["width"], processor.do_center_crop) == (1152, 1152, False)
    with torch.device("meta"):
        tower = MultiscaleModel(config)
    assert sum(p.numel() for p in tower.parameters()) == 428_225_600


def test_s2_needs_a_tower_of_one_size(towers):
    with pytest.raises(UsageError, match="model.scales = 3 needs a tower"):
        describe_tower(Model(tower=str(towers / "dinov2"), tower_weights="fresh", scales=3))


def test_a_multiscale_configuration_survives_its_file(towers, tmp_path):
    config, _ = describe_tower(Model(tower=str(towers / "siglip"), tower_weights="fresh", scales=3))
    config.save_pretrained(tmp_path)
    again = MultiscaleConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict() and again.tower_config.hidden_size == 16


# ---- both in a model -------------------------------------------------------------------------------------------------


def own(towers, kind, **more):
    tower = EVA if kind == "eva" else str(towers / "siglip")
    names = {"tower": tower, "lm": str(towers / "llama"), "tokenizer": str(towers / "tokenizer"), "shrink": "tiny"}
    return Model(**names, scales=1 if kind == "eva" else 3, **more)


@pytest.mark.parametrize("kind", ["eva", "s2"])
def test_the_limits_are_said_when_composing(towers, kind, caplog):
    with caplog.at_level("WARNING", "train"):
        composed = compose(own(towers, kind))
    said = limits(composed.model.config)
    assert caplog.messages == [said] and "\n" not in said
    assert all(word in said for word in ("generate", "eval", "not native llava-hf", "--parts"))


@pytest.mark.parametrize("kind", ["eva", "s2"])
@pytest.mark.parametrize("tune_tower", [False, True])
def test_own_towers_train_frozen_and_free(towers, kind, tune_tower):
    composed = compose(own(towers, kind))
    stage = Stage(tune="lora", lora_rank=2, tune_tower=tune_tower)
    size = composed.vision.image_size
    pixels = torch.randint(0, 255, (2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[5, *[composed.image_id] * composed.vision.tokens_per_image, 6, 7]] * 2)
    native = composed.model(input_ids=ids, pixel_values=normalise(pixels, composed.vision, torch.float32)).logits
    trainable = prepare(composed, stage)
    composed.model.eval()
    feats = tower_features(composed, pixels, tuned=tune_tower)
    hidden = hidden_states(composed, ids, torch.arange(ids.shape[1]).expand(2, -1), feats)
    torch.testing.assert_close(composed.model.lm_head(hidden), native, rtol=0, atol=1e-5)
    token_losses(composed.model, hidden[:, -2], torch.tensor([7, 7])).sum().backward()
    tower = {name for name in trainable if "vision_tower" in name}
    assert bool(tower) == tune_tower == feats.requires_grad
    assert all(trainable[name].grad is not None for name in tower)


@pytest.mark.parametrize("kind", ["eva", "s2"])
def test_own_towers_have_no_parts(towers, kind, tmp_path):
    with pytest.raises(UsageError, match="--parts: .* no converter knows it"):
        write_parts(compose(own(towers, kind)).model, None, None, tmp_path, torch.float32)


def test_pixels_reach_a_multiscale_tower_whole(towers):
    composed = compose(own(towers, "s2"))
    collator = Collator.__new__(Collator)
    collator.image_processor = make_image_processor(composed.vision)
    from PIL import Image

    uint8 = collator.image_processor([Image.new("RGB", (50, 40))], do_rescale=False, do_normalize=False)["pixel_values"]
    assert tuple(uint8[0].shape) == (3, 84, 84)
