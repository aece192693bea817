"""Finer hashes and writing: copies agree, other prints on one template do not, and lettering is told from shapes."""

import numpy as np
import photos
import pytest
from PIL import Image, ImageDraw, ImageFilter, ImageOps

from curate.demo import world
from curate.embed import details, images
from curate.select.steps.same_picture import MOST_BITS, detail_bits


def scene(seed, side=240):
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8))
    return rough.resize((side, side), Image.Resampling.BICUBIC)


def hashed(image):
    return np.frombuffer(details.describe(image)["detail"], np.uint8)


def bits(one, other):
    return int(detail_bits(hashed(one)[None], hashed(other)[None])[0])


def cut(share):
    return lambda image: image.crop([round(share * 240)] * 2 + [240 - round(share * 240)] * 2)


COPIES = {
    **photos.VARIANTS,
    "cut by 2 %": cut(0.02),
    "cut by 6 %": cut(0.06),
    "cut and mirrored": lambda image: ImageOps.mirror(cut(0.04)(image)),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_agree_in_their_finer_hashes(name):
    found = [bits(scene(seed), COPIES[name](scene(seed))) for seed in range(12)]
    most = 22 if name == "captioned" else MOST_BITS  # a printed line is seen, if less than another print (30)
    assert np.mean(np.array(found) <= most) >= 0.9, found


def shirt(print_seed):
    image = Image.new("RGB", (240, 240), "white")
    draw = ImageDraw.Draw(image)
    draw.polygon(
        [(20, 60), (70, 15), (170, 15), (220, 60), (195, 95), (180, 85), (180, 230), (60, 230), (60, 85)], "grey"
    )
    image.paste(scene(print_seed).resize((80, 90)), (80, 60))
    return image


def test_two_prints_on_one_shirt_agree_in_the_coarse_hash_and_not_in_the_finer():
    prints = [shirt(seed) for seed in range(8)]
    coarse = [images.perceptual_hash(each) for each in prints]
    pairs = [(i, j) for i in range(8) for j in range(i)]
    assert all((coarse[i] ^ coarse[j]).bit_count() <= 16 for i, j in pairs)
    assert np.mean([bits(prints[i], prints[j]) > MOST_BITS for i, j in pairs]) > 0.9
    assert bits(prints[0], prints[0]) == 0


def test_the_finer_hash_is_the_signs_of_the_slow_transform():
    small = images.grey_cells(scene(3), 32)
    stored = np.unpackbits(np.frombuffer(details.detail_hash(small), np.uint8)).reshape(4, 144)
    waves = [[np.cos(np.pi * f * (2 * x + 1) / 64) for x in range(32)] for f in range(1, 13)]
    slow = np.array([[np.sum(small * np.outer(down, across)) for across in waves] for down in waves]).ravel()
    assert (stored[0] == (slow > np.median(slow))).mean() > 0.97  # waves are rounded to whole numbers


def test_a_plain_picture_has_no_finer_hash_and_is_no_writing():
    told = details.describe(Image.new("RGB", (50, 60), (200, 30, 30)))
    assert told == {"phash": None, "detail": None, "writing": False}


def test_printed_words_are_writing_and_shapes_and_photographs_are_not():
    rng = np.random.default_rng(0)
    scenes = world.sample_scenes(rng, world.choose_concepts(rng, 60))
    shapes = [details.is_writing(images.grey_cells(Image.fromarray(world.draw(each, rng)), 64)) for each in scenes]
    scenes["printed"] = True
    words = [Image.fromarray(world.draw(each, rng, label=True)) for each in scenes]
    assert np.mean(shapes) < 0.1 and np.mean([details.describe(each)["writing"] for each in words]) > 0.9
    inverted = [details.describe(ImageOps.invert(each))["writing"] for each in words]
    assert np.mean(inverted) > 0.8
    assert not any(details.describe(scene(seed).filter(ImageFilter.BLUR))["writing"] for seed in range(12))
