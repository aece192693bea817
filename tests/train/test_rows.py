"""Every system of the papers: of the published size as described, and, shrunk, all the way from pixels to an answer."""

import pytest
import torch
from toys import assert_serves_the_ids_of_training, picture

import pipelines
from curate.run import pipeline
from train import config as configuration
from train.errors import Interrupted, UsageError
from train.eval.generate import ask
from train.model.compose import blueprint, compose, limits
from train.model.forward import hidden_states, normalise, tower_features
from train.model.learn import prepare
from train.model.native import load_native
from train.publish.export import export
from train.run import checkpoint, loop
from train.run.stage import make_encoder, run_stage

OURS = ("demo", "photos", "real", "small")  # of no paper
ROWS = sorted(
    path.stem
    for path in pipeline.shipped().glob("*.toml")
    if "model" in pipelines.read(path) and path.stem not in OURS and not path.stem.startswith("ablation")
)
SIGLIP, CLIP = "google/siglip-so400m-patch14-384", "openai/clip-vit-large-patch14-336"
DINO, EVA = "facebook/dinov2-large", "timm/eva02_large_patch14_clip_336.merged2b_s6b_b61k"
# Parameters, width and tokens an image of the towers, as the hub counts their image halves: SigLIP with its pooling
# head; CLIP without its projection; EVA02 is timm's 304.43M less the 768 x 1,024 projection and its bias.
TOWERS = {
    SIGLIP: (428_225_600, 1152, 729),
    CLIP: (303_507_456, 1024, 576),
    DINO: (304_368_640, 1024, 256),
    EVA: (304_432_832 - 769 * 1024 + 256, 1024, 576),
}
# Parameters as their model cards and safetensors headers say, width, and rows that the image token adds: none where the
# embedding has rows that no word uses. Phi's include a bias of the head, which LLaVA's class has none of.
LANGUAGE_MODELS = {
    "microsoft/phi-2": (2_779_683_840 - 51_200, 2560, 0),
    "microsoft/phi-1_5": (1_418_270_720 - 51_200, 2048, 0),
    "stabilityai/stablelm-2-1_6b": (1_644_515_328, 2048, 0),
    "Qwen/Qwen1.5-1.8B": (1_836_828_672, 2048, 0),
    "openbmb/MiniCPM-2B-history": (2_724_880_896, 2304, 1),
    "microsoft/Phi-3-mini-4k-instruct": (3_821_079_552, 3072, 0),
    "meta-llama/Meta-Llama-3-8B-Instruct": (8_030_261_248, 4096, 2 * 64),
    "lmsys/vicuna-7b-v1.5": (6_738_415_616, 4096, 2 * 64),
    "lmsys/vicuna-13b-v1.5": (13_015_864_320, 5120, 2 * 64),
    "google/gemma-2b-it": (2_506_172_416, 2048, 64),
    "google/gemma-7b-it": (8_537_680_896, 3072, 64),
}
# llava-hf's own checkpoints, in all.
KNOWN = {"llava_1_5_7b": 7_063_427_072, "llava_1_5_13b": 13_351_494_656}


def load(name, settings=()):
    return configuration.load(str(pipeline.find(name)), settings)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_has_the_published_size(name):
    options = load(name).model
    model, vision = blueprint(options)
    tower, width, tokens = TOWERS[options.tower]
    lm, hidden, rows = LANGUAGE_MODELS[options.lm]
    projector = (options.scales * width + 1) * hidden + (hidden + 1) * hidden
    total = sum(p.numel() for p in model.parameters())
    assert total == tower + lm + rows * hidden + projector
    assert total == KNOWN.get(name, total)
    assert vision.tokens_per_image == model.config.image_seq_length == tokens
    assert options.scales == (3 if "v1_1" in name else 1)
    assert bool(limits(model.config)) == (options.tower == EVA or options.scales > 1)


def stop_at_once(self):
    self.received = True
    return self


def train(name, stage, options, data, out, monkeypatch, align=None):
    """A stage of two steps, stopped by a signal after the first and gone on with."""
    with monkeypatch.context() as patch:
        patch.setattr(loop.StopSignal, "__enter__", stop_at_once)
        with pytest.raises(Interrupted):
            run_stage(stage, options, str(data), out, align=align)
    result = run_stage(stage, options, str(data), out, align=align)["result"]
    assert result["steps"] == 2 and result["skipped"] == {} and result["samples"] > 0
    return out


SMALL = ["model.shrink=tiny", "model.max_length=1024", "finetune.lora_rank=2", "finetune.lora_alpha=4"]
SMALL += [f"{stage}.{key}" for stage in ("align", "finetune") for key in ("steps=2", "batch_size=2", "workers=0")]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_goes_from_pixels_to_an_answer(name, world, tmp_path, monkeypatch):
    options = load(name, [*SMALL, "export.dtype=fp32"])
    align = None
    if "unaligned" not in name:
        align = train(name, "align", options, world / "captions", tmp_path / "align", monkeypatch)
    run = train(name, "finetune", options, world / "mixed", tmp_path / "run", monkeypatch, align)
    export(run, tmp_path / "model", dtype="fp32")
    (tmp_path / "x.png").write_bytes(picture("red", True, 0))
    assert isinstance(ask(tmp_path / "model", str(tmp_path / "x.png"), "what colour is it ?", 3), str)

    from transformers import AutoConfig, AutoModelForImageTextToText

    model, processor = load_native(tmp_path / "model", torch.float32)
    assert len(model.config.text_config.architectures) == 1
    native = type(AutoConfig.from_pretrained(tmp_path / "model").vision_config).__module__.startswith("transformers.")
    assert native == (not limits(model.config))
    if not native:
        with pytest.raises(UsageError, match="no converter knows it"):
            export(tmp_path / "model", tmp_path / "parts", dtype="fp32", parts=True)
        assert not (tmp_path / "parts").exists(), "a refusal leaves nothing behind"
    _, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    spare = {"lm_head.bias"} if options.model.lm.lower().rpartition("/")[2].startswith("phi") else set()  # 0, for vLLM
    assert not info["missing_keys"] and set(info["unexpected_keys"]) <= spare
    composed = compose(options.model)
    encoder = make_encoder(composed, options.model, options.finetune)
    assert_serves_the_ids_of_training(processor, world / "mixed", encoder, 5, 1024)
    ids = torch.tensor([[1, *[composed.image_id] * composed.vision.tokens_per_image, 260, 40, 41]])
    size = composed.vision.image_size
    pixels = torch.randint(0, 255, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        served = model(input_ids=ids, pixel_values=normalise(pixels, composed.vision, torch.float32)).logits
        torch.testing.assert_close(served, trained_logits(composed, options, run, ids, pixels), rtol=0, atol=1e-5)


def trained_logits(composed, options, run, ids, pixels):
    """Logits of a row as it stood in training, adapters unmerged."""
    trainable = prepare(composed, options.finetune)
    for name, tensor in checkpoint.load_trained(run).items():
        trainable[name].copy_(tensor)
    composed.model.eval()
    hidden = hidden_states(composed, ids, torch.arange(ids.shape[1])[None], tower_features(composed, pixels))
    return composed.model.lm_head(hidden)
