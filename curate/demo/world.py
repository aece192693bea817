"""The demo's world: what its pictures show, what its captions say, and what goes wrong with them.

A picture is 64 x 64 RGB: one shape in one colour, at one of 3 sizes and 3 x 3 places, on one of 8 muted
backgrounds with 4 textures. Each shape x colour is a concept with a three-letter name of its own, so nothing
composes: a model that never saw `rup` cannot guess it, which is what makes coverage of the tail matter.
Concepts follow Zipf's law, in a fixed order of ranks.

`plan` draws a whole pool as two tables of scenes (what is shown; what the caption speaks of) with its faults,
`draw` makes the pixels of one scene. All of it is NumPy, PIL and the generators passed in: the same seed gives the
same pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from curate.demo.words import GROUNDS, NAMES, TEXTURES, VAGUE, write_caption

SIDE = 64  # pixels
SHAPES = ("disc", "triangle", "star", "cross", "ring", "heart")
COLOURS = np.array(
    [(214, 40, 40), (240, 130, 30), (240, 215, 50), (150, 215, 40), (30, 140, 60), (50, 205, 215),
     (40, 80, 215), (140, 60, 190), (240, 130, 190), (245, 245, 245)], np.float32,
)  # fmt: skip
GROUND_COLOURS = np.array(
    [(70, 120, 120), (120, 120, 70), (115, 65, 75), (60, 70, 115), (115, 115, 115), (120, 90, 65), (110, 75, 115),
     (165, 150, 115)], np.float32,
)  # fmt: skip
EXTENT = ((0.28, 0.34), (0.42, 0.50), (0.60, 0.70))  # object size as a share of the side, per name in SIZES
NUM_CONCEPTS = len(SHAPES) * len(COLOURS)
FAULTS = ("clean", "duplicate", "swapped", "cheater", "underspecified")

Scene = np.dtype(
    [("concept", "i2"), ("size", "i1"), ("place", "i1"), ("ground", "i1"), ("texture", "i1"), ("printed", "?"),
     ("extent", "f4"), ("x", "f4"), ("y", "f4"), ("angle", "f4"), ("phase", "i1", 2), ("gain", "f4"),
     ("tint", "f4", 3), ("wash", "f4", 3), ("shift", "i1", 2)]
)  # fmt: skip
Scenes = NDArray[np.void]
Pixels = NDArray[np.float32]


@dataclass(frozen=True)
class Dirt:
    """How a pool is spoilt: copies are a share of all rows, the pair faults a share of the rows that are no copy.

    The shares of DIRT are planted by us (a guess at a raw crawl), not measured on one. `legible`: cheaters print
    their word large and dark on a label, and always describe the rest rightly: the kind that scores high.
    """

    copies: float
    swapped: float = 0.0
    cheaters: float = 0.0
    underspecified: float = 0.0
    legible: bool = False
    zipf: float = 1.0


DIRT = {
    "dirty": Dirt(0.40, 0.25, 0.10, 0.05),
    "half": Dirt(0.15, 0.08, 0.03, 0.02),
    "clean": Dirt(0.02),
    "legible": Dirt(0.40, 0.15, 0.20, 0.05, legible=True),
}


def concept_weights(zipf: float = 1.0) -> NDArray[np.float64]:
    """Return the frequency of each concept, f64 [60], sum 1; which concept is common is fixed for every seed."""
    ranks = np.random.default_rng(20).permutation(NUM_CONCEPTS) + 1.0
    weights: NDArray[np.float64] = np.power(ranks, -zipf)
    weights /= weights.sum()
    return weights


def sample_scenes(rng: np.random.Generator, concepts: NDArray[np.integer]) -> Scenes:
    """Draw one scene for each of the given concepts."""
    n = len(concepts)
    scenes = np.zeros(n, Scene)
    scenes["concept"] = concepts
    for field, count in (("size", 3), ("place", 9), ("ground", len(GROUNDS)), ("texture", len(TEXTURES))):
        scenes[field] = rng.integers(count, size=n)
    low, high = np.array(EXTENT).T
    scenes["extent"] = rng.uniform(low[scenes["size"]], high[scenes["size"]])
    room = 1 - scenes["extent"] - 0.06
    for axis, cell in (("x", scenes["place"] % 3), ("y", scenes["place"] // 3)):
        scenes[axis] = 0.5 + room * (cell - 1) / 2 + rng.uniform(-0.03, 0.03, n)
    scenes["angle"] = np.deg2rad(rng.uniform(-12, 12, n))
    scenes["phase"] = rng.integers(0, 16, (n, 2))
    scenes["gain"] = 1.0
    scenes["tint"] = rng.normal(0, 7, (n, 3))
    scenes["wash"] = rng.normal(0, 7, (n, 3))
    return scenes


def facts(scene: np.void) -> tuple[int, int, int, int, int]:
    """Return what can be said of a scene: the arguments that the functions of demo_words share."""
    return tuple(int(scene[field]) for field in ("concept", "size", "place", "ground", "texture"))  # type: ignore[return-value]


def caption(scene: np.void, rng: np.random.Generator, *, full: bool = False) -> str:
    """Write a caption for a scene."""
    return write_caption(*facts(scene), rng, full=full)


def choose_concepts(rng: np.random.Generator, n: int, zipf: float = 1.0) -> NDArray[np.integer]:
    """Draw n concept numbers by frequency."""
    return rng.choice(NUM_CONCEPTS, n, p=concept_weights(zipf))


@dataclass(frozen=True)
class Plan:
    """A pool before it is drawn; every array has one entry per row. `fault` indexes FAULTS, `source` is a row."""

    shown: Scenes
    told: Scenes  # what the caption speaks of; differs from `shown` in swapped pairs only
    captions: list[str]
    fault: NDArray[np.int8]
    source: NDArray[np.int64]

    @property
    def is_copy(self) -> NDArray[np.bool_]:
        """Bool per row: made from another row of the pool."""
        return np.not_equal(self.source, np.arange(len(self.source)))


def plan(rng: np.random.Generator, rows: int, dirt: Dirt) -> Plan:
    """Plan a pool of `rows` pairs: sources with their faults, near-copies of some of them, in a random order.

    A thirtieth of `rows` is copied from, by weight 1 / rank ** 0.7. A copy has noise of its own, is a little
    lighter or darker, half of them are shifted by a pixel. It inherits its source's fault; half of the
    copies keep the caption word for word, half say the same thing anew.
    """
    copies = round(dirt.copies * rows)
    n = rows - copies
    shown = sample_scenes(rng, choose_concepts(rng, n, dirt.zipf))
    told = shown.copy()
    lot = rng.permutation(n)
    ends = np.round(np.cumsum([dirt.swapped, dirt.cheaters, dirt.underspecified]) * n).astype(int)
    swapped, cheaters, vague, _ = np.split(lot, ends)
    fault = np.zeros(n, np.int8)
    for rows_of, name in ((swapped, "swapped"), (cheaters, "cheater"), (vague, "underspecified")):
        fault[rows_of] = FAULTS.index(name)
    told[swapped] = _others(rng, shown[swapped], dirt.zipf)
    shown["printed"][cheaters] = True
    captions = [caption(scene, rng) for scene in told]
    for row in vague:
        captions[row] = VAGUE[rng.integers(len(VAGUE))]
    if dirt.legible:
        for row in cheaters:
            captions[row] = caption(told[row], rng, full=True)

    bases = rng.choice(n, max(1, min(n, rows // 30)), replace=False)
    weights = np.arange(1, len(bases) + 1) ** -0.7
    origin = bases[rng.choice(len(bases), copies, p=weights / weights.sum())]
    twins = shown[origin]
    twins["shift"] = rng.choice([(0, 0), (0, 0), (0, 0), (0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)], copies)
    twins["gain"] = rng.normal(1, 0.02, copies)
    anew = (rng.random(copies) < 0.5) & (fault[origin] != FAULTS.index("underspecified"))
    twin_captions = [caption(told[o], rng) if a else captions[o] for o, a in zip(origin, anew, strict=True)]
    twin_fault = np.where(fault[origin] == 0, FAULTS.index("duplicate"), fault[origin]).astype(np.int8)

    order = rng.permutation(rows)  # order[i] = the row, sources first, that stands at place i
    place = np.argsort(order)
    all_captions = captions + twin_captions
    return Plan(
        shown=np.concatenate([shown, twins])[order],
        told=np.concatenate([told, told[origin]])[order],
        captions=[all_captions[row] for row in order],
        fault=np.concatenate([fault, twin_fault])[order],
        source=place[np.concatenate([np.arange(n), origin])][order],
    )


def _others(rng: np.random.Generator, shown: Scenes, zipf: float) -> Scenes:
    """Draw a scene of another concept for each given one."""
    concepts = choose_concepts(rng, len(shown), zipf)
    while (same := concepts == shown["concept"]).any():
        concepts[same] = choose_concepts(rng, int(same.sum()), zipf)
    return sample_scenes(rng, concepts)


@cache
def _mask(shape: str, side: int) -> Image.Image:
    """Return an anti-aliased mask of `side` pixels, 4 pixels of margin all round."""
    big = 8 * side
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)

    def at(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(x * (big - 1), y * (big - 1)) for x, y in points]

    if shape in ("disc", "ring"):
        pen.ellipse(at([(0, 0), (1, 1)]), fill=255)
        if shape == "ring":
            pen.ellipse(at([(0.27, 0.27), (0.73, 0.73)]), fill=0)
    elif shape == "triangle":
        pen.polygon(at([(0.5, 0), (1, 0.95), (0, 0.95)]), fill=255)
    elif shape == "star":
        turns = np.pi * np.arange(10) / 5
        reach = np.where(np.arange(10) % 2, 0.21, 0.5)
        tips = [(0.5 + r * np.sin(t), 0.5 - r * np.cos(t)) for t, r in zip(turns, reach, strict=True)]
        pen.polygon(at(tips), fill=255)
    elif shape == "cross":
        pen.rectangle(at([(0.33, 0), (0.67, 1)]), fill=255)
        pen.rectangle(at([(0, 0.33), (1, 0.67)]), fill=255)
    else:
        pen.ellipse(at([(0, 0.03), (0.54, 0.57)]), fill=255)
        pen.ellipse(at([(0.46, 0.03), (1, 0.57)]), fill=255)
        pen.polygon(at([(0.06, 0.46), (0.94, 0.46), (0.5, 1)]), fill=255)
    framed = Image.new("L", (side + 8, side + 8))
    framed.paste(image.resize((side, side), Image.Resampling.BOX), (4, 4))
    return framed


@cache
def _word_mask(word: str) -> Image.Image:
    """Return the word in PIL's built-in bitmap font (it needs no font file and no FreeType), on a margin of 4."""
    font = ImageFont.load_default_imagefont()
    left, top, right, bottom = font.getbbox(word)
    image = Image.new("L", (int(right - left) + 8, int(bottom - top) + 8))
    ImageDraw.Draw(image).text((4 - left, 4 - top), word, fill=255, font=font)
    return image


@cache
def _texture(name: str) -> NDArray[np.float32]:
    """Return how much darker a pattern of period 16 is, f32 [96, 96, 1], to cut a window of SIDE from."""
    y, x = np.mgrid[:96, :96]
    pattern = {
        "plain": np.zeros((96, 96), bool),
        "striped": (x + y) % 16 < 8,
        "dotted": (x % 16 - 8) ** 2 + (y % 16 - 8) ** 2 < 20,
        "checked": (x // 8 + y // 8) % 2 == 0,
    }[name]
    darker: NDArray[np.float32] = np.where(pattern[:, :, None], 30, 0).astype(np.float32)
    return darker


def _paint(pixels: Pixels, mask: Image.Image, width: float, colour: NDArray[np.float32], scene: np.void) -> None:
    """Scale a mask (less its margin) to `width` pixels, turn it, and paint through it at the scene's place."""
    step = (mask.width - 8) / width
    cos, sin = float(step * np.cos(scene["angle"])), float(step * np.sin(scene["angle"]))
    x, y = (float(scene[axis]) * SIDE + int(shift) for axis, shift in zip("xy", scene["shift"], strict=True))
    reach = 0.62 * width + 2  # half a diagonal of the turned mask, at most 12 degrees from upright
    left, top = max(0, int(x - reach)), max(0, int(y - reach))
    right, bottom = min(SIDE, int(x + reach) + 1), min(SIDE, int(y + reach) + 1)
    x, y = x - left, y - top
    matrix = (cos, sin, mask.width / 2 - cos * x - sin * y, -sin, cos, mask.height / 2 + sin * x - cos * y)
    placed = mask.transform((right - left, bottom - top), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    part = pixels[top:bottom, left:right]
    part += np.asarray(placed, np.float32)[:, :, None] * (np.float32(1 / 255) * (colour - part))


def draw(scene: np.void, rng: np.random.Generator, *, label: bool = False) -> NDArray[np.uint8]:
    """Draw a scene: u8 [64, 64, 3]. `rng` gives the pixel noise (grey, sd 5); `label`: print a word dark on white."""
    top, left = scene["phase"] - scene["shift"][::-1] + 1
    window = _texture(TEXTURES[scene["texture"]])[top : top + SIDE, left : left + SIDE]
    pixels = GROUND_COLOURS[scene["ground"]] + scene["wash"] - window
    shape, colour = divmod(int(scene["concept"]), len(COLOURS))
    if scene["printed"]:
        width = min(SIDE * (0.85 if label else float(scene["extent"]) + 0.15), SIDE - 8)
        if label:
            pixels[:] = 250
        ink = np.full(3, 20 if label else 235, np.float32)
        _paint(pixels, _word_mask(NAMES[scene["concept"]]), width, ink, _centred(scene, width))
    else:
        mask = _mask(SHAPES[shape], (24, 36, 48)[scene["size"]])
        _paint(pixels, mask, SIDE * float(scene["extent"]), COLOURS[colour] + scene["tint"], scene)
    pixels *= scene["gain"]
    pixels += 5 * rng.standard_normal((SIDE, SIDE, 1), np.float32)
    drawn: NDArray[np.uint8] = pixels.clip(0, 255, out=pixels).astype(np.uint8)
    return drawn


def _centred(scene: np.void, width: float) -> np.void:
    """Return the scene moved just enough that a word of that width stays inside the picture."""
    scene = scene.copy()
    half = width / 2 / SIDE + 0.03
    scene["x"] = np.clip(scene["x"], half, 1 - half)
    scene["y"] = np.clip(scene["y"], 0.6 * half, 1 - 0.6 * half)  # the font's three letters are 18 x 11 pixels
    scene["angle"] /= 3
    return scene
