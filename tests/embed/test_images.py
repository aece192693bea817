"""What people have as pictures: every one is decoded and seen, or named with the reason."""

import io
import struct
import zlib

import numpy as np
import pytest
import tiny_clip
from PIL import Image, ImageDraw
from test_embed import QUIET, make_tar, table_of, vectors_of
from test_encoder import FORMATS, photograph, saved

from curate.embed import images
from curate.embed.embed import EmbedOptions, embed
from curate.errors import UsageError
from curate.storage import sidecar
from curate.storage.tar import IMAGE_SUFFIXES, suffix_of
from house import curate, manifest


def strokes(seed, size=64):
    """Draw a mask of a few shapes, each picture its own."""
    rng = np.random.default_rng(seed)
    mask = Image.new("L", (size, size))
    for _ in range(3):
        x, y = rng.integers(0, size - 24, 2).tolist()
        ImageDraw.Draw(mask).rectangle((x, y, x + int(rng.integers(8, 24)), y + int(rng.integers(8, 24))), fill=255)
    return mask


def in_alpha(seed, colour="black"):
    image = Image.new("RGBA", (64, 64), colour)
    image.putalpha(strokes(seed))
    return saved(image, "PNG")


def deep(seed, low=20_000, high=21_000, kind=np.uint16):
    mask = np.asarray(strokes(seed), np.float64) / 255
    return Image.fromarray((low + (high - low) * mask).astype(kind))


DRAWINGS = {
    "16-bit png": lambda seed: saved(deep(seed), "PNG"),
    "16-bit tif": lambda seed: saved(deep(seed), "TIFF"),
    "32-bit tif": lambda seed: saved(deep(seed, 70_000, 90_000, np.int32), "TIFF"),
    "float tif": lambda seed: saved(deep(seed, 0.001, 0.002, np.float32), "TIFF"),
    "negative float tif": lambda seed: saved(deep(seed, -0.9, -0.1, np.float32), "TIFF"),
    "black in alpha": in_alpha,
    "white in alpha": lambda seed: in_alpha(seed, "white"),
    "webp in alpha": lambda seed: saved(Image.open(io.BytesIO(in_alpha(seed))), "WEBP", lossless=True),
    "grey in alpha": lambda seed: saved(Image.open(io.BytesIO(in_alpha(seed))).convert("LA"), "PNG"),
}


@pytest.mark.parametrize("kind", DRAWINGS)
def test_deep_and_transparent_pictures_are_seen_and_not_all_alike(kind):
    shown = [images.visible(images.decode(DRAWINGS[kind](seed))) for seed in range(8)]
    assert all(image.mode in ("L", "RGB") for image in shown)
    pixels = np.stack([np.asarray(image.convert("L"), np.float64) for image in shown])
    for image, seed in zip(pixels, range(8), strict=True):
        mask = np.asarray(strokes(seed), np.float64)
        assert abs(np.corrcoef(image.ravel(), mask.ravel())[0, 1]) > 0.99
    hashes = [images.perceptual_hash(image) for image in shown]
    assert None not in hashes and len(set(hashes)) == 8


@pytest.mark.parametrize("name", FORMATS)
def test_ordinary_pictures_are_given_on_as_they_are(name):
    image = images.decode(FORMATS[name]())
    changed = name in ("sixteen_bit.png", "rgba.png", "transparent_palette.png")
    assert (images.visible(image) is not image) == changed


def test_values_that_are_not_finite_and_flat_depths_do_not_spoil_a_picture():
    values = np.asarray(deep(1, 0.0, 1.0, np.float32)).copy()
    expected = np.asarray(images.visible(Image.fromarray(values.copy())))
    values[0, 0], values[0, 1], values[0, 2] = np.nan, np.inf, -np.inf
    seen = np.asarray(images.visible(Image.fromarray(values)))
    assert (seen[0, :3] == 0).all() and (seen[1:] == expected[1:]).all()
    for flat in (np.full((9, 9), 7, np.uint16), np.full((9, 9), np.nan, np.float32)):
        assert len(np.unique(np.asarray(images.visible(Image.fromarray(flat))))) == 1


@pytest.mark.parametrize("colour", ["red", "white", "black", (12, 200, 30)])
def test_a_picture_without_structure_has_no_hash(colour):
    plain = Image.new("RGB", (80, 60), colour)
    assert images.perceptual_hash(plain) is None
    assert images.perceptual_hash(images.decode(saved(plain, "JPEG", quality=30))) is None
    drawn = plain.copy()
    ImageDraw.Draw(drawn).rectangle((20, 20, 40, 40), fill="blue")
    assert images.perceptual_hash(drawn) is not None


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(png, extra, *, before=b"IDAT"):
    at = png.index(before) - 4
    return png[:at] + extra + png[at:]


PNG = saved(photograph(), "PNG")
BIG = bytes(3 << 20)
NOTED = {
    "profile": with_chunk(PNG, chunk(b"iCCP", b"profile\0\0" + zlib.compress(BIG))),
    "packed text": with_chunk(PNG, chunk(b"zTXt", b"note\0\0" + zlib.compress(BIG))),
    "international text": with_chunk(PNG, chunk(b"iTXt", b"note\0\1\0\0\0" + zlib.compress(BIG))),
    "text after the pixels": with_chunk(PNG, chunk(b"zTXt", b"note\0\0" + zlib.compress(BIG)), before=b"IEND"),
    "a hundred texts": with_chunk(PNG, chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(1 << 20))) * 100),
}


@pytest.mark.parametrize("kind", NOTED)
def test_pngs_with_large_profiles_and_texts_decode(kind):
    assert np.array_equal(np.asarray(images.decode(NOTED[kind])), np.asarray(photograph()))


def test_avif_decodes_under_any_name():
    blob = saved(photograph(), "AVIF", quality=95)
    assert suffix_of(blob) == "avif"
    difference = np.asarray(images.decode(blob), np.int64) - np.asarray(photograph(), np.int64)
    assert np.abs(difference).mean() < 6


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64)
BROKEN = {
    b"<!DOCTYPE html><html>": ("decode_error", "a web page or other text"),
    bytes(range(200)): ("decode_error", "not an image of a known format"),
    saved(photograph(), "JPEG")[:-300]: ("decode_error", "truncated"),
    PNG[:-200]: ("decode_error", "truncated"),
    HEIC: ("no_decoder", "HEIC is not decoded here"),
    b"\xff\x0a" + bytes(64): ("no_decoder", "JPEG XL is not decoded here"),
    b"": ("empty_image", ""),
}


@pytest.mark.parametrize("blob", BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_decoded_says_why_in_the_same_words_each_time(blob):
    with pytest.raises(images.BadImage) as bad:
        images.decode(blob)
    with pytest.raises(images.BadImage) as again:
        images.decode(bytes(blob))
    status, words = BROKEN[blob]
    assert bad.value.status == status and words in bad.value.reason and "0x" not in bad.value.reason
    assert bad.value.reason == again.value.reason


def test_every_suffix_and_every_depth_goes_through_embed(tmp_path):
    model = tiny_clip.write(tmp_path / "clip")
    kinds = {
        "a.avif": saved(photograph(1), "AVIF"),
        "b.jfif": saved(photograph(2), "JPEG"),
        "c.jpe": saved(photograph(3), "JPEG"),
        "d.heic": HEIC,
        "e.jxl": b"\xff\x0a" + bytes(64),
        "f.jpg": saved(photograph(4), "AVIF"),
        "g.jpg": saved(photograph(5), "JPEG")[:-300],
        "h.png": saved(Image.new("RGB", (40, 40), "white"), "PNG"),
    }
    assert {name[2:] for name in kinds} <= set(IMAGE_SUFFIXES)
    members = [part for name, data in kinds.items() for part in ((name, data), (f"{name[0]}.txt", b"words"))]
    for seed in range(8):
        members += [(f"deep{seed}.png", saved(deep(seed), "PNG")), (f"deep{seed}.txt", b"words")]
        members += [(f"thin{seed}.png", in_alpha(seed)), (f"thin{seed}.txt", b"words")]
    pool = make_tar(tmp_path / "pool" / "00000.tar", members)
    ended = curate("embed", pool, tmp_path / "emb", "--model", model)
    rows = {row["key"]: row for row in table_of(tmp_path / "emb")}
    assert [rows[key]["status"] for key in "abcdefgh"] == [
        *["ok"] * 3,
        *["no_decoder"] * 2,
        "ok",
        "decode_error",
        "ok",
    ]
    assert rows["h"]["phash"] is None
    facts = manifest(tmp_path / "emb")["faults"]
    assert sorted((kind.split(":")[0], fault["count"]) for kind, fault in facts.items()) == [
        ("decode_error", 1),
        ("no_decoder", 1),
        ("no_decoder", 1),
    ]
    assert "embed: 1 × no_decoder: HEIC" in ended.stderr and "00000: g" in ended.stderr
    reasons = sidecar.facts(f"{tmp_path}/emb/00000.arrow")["reasons"]
    assert set(reasons) == {"3", "4", "6"} and "truncated" in reasons["6"]
    drawn = [number for number, key in enumerate(rows) if key.startswith(("deep", "thin"))]
    made = vectors_of(tmp_path / "emb", "00000", "image_embedding")[drawn]
    assert np.triu(made @ made.T, 1).max() < 0.9999

    curate("embed", pool, tmp_path / "faithful", "--model", model, "--faithful")
    seen = vectors_of(tmp_path / "faithful", "00000", "image_embedding")[drawn]
    assert (seen[::2] @ seen[::2].T).min() > 0.999, "open_clip's own transform makes them all white"
    refused = curate("embed", pool, tmp_path / "emb", "--model", model, "--faithful", check=False)
    assert refused.returncode == 2 and "faithful" in refused.stderr
    embed(pool, str(tmp_path / "emb"), EmbedOptions(model), QUIET)

    fast = embed(pool, str(tmp_path / "fast"), EmbedOptions(model, decode="fast"), QUIET)
    assert fast["options"]["decode"] == "fast" and "decode" not in manifest(tmp_path / "emb")["options"]
    quick = vectors_of(tmp_path / "fast", "00000", "image_embedding")[drawn]
    assert (quick * made).sum(axis=1).min() > 0.999
    with pytest.raises(UsageError, match="fast, full, gpu"):
        embed(pool, str(tmp_path / "none"), EmbedOptions(model, decode="draft"), QUIET)


def test_a_picture_far_longer_than_wide_is_cut_before_it_is_enlarged():
    look = {"size": (224, 224), "mode": "RGB", "interpolation": "bicubic", "resize_mode": "shortest", "fill_color": 0}
    stripes = np.random.default_rng(0).integers(0, 256, (2001, 7, 3), dtype=np.uint8)
    made = images.transform(look)(Image.fromarray(stripes))
    image = Image.fromarray(stripes)
    for step in images._steps(look):
        image = step(image)
    assert np.array_equal(made, image)
    assert images.transform(look)(Image.new("RGB", (1, 60_000))).shape == (224, 224, 3)
