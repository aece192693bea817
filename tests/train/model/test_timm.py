"""timm's networks as towers see what timm sees: from a folder, by a hub name, and out of open_clip's folders."""

import json

import pytest
import torch
from promises import write_timm
from safetensors.torch import load_file, save_file

from train.config import Model
from train.errors import UsageError
from train.model.layer import feature_layer_index, features
from train.model.tower import describe_tower, load_tower, make_image_processor

VIT = {"depth": 3, "embed_dim": 16, "num_heads": 2, "img_size": 32}


def seen(tower, vision, pixels, layer):
    with torch.no_grad():
        index = feature_layer_index(layer, tower.config.num_hidden_layers)
        return features(tower, pixels, index, vision.strategy)


@pytest.mark.parametrize(("layer", "index"), [(-1, 2), (-2, 1)])
@pytest.mark.parametrize("name", ["vit_small_patch16_224", "vit_small_patch16_dinov3", "test_vit3"])
def test_a_sequence_without_class_and_register_tokens(name, layer, index, tmp_path):
    import timm

    folder = write_timm(name, VIT, tmp_path / "tower")
    tower, vision = load_tower(Model(tower=folder, feature_layer=layer), torch.float32)
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        [expected] = theirs.forward_intermediates(pixels, indices=[index], output_fmt="NLC", intermediates_only=True)
    got = seen(tower, vision, pixels, layer)
    assert got.shape == (2, vision.tokens_per_image, 16) == (2, 4, 16)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("layer", "side"), [(-1, 2), (-2, 4)])
def test_a_grid_row_by_row(layer, side, tmp_path):
    import timm

    folder = write_timm("test_efficientnet", {}, tmp_path / "tower")
    tower, vision = load_tower(Model(tower=folder, feature_layer=layer), torch.float32)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        whole, maps = theirs.forward_intermediates(pixels)
    expected = whole if layer == -1 else maps[-2]
    assert vision.tokens_per_image == side**2 and expected.shape[2:] == (side, side)
    got = seen(tower, vision, pixels, layer)
    torch.testing.assert_close(got[0, 1], expected[0, :, 0, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(got[0, side], expected[0, :, 1, 0], rtol=0, atol=1e-5)
    assert tower.config.flops > 0


def test_a_grid_averaged_to_fewer_places(tmp_path):
    folder = write_timm("test_efficientnet", {}, tmp_path / "tower")
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    whole, averaged = (load_tower(Model(tower=folder, grid=places), torch.float32) for places in (0, 3))
    ours, fine = seen(*averaged, pixels, -2), seen(*whole, pixels, -2).view(2, 4, 4, -1)
    assert averaged[1].tokens_per_image == ours.shape[1] == 9
    for row in range(3):  # windows of 4 places among 3 overlap: 0-1, 1-2, 2-3
        for column in range(3):
            near = fine[:, row : row + 2, column : column + 2].mean((1, 2))
            torch.testing.assert_close(ours[:, 3 * row + column], near, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="model.grid = 5: map 4 of test_efficientnet has 4 x 4 places"):
        describe_tower(Model(tower=folder, grid=5))


def test_only_a_network_of_timm_is_averaged(tmp_path):
    folder = write_timm("vit_small_patch16_224", VIT, tmp_path / "tower")
    assert describe_tower(Model(tower=folder, grid=1))[0].model_type == "timm_vision_model"
    with pytest.raises(UsageError, match="model.grid = 3 needs a network of timm"):
        describe_tower(Model(tower="openai/clip-vit-large-patch14-336", tower_weights="fresh", grid=3))


def test_images_are_prepared_as_the_network_was_trained(tmp_path):
    folder = write_timm("test_efficientnet", {}, tmp_path / "tower")
    file = tmp_path / "tower" / "config.json"
    facts = json.loads(file.read_text())
    facts["pretrained_cfg"] |= {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear"}
    file.write_text(json.dumps(facts))
    _, vision = describe_tower(Model(tower=folder, feature_layer=-1))
    assert (vision.mean, vision.std, vision.resample) == ((0.1,) * 3, (0.2,) * 3, 2)
    assert (vision.image_size, vision.short_side, vision.pad) == (64, 64, False)
    assert make_image_processor(vision).crop_size["height"] == 64
    _, vision = describe_tower(Model(tower=folder, feature_layer=-1, image="squash"))
    assert (vision.short_side, vision.pad) == (0, False)


def test_a_hub_name_is_described_from_the_registry():
    options = Model(tower="timm/vit_so400m_patch14_siglip_378.v2_webli@main", tower_weights="fresh")
    config, vision = describe_tower(options)
    assert (config.model_type, config.num_hidden_layers, vision.tokens_per_image) == ("siglip_vision_model", 27, 729)
    assert (vision.image_size, vision.mean, vision.short_side) == (378, (0.5,) * 3, 0)
    config, vision = describe_tower(Model(tower="timm/vit_base_patch16_dinov3.lvd1689m", tower_weights="fresh"))
    assert (config.model_type, vision.tokens_per_image) == ("timm_vision_model", 256)
    with pytest.raises(UsageError, match="gemma4_vit_167m of timm lays out its places by an image's values"):
        describe_tower(Model(tower="timm/gemma4_vit_167m", tower_weights="fresh"))
    with pytest.raises(UsageError, match="has no 'vit_gigantic'"):
        describe_tower(Model(tower="timm/vit_gigantic.x", tower_weights="fresh"))


def test_a_hub_name_is_loaded_by_timms_own_code(tmp_path, monkeypatch):
    """The hub's folder is a local one here; what is asked of it is what timm asks."""
    write_timm("vit_small_patch16_dinov3", VIT, tmp_path / "tower")
    asked = []

    def local(model_id, filename, **_):
        asked.append((model_id, filename))
        return str(tmp_path / "tower" / filename)

    monkeypatch.setattr("timm.models._hub.download_from_hf", lambda where, name, **_: local(where, name))
    monkeypatch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: local(repo_id, filename))
    monkeypatch.setattr("train.model.timm_published._is_timms", lambda source: True)
    tower, vision = load_tower(Model(tower="timm/tiny.made@v1"), torch.float32)
    assert vision.tokens_per_image == 4
    assert {name for _, name in asked} == {"config.json", "model.safetensors"}
    name = "blocks.1.attn.qkv.weight"
    torch.testing.assert_close(
        tower.trunk.state_dict()[name], load_file(tmp_path / "tower" / "model.safetensors")[name]
    )


@pytest.mark.parametrize("name", ["test_efficientnet", "vit_small_patch16_224"])
def test_the_tower_of_an_openclip_folder(name, tmp_path):
    from open_clip import CustomTextCLIP

    vision_cfg = {"timm_model_name": name, "timm_pool": "avg", "timm_proj": "linear", "image_size": 224}
    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    torch.manual_seed(0)
    model = CustomTextCLIP(8, vision_cfg, text)
    save_file(
        {k: v.contiguous().clone() for k, v in model.state_dict().items()}, tmp_path / "open_clip_model.safetensors"
    )
    how = {"mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    document = {"model_cfg": {"embed_dim": 8, "vision_cfg": vision_cfg, "text_cfg": text}, "preprocess_cfg": how}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(document))
    tower, vision = load_tower(Model(tower=f"local-dir:{tmp_path}", feature_layer=-1), torch.float32)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model.eval().visual.trunk.forward_intermediates(pixels, norm=False)
    expected = theirs[0] if name == "test_efficientnet" else theirs[1][-1]
    got = seen(tower, vision, pixels, -1)
    assert got.shape[1] == vision.tokens_per_image and (vision.mean[0], vision.short_side) == (0.1, 0)
    torch.testing.assert_close(got[0, 1], expected[0, :, 0, 1], rtol=0, atol=1e-4)


def test_what_is_wrong_is_said_in_one_line(tmp_path):
    folder = write_timm("test_resnet", {}, tmp_path / "tower")
    with pytest.raises(UsageError, match="hidden states 1 to 5, or -5 to -1"):
        describe_tower(Model(tower=folder, feature_layer=0))
    with pytest.raises(UsageError, match="hidden states 1 to 5"):
        describe_tower(Model(tower=folder, feature_layer=-9))
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"broken")
    config = tmp_path / "tower" / "config.json"
    whole = config.read_text()
    with pytest.raises(UsageError, match="cannot be loaded") as error:
        load_tower(Model(tower=folder), torch.float32)
    assert "\n" not in str(error.value)
    config.write_text(whole.replace('"test_resnet"', '"no_such_network"'))
    with pytest.raises(UsageError, match="no_such_network"):
        describe_tower(Model(tower=folder))


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "test_convnext"])
def test_a_tiny_one_has_the_same_class(name, tmp_path):
    options = Model(tower=f"timm/{name}", shrink="tiny")
    tower, vision = load_tower(options, torch.float32)
    assert tower.config.architecture == name and vision.tokens_per_image <= 16
    assert sum(p.numel() for p in tower.parameters()) < 1_000_000
