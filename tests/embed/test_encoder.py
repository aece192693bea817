import io
import json
import pickle
import shutil

import numpy as np
import pytest
import tiny_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from curate.embed import encoder as encoders
from curate.embed import images
from curate.embed.encoder import Encoder, choose_precision, single_threaded
from curate.embed.weights import CONFIG, find
from curate.errors import UsageError
from curate.storage import tar
from house import REAL_DATA

CAPTIONS = ["a red circle", "", "word " * 200, "two dogs on a beach, 1999", "ünïcödé ☃ 漢字"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One model folder of each kind."""
    root = tmp_path_factory.mktemp("models")
    for kind in tiny_clip.KINDS:
        tiny_clip.write(root / kind, kind)
    return root


def photograph(seed=0, size=(90, 60)):
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (6, 9, 3), np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(photograph(5), "JPEG", exif=exif)


def sixteen_bit():
    rng = np.random.default_rng(3)
    return saved(Image.fromarray(rng.integers(0, 65535, (50, 70), np.uint16)), "PNG")


FORMATS = {
    "rgb.jpg": lambda: saved(photograph(), "JPEG"),
    "grey.jpg": lambda: saved(photograph().convert("L"), "JPEG"),
    "cmyk.jpg": lambda: saved(photograph().convert("CMYK"), "JPEG"),
    "progressive.jpg": lambda: saved(photograph(), "JPEG", progressive=True, quality=40),
    "palette.png": lambda: saved(photograph().quantize(16), "PNG"),
    "transparent_palette.png": lambda: saved(photograph().quantize(16), "PNG", transparency=3),
    "rgba.png": lambda: saved(Image.merge("RGBA", (*photograph().split(), photograph(9).split()[0])), "PNG"),
    "grey_alpha.png": lambda: saved(photograph().convert("LA"), "PNG"),
    "one_bit.png": lambda: saved(photograph().convert("1"), "PNG"),
    "sixteen_bit.png": sixteen_bit,
    "rotated.jpg": rotated,
    "lossy.webp": lambda: saved(photograph(), "WEBP"),
    "still.gif": lambda: saved(photograph(), "GIF"),
    "moving.gif": lambda: saved(photograph(), "GIF", save_all=True, append_images=[photograph(7)]),
    "one_pixel.png": lambda: saved(photograph(size=(1, 1)), "PNG"),
    "thin.png": lambda: saved(photograph(size=(400, 3)), "PNG"),
    "plain.bmp": lambda: saved(photograph(), "BMP"),
    "plain.tif": lambda: saved(photograph(), "TIFF"),
}


def reference(model_name, blobs, captions, precision="fp32"):
    """What open_clip itself makes of images and captions: its own transform, tokenizer and encode functions."""
    import open_clip
    import torch

    model, _, preprocess = open_clip.create_model_and_transforms(model_name, precision=precision)
    model.eval()
    tokenizer = open_clip.get_tokenizer(model_name)
    dtype = open_clip.get_input_dtype(precision)
    with torch.inference_mode():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(blob))) for blob in blobs])
        image = model.encode_image(pixels.to(dtype or torch.float32), normalize=True)
        text = model.encode_text(tokenizer(captions), normalize=True)
    return image.float().numpy(), text.float().numpy()


def ours(model_name, blobs, captions, precision="fp32"):
    source = find(model_name)
    encoder = Encoder(source, precision, "cpu")
    transform = images.transform(encoder.preprocess)
    pixels = np.stack([transform(images.decode(blob)) for blob in blobs])
    return encoder.images(pixels), encoder.texts(encoders.Tokenizer(source)(captions))


def cosines(a, b):
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize("kind", tiny_clip.KINDS)
def test_vectors_equal_open_clips_own_transform_and_forward(folder, kind):
    blobs = [make() for name, make in FORMATS.items() if name != "thin.png"]
    name = f"local-dir:{folder / kind}"
    expected_image, expected_text = reference(name, blobs, CAPTIONS)
    image, text = ours(name, blobs, CAPTIONS)
    assert cosines(image, expected_image).min() >= 0.99999
    assert cosines(text, expected_text).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(image, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("kind", tiny_clip.KINDS)
def test_half_precision_stays_close_to_full(folder, kind):
    blobs = [make() for name, make in FORMATS.items() if name != "thin.png"]
    name = f"local-dir:{folder / kind}"
    expected_image, expected_text = reference(name, blobs, CAPTIONS)
    image, text = ours(name, blobs, CAPTIONS, "bf16")
    assert cosines(image, expected_image).min() >= 0.999
    assert cosines(text, expected_text).min() >= 0.999


@pytest.mark.realdata
@pytest.mark.parametrize("precision, least", [("fp32", 0.9999), ("bf16", 0.999)])
def test_vectors_equal_open_clips_on_real_photographs(folder, precision, least):
    with open(REAL_DATA / "pairs" / "00000.tar", "rb") as file:
        samples = tar.read_index(file).samples[:48]
        blobs = [tar.read_member(file, sample.image) for sample in samples]
        captions = [tar.read_member(file, sample.member("txt")).decode() for sample in samples]
    name = f"local-dir:{folder / 'clip'}"
    for made, expected in zip(ours(name, blobs, captions, precision), reference(name, blobs, captions), strict=True):
        assert cosines(made, expected).min() >= least


@pytest.mark.parametrize("kind, cut", [("clip", True), ("custom", True), ("siglip", False), ("coca", False)])
def test_captions_are_cut_only_where_padding_cannot_matter(folder, kind, cut):
    source = find(f"local-dir:{folder / kind}")
    encoder = Encoder(source, "fp32", "cpu")
    tokens = encoders.Tokenizer(source)(CAPTIONS)
    lengths = encoder.lengths(tokens)
    assert encoder.cuts == cut
    assert list(lengths[:2]) == ([5, 2] if cut else [tokens.shape[1]] * 2)
    together = encoder.texts(tokens)
    alone = np.concatenate([encoder.texts(tokens[row : row + 1]) for row in range(len(tokens))])
    np.testing.assert_allclose(together, alone, atol=2e-6)


def test_a_tower_read_out_at_an_end_token_is_cut_there(tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    monkeypatch.setitem(
        tiny_clip.KINDS,
        "eos",
        {
            "text": {
                "context_length": 12,
                "vocab_size": 9,
                "pool_type": "eos",
                "eos_id": 1,
                "hf_tokenizer_name": "its own",
            }
        },
    )
    words = ["<pad>", "<eos>", "<unk>", "a", "red", "blue", "dog", "cat", "on"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    name = tiny_clip.write(tmp_path / "eos", "eos")
    tokenizer.save(str(tmp_path / "eos" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (tmp_path / "eos" / "tokenizer_config.json").write_text(json.dumps({**config, "unk_token": "<unk>"}))
    captions = ["a red dog", "cat", "a blue cat on a red dog on a blue cat on a dog", ""]
    blobs = [FORMATS["rgb.jpg"]()]
    _, text = ours(name, blobs, captions)
    assert cosines(text, reference(name, blobs, captions)[1]).min() >= 0.99999
    source = find(name)
    assert list(Encoder(source, "fp32", "cpu").lengths(encoders.Tokenizer(source)(captions))) == [4, 2, 12, 1]


def test_one_thread_or_many_give_the_same_bits(folder):
    from concurrent.futures import ThreadPoolExecutor

    import torch

    encoder = Encoder(find(f"local-dir:{folder / 'clip'}"), "fp32", "cpu")
    batches = [np.random.default_rng(seed).integers(0, 255, (8, 32, 32, 3), np.uint8) for seed in range(6)]
    tokens = [np.random.default_rng(seed).integers(1, 49408, (8, 77)).astype(np.int32) for seed in range(6)]
    before = torch.get_num_threads()
    with single_threaded():
        alone = [encoder.images(batch) for batch in batches], [encoder.texts(batch) for batch in tokens]
        with ThreadPoolExecutor(3) as pool:
            beside = list(pool.map(encoder.images, batches)), list(pool.map(encoder.texts, tokens))
    assert torch.get_num_threads() == before
    for one, other in zip(alone, beside, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_network_of_convolutions_sees_channels_side_by_side(folder, tmp_path):
    import open_clip
    import torch

    config = tiny_clip.config_of("custom")
    network = {"timm_model_name": "test_efficientnet", "timm_model_pretrained": False, "timm_pool": "avg"}
    config["model_cfg"]["vision_cfg"] = {**network, "timm_proj": "linear", "image_size": 64}
    name = tiny_clip.write(tmp_path / "conv", config=config)
    encoder, seen = Encoder(find(name), "fp32", "cpu"), []
    first = next(m for m in encoder.model.visual.modules() if isinstance(m, torch.nn.Conv2d))
    first.register_forward_hook(lambda _, given, __: seen.append(given[0].is_contiguous()))
    pixels = np.random.default_rng(0).integers(0, 255, (3, 64, 64, 3), np.uint8)
    ours = encoder.images(pixels)
    assert seen == [False]
    mean, std = (np.float32(encoder.preprocess[name]) for name in ("mean", "std"))
    plain = torch.from_numpy(((pixels / np.float32(255) - mean) / std).transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        theirs = open_clip.create_model(name).eval().encode_image(plain).numpy()
    theirs /= np.linalg.norm(theirs, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_text_tower_that_masks_its_padding_runs_at_the_captions_length(tmp_path):
    import open_clip
    import torch
    from transformers import BertConfig

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertConfig(vocab_size=99, **small).save_pretrained(tmp_path / "bert")
    config = tiny_clip.config_of("custom")
    text = {"hf_model_name": str(tmp_path / "bert"), "hf_model_pretrained": False, "context_length": 20}
    config["model_cfg"]["text_cfg"] = {**text, "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}
    name = tiny_clip.write(tmp_path / "model", config=config)
    encoder = Encoder(find(name), "fp32", "cpu")
    tokens = np.random.default_rng(0).integers(1, 99, (4, 20)).astype(np.int32)
    lengths = [3, 7, 1, 0]
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = 0
    assert list(encoder.lengths(tokens)) == [3, 7, 1, 1]
    seen = []
    encoder.model.text.transformer.register_forward_pre_hook(
        lambda _, given, named: seen.append(named["input_ids"].shape[1]), with_kwargs=True
    )
    ours = encoder.texts(tokens[:3])
    assert seen == [7]
    with torch.no_grad():
        whole = (
            open_clip.create_model(name, pretrained_text=False)
            .eval()
            .encode_text(torch.from_numpy(tokens[:3]).long())
            .numpy()
        )
    np.testing.assert_allclose(ours, whole / np.linalg.norm(whole, axis=1, keepdims=True), atol=1e-5)


def test_weights_may_lie_apart_from_their_config(folder, tmp_path):
    blobs = [FORMATS["rgb.jpg"]()]
    expected = ours(f"local-dir:{folder / 'clip'}", blobs, CAPTIONS)
    weights = folder / "clip" / "open_clip_model.safetensors"
    bare = tmp_path / "tiny-of-mine.json"
    bare.write_text(json.dumps(tiny_clip.config_of("clip")["model_cfg"]))
    (tmp_path / "empty").mkdir()
    shutil.copy(folder / "clip" / CONFIG, tmp_path / "empty")
    for model in (str(bare), str(tmp_path / "empty"), str(tmp_path / "empty" / CONFIG)):
        source = find(model, str(weights))
        encoder = Encoder(source, "fp32", "cpu")
        pixels = np.stack([images.transform(encoder.preprocess)(images.decode(blob)) for blob in blobs])
        assert np.array_equal(encoder.images(pixels), expected[0])
        assert np.array_equal(encoder.texts(encoders.Tokenizer(source)(CAPTIONS)), expected[1])


def test_a_torch_checkpoint_loads_and_a_pickle_does_not(folder, tmp_path):
    import torch
    from safetensors.torch import load_file

    state = load_file(str(folder / "clip" / "open_clip_model.safetensors"))
    (tmp_path / "model").mkdir()
    shutil.copy(folder / "clip" / CONFIG, tmp_path / "model")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model" / "epoch_3.pt")
    source = find(str(tmp_path / "model"))
    assert Encoder(source, "fp32", "cpu").dim == 48

    class Trap:
        def __reduce__(self):
            return open, (str(tmp_path / "sprung"), "w")

    for write in (
        lambda path: torch.save({"state_dict": state, "extra": Trap()}, path),
        lambda path: path.write_bytes(pickle.dumps(Trap(), protocol=2)),
    ):
        write(tmp_path / "model" / "epoch_3.pt")
        with pytest.raises(UsageError, match="never loaded"):
            Encoder(find(str(tmp_path / "model")), "fp32", "cpu")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "model, pretrained, words",
    [
        ("ViT-B-33", "x", ["unknown model 'ViT-B-33'", "ViT-B-32"]),
        ("ViT-B-32", "", ["--pretrained", "laion2b_s34b_b79k"]),
        ("ViT-L-14", "", [" laion400m_e32", "(openai", ": ViT-L-14-quickgelu)"]),
        ("ViT-B-32", "laion2b_s34b_b79q", ["unknown pretrained tag", "did you mean 'laion2b_s34b_b79k'"]),
        ("ViT-B-32", "laion2b_s34b_b79k", ["cannot be found or downloaded", "--pretrained PATH"]),
        ("ViT-B-32", "openai", ["a different activation", "ViT-B-32-quickgelu"]),
        ("ViT-B-32", "no/such/file.pt", ["do not exist"]),
        ("hf-hub:nobody/nothing", "", ["cannot be found or downloaded", "--pretrained PATH"]),
        ("hf-hub:nobody/nothing", "nowhere.pt", ["nowhere.pt", "do not exist"]),
        ("local-dir:/no/such/folder", "", [CONFIG]),
        ("/no/such.json", "", ["does not exist"]),
    ],
)
def test_a_model_that_cannot_be_had_is_refused_in_one_line(model, pretrained, words):
    with pytest.raises(UsageError) as refused:
        find(model, pretrained)
    assert "\n" not in str(refused.value)
    assert all(word in str(refused.value) for word in words), str(refused.value)


def test_weights_that_do_not_fit_and_configs_that_are_none_are_refused(folder, tmp_path):
    other = folder / "custom" / "open_clip_model.safetensors"
    with pytest.raises(UsageError, match="does not fit"):
        Encoder(find(str(folder / "siglip"), str(other)), "fp32", "cpu")
    for content in ("{", "[]", '{"embed_dim": 3}', '"embed_dim"'):
        (tmp_path / "odd.json").write_text(content)
        with pytest.raises(UsageError):
            find(str(tmp_path / "odd.json"), str(other))
    (tmp_path / CONFIG).write_text("{")
    shutil.copy(other, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="cannot be built"):
        Encoder(find(str(tmp_path)), "fp32", "cpu")


def test_precision_is_chosen_by_capability_and_size_and_says_why(folder):
    small = find(str(folder / "clip"))
    assert choose_precision("auto", "cpu", small)[0] == "fp32"
    assert choose_precision("bf16", "cpu", small) == ("bf16", "as asked")
    with pytest.raises(UsageError, match="fp32"):
        choose_precision("fp23", "cpu", small)


@pytest.mark.parametrize("name", FORMATS)
def test_pixels_are_bit_for_bit_those_of_open_clips_transform(name):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    blob = FORMATS[name]()
    for look in ({}, tiny_clip.SIGLIP_LOOK, {"resize_mode": "longest", "fill_color": 9}, {"size": (40, 64)}):
        if name == "thin.png" and look.get("resize_mode") == "longest":
            continue  # open_clip itself fails: nothing is left of its height
        look = {"size": 48, **look}
        expected = image_transform_v2(PreprocessCfg(**{**look, "mean": (0.0,) * 3, "std": (1.0,) * 3}), is_train=False)
        pixels = images.transform(look)(images.decode(blob))
        assert np.array_equal(pixels, np.rint(expected(Image.open(io.BytesIO(blob))).numpy().transpose(1, 2, 0) * 255))


@pytest.mark.parametrize("size, mode", [(24, "shortest"), ((20, 30), "squash")])
def test_resized_by_torch_pixels_are_off_by_two_at_most(size, mode):
    config = {"size": size, "resize_mode": mode}
    slow, fast = images.transform(config), images.transform(config, fast=True)
    for name, make in FORMATS.items():
        image = images.decode(make())
        expected, found = slow(image).astype(int), fast(image).astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).max() <= 2, name


@pytest.mark.parametrize(
    "data, status",
    [
        (b"", "empty_image"),
        (b"<html>404</html>", "decode_error"),
        (saved(photograph(), "JPEG")[:-400], "decode_error"),
        (saved(photograph(), "PNG")[:60], "decode_error"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "decode_error"),
        (saved(Image.new("L", (300, 300)), "PNG"), "too_large"),
        (saved(Image.new("1", (20_000, 20_000)), "PNG"), "too_large"),
    ],
)
def test_what_is_no_usable_image_has_a_status(data, status):
    with pytest.raises(images.BadImage) as bad:
        images.decode(data, max_pixels=80_000)
    assert bad.value.status == status


def test_the_pixel_limit_may_be_raised_above_pillows_own():
    flat = saved(Image.new("1", (14_000, 13_000)), "PNG")
    with pytest.raises(images.BadImage, match="too_large"):
        images.decode(flat)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_damaged_images_never_crash(name, data):
    blob = bytearray(FORMATS[name]())
    for _ in range(data.draw(st.integers(1, 6))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    blob = bytes(blob[: data.draw(st.integers(0, len(blob)))])
    try:
        image = images.decode(blob, 1_000_000)
        bits = images.perceptual_hash(images.visible(image))
        assert bits is None or 0 <= bits < 2**64
        assert images.transform({"size": 32})(image).shape == (32, 32, 3)
    except images.BadImage as bad:
        assert bad.status in ("empty_image", "too_large", "decode_error")


def slow_hash(image):
    """The perceptual hash from its description, with a plain floating-point DCT."""
    import scipy.fft

    small = np.asarray(image.convert("RGB").convert("L").resize((32, 32), Image.Resampling.BOX), float)
    low = scipy.fft.dctn(small, type=2)[1:9, 1:9].reshape(-1)
    return sum(1 << (63 - place) for place in range(64) if low[place] > np.median(low))


def test_the_hash_is_that_of_its_description_and_survives_what_it_should():
    close, far = [], []
    for seed in range(12):
        image = photograph(seed, (160, 120))
        bits = images.perceptual_hash(image)
        assert (bits ^ slow_hash(image)).bit_count() <= 1  # whole-number cosines may differ at the median itself
        worn = Image.open(io.BytesIO(saved(image.resize((100, 75)), "JPEG", quality=60)))
        close.append((bits ^ images.perceptual_hash(worn)).bit_count())
        far.append((bits ^ images.perceptual_hash(photograph(seed + 100, (160, 120)))).bit_count())
    assert max(close) <= 10 < 16 <= min(far)
    assert images.perceptual_hash(Image.new("RGB", (50, 50), "red")) is None
