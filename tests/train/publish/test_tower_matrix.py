"""Every tower at toy size with two families: packed as alone, LoRA learns, the export loads with equal logits.

Or it is refused in words; there is no third outcome. train/README.md has the table.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers as tf
from promises import learns_and_returns, write_lm, write_timm
from safetensors.torch import load_file

from train.config import Model
from train.errors import UsageError
from train.model.compose import compose, own_tower
from train.model.tower import describe_tower

README = Path(__file__).parents[3] / "train" / "README.md"
SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES = {"llama": tf.LlamaConfig(**SIZES), "qwen3": tf.Qwen3Config(**SIZES, head_dim=8)}
SEES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
SEES |= {"image_size": 28, "patch_size": 14}
NATIVE = {  # classes of transformers that the llava class takes
    "clip_vision_model": tf.CLIPVisionConfig(**SEES),
    "siglip_vision_model": tf.SiglipVisionConfig(**SEES),
    "siglip2_vision_model": tf.Siglip2VisionConfig(
        **{k: v for k, v in SEES.items() if k != "image_size"}, num_patches=4
    ),
    "dinov2": tf.Dinov2Config(**SEES),
    "aimv2_vision_model": tf.Aimv2VisionConfig(**SEES),
}
WRAPPED = {  # those whose register tokens it would not leave out
    "dinov2_with_registers": tf.Dinov2WithRegistersConfig(**SEES),
    "dinov3_vit": tf.DINOv3ViTConfig(**SEES, num_register_tokens=4),
}
SMALL = {"depth": 3, "embed_dim": 16, "num_heads": 2}
CONVERTED = {  # plain vision transformers of timm, and the class that they become
    "vit_base_patch32_clip_quickgelu_224": ({**SMALL, "img_size": 64}, "clip_vision_model"),
    "vit_so400m_patch14_siglip_378": ({**SMALL, "img_size": 28}, "siglip_vision_model"),
    "vit_small_patch14_dinov2": ({**SMALL, "img_size": 28}, "dinov2"),
    "vit_small_patch16_224": ({**SMALL, "img_size": 32}, "dinov2"),
}
TIMM = {  # networks that stay timm's
    "vit_small_patch14_reg4_dinov2": {**SMALL, "img_size": 28},
    "vit_small_patch16_dinov3": {**SMALL, "img_size": 32},
    "aimv2_large_patch14_224": {**SMALL, "img_size": 28},
    "vit_pe_core_tiny_patch16_384": {**SMALL, "img_size": 32},
    "naflexvit_base_patch16_siglip": SMALL,
    "deit3_small_patch16_224": {**SMALL, "img_size": 32},
    "swin_tiny_patch4_window7_224": {"img_size": 64, "embed_dim": 8, "depths": [1, 1, 1], "num_heads": [1, 1, 2]},
    "test_convnext": {},
    "test_efficientnet": {},
    "fastvit_t8": {"layers": [1, 1, 1, 1]},
    "test_resnet": {},
}
REFUSED = {"vit_mae": tf.ViTMAEConfig(**SEES), "swin": tf.SwinConfig(), "resnet": tf.ResNetConfig()}


@pytest.fixture(scope="session")
def language_models(tmp_path_factory):
    """The two families' folders, written once."""
    root = tmp_path_factory.mktemp("families")
    for name, config in FAMILIES.items():
        write_lm(config, root / name)
    return {name: str(root / name) for name in FAMILIES}


def described(options):
    """The tower's configuration as an export holds it."""
    return SimpleNamespace(vision_config=describe_tower(options)[0])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", [*NATIVE, *WRAPPED])
def test_a_tower_of_transformers(tower, family, language_models, tmp_path):
    (NATIVE | WRAPPED)[tower].save_pretrained(tmp_path / "tower")
    options = Model(tower=str(tmp_path / "tower"), tower_weights="fresh", lm=language_models[family], template="qa")
    assert bool(own_tower(described(options))) == (tower in WRAPPED)
    assert learns_and_returns(options, tmp_path / "out")
    tf.AutoModel.from_config((NATIVE | WRAPPED)[tower]).save_pretrained(tmp_path / "whole")
    theirs, names = load_file(tmp_path / "whole" / "model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    ours = {re.sub(r"^(tower|vision_model)\.", "", n.removeprefix("vision_tower.")) for n in names if "vision" in n}
    assert ours <= {name.removeprefix("vision_model.") for name in theirs}, "as in the tower's own files"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tower", [*CONVERTED, *TIMM])
def test_a_tower_of_timm(tower, family, language_models, tmp_path):
    arguments, becomes = CONVERTED.get(tower) or (TIMM[tower], "timm_vision_model")
    folder = write_timm(tower, arguments, tmp_path / "tower")
    last = tower in ("fastvit_t8", "test_efficientnet")  # with one more convolution behind their last stage
    options = Model(tower=folder, lm=language_models[family], template="qa", feature_layer=-1 if last else -2)
    config = described(options).vision_config
    assert config.model_type == becomes and getattr(config, "whole", False) == last
    assert bool(own_tower(described(options))) == (tower in TIMM)
    assert learns_and_returns(options, tmp_path / "out")


@pytest.mark.parametrize("tower", REFUSED)
def test_a_tower_that_is_refused(tower, tmp_path):
    REFUSED[tower].save_pretrained(tmp_path / "tower")
    with pytest.raises(UsageError, match=f"is a '{tower}'; expected .*, or a network of timm") as error:
        compose(Model(tower=str(tmp_path / "tower"), tower_weights="fresh"))
    assert "\n" not in str(error.value)


def test_the_readme_lists_each_tower():
    text = README.read_text().partition("### Towers")[2].partition("## What")[0]
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    export = dict(zip(["native", "naflex", "converted", "own", "timm"], (row[1] for row in rows[1:6]), strict=True))
    assert all(f"`{name}`" in export["native"] + export["naflex"] for name in NATIVE)
    assert all(f"`{name}`" in export["own"] for name in WRAPPED)
