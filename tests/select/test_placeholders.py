"""Error pictures and logos: one picture under many captions goes whole, what merely looks alike or is popular stays."""

import io

import numpy as np
import pytest
from artefacts import picture
from PIL import Image, ImageDraw
from test_embed import make_tar
from test_steps import frame_of, run

from curate.cluster.cluster import ClusterOptions, cluster
from curate.embed.embed import EmbedOptions, embed
from curate.engine import Job
from curate.errors import UsageError
from curate.select.frame import UNKNOWN_BITS
from curate.select.select import SelectOptions, select
from house import CLIP

PLACEHOLDERS = "placeholders(copies=20, threshold=0.999)"
QUIET = Job(workers=1, quiet=True)
NOUNS = "otter kayak violin lantern harbour meadow teapot glacier pigeon orchard".split()


def told(row):
    return f"a {NOUNS[row % 10]} and {row} other things".encode()


def not_found(row):
    """Draw the same words at another size and quality each time, as servers do."""
    image = Image.new("RGB", (220 + row % 3 * 40, 220 + row % 3 * 40), "#eeeeee")
    draw = ImageDraw.Draw(image)
    side = image.width
    draw.rectangle((side * 0.3, side * 0.25, side * 0.7, side * 0.55), outline="#888888", width=5)
    draw.line((side * 0.3, side * 0.25, side * 0.7, side * 0.55), fill="#888888", width=4)
    draw.text((side * 0.28, side * 0.65), "image not found", fill="#666666", font_size=side / 14)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95 - row % 2 * 20)
    return buffer.getvalue()


def logo():
    image = Image.new("RGB", (200, 200), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 30, 170, 170), fill="#d01030")
    draw.polygon([(100, 50), (150, 150), (50, 150)], fill="#ffd040")
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """Pictures of their own, copies of an error, of a logo, of a popular one under one caption, and of a rare one."""
    folder = tmp_path_factory.mktemp("pool")
    kinds = ["own"] * 30 + ["error"] * 24 + ["logo"] * 22 + ["popular"] * 24 + ["rare"] * 10
    kinds = [kinds[place] for place in np.random.default_rng(0).permutation(len(kinds))]
    members = []
    for row, kind in enumerate(kinds):
        image = {"own": picture(row), "error": not_found(row), "logo": logo()}.get(kind, picture(len(kind) + 7000))
        caption = b"the famous photograph" if kind == "popular" else told(row)
        suffix = "png" if kind == "logo" else "jpg"
        members += [(f"{row:06d}.{suffix}", image), (f"{row:06d}.txt", caption)]
    tars = make_tar(folder / "tars" / "00000.tar", members)
    embed(tars, str(folder / "emb"), EmbedOptions(CLIP), QUIET)
    cluster(str(folder / "emb"), str(folder / "clu"), ClusterOptions(k=2), QUIET)
    return folder, np.array(kinds)


def dropped(source, out, *steps):
    from curate.storage import sidecar

    manifest = select(str(source), str(out), SelectOptions(steps=steps), QUIET)
    reasons = sidecar.table(f"{out}/00000.arrow")["dropped_by"].to_pylist()
    return np.array([reason is not None and reason.startswith("placeholders") for reason in reasons]), manifest


def test_error_pictures_and_logos_go_whole_before_dedup_and_after(pool, tmp_path):
    folder, kinds = pool
    found, manifest = dropped(folder / "clu", tmp_path / "a", PLACEHOLDERS, "dedup(0.999)")
    assert set(kinds[found]) == {"error", "logo"} and (found == np.isin(kinds, ["error", "logo"])).all()
    facts = manifest["funnel"][0]["estimates"]
    assert facts["pictures"] == 2 and facts["largest"] == 24
    found, _ = dropped(folder / "clu", tmp_path / "b", "dedup(0.999)", PLACEHOLDERS)
    assert set(kinds[found]) == {"error", "logo"} and found.sum() <= 4  # the few that dedup had left


def test_by_bytes_alone_no_clusters_are_needed(pool, tmp_path):
    folder, kinds = pool
    found, _ = dropped(folder / "emb", tmp_path / "sel", "placeholders(20, exact=True)")
    assert (found == (kinds == "logo")).all()  # the error was encoded anew each time
    with pytest.raises(UsageError, match="exact=True"):
        dropped(folder / "emb", tmp_path / "no", "placeholders()")


def similar(bits, captions=100, n=100):
    """A chain of pictures, each near the next; `bits` of their perceptual hashes differ."""
    frame = frame_of(n)
    a = np.arange(n - 1)
    frame.edges = lambda: (a, a + 1, np.full(n - 1, 0.97, np.float32), np.full(n - 1, bits, np.uint8))
    hashes = np.random.default_rng(0).integers(0, 1 << 63, n, dtype=np.uint64)  # any two differ in more than 8 bits
    frame.hashes = lambda rows: (hashes[rows], np.full(len(rows), bits <= 64))
    frame.vectors = np.zeros((n, 4), np.float16).__getitem__
    frame.floor = 0.8
    frame.groups = {**frame.groups, "caption": lambda: np.arange(n) % captions, "url": lambda: np.arange(n)}
    return frame


def test_what_looks_alike_but_differs_in_its_pixels_stays():
    assert run(similar(30), "placeholders(threshold=0.95)").all()
    assert not run(similar(2), "placeholders(threshold=0.95)").any()
    assert not run(similar(UNKNOWN_BITS), "placeholders(threshold=0.95)").any()
    assert run(similar(UNKNOWN_BITS), "placeholders(threshold=0.98)").all()


def test_without_hashes_and_a_threshold_only_all_but_equal_pictures_are_one():
    assert run(similar(UNKNOWN_BITS), "placeholders()").all()


@pytest.mark.parametrize("copies, goes", [(100, True), (101, False)])
def test_a_picture_goes_from_so_many_copies_on(copies, goes):
    assert run(similar(2), f"placeholders({copies}, threshold=0.95)").any() != goes


def test_one_alt_text_for_an_error_is_told_by_its_urls():
    assert run(similar(2, captions=1), "placeholders(threshold=0.95)").all()
    assert not run(similar(2, captions=1), "placeholders(threshold=0.95, by=url)").any()
    assert run(similar(2, captions=49), "placeholders(threshold=0.95)").all()
    assert not run(similar(2, captions=50), "placeholders(threshold=0.95)").any()


def under(captions, n=40):
    """Pictures of their own under related captions, and one picture under the given captions."""
    n += len(captions)
    frame = similar(2, captions=n, n=n)
    m = len(captions)
    a = np.arange(m - 1)
    frame.edges = lambda: (a, a + 1, np.full(m - 1, 0.9995, np.float32), np.zeros(m - 1, np.uint8))
    texts = captions + [told(row).decode() for row in range(n - m)]
    frame.captions = lambda rows: [texts[row] for row in rows]
    frame.groups = {**frame.groups, "caption": lambda: np.unique(texts, return_inverse=True)[1]}
    return frame


FEW = "placeholders(3, threshold=0.999, unrelated=True)"


@pytest.mark.parametrize(
    "captions, goes",
    [
        (["an octopus under the sea", "sonic tails transparent", "wedding card with roses"], True),
        (["a bride in a white dress", "the bride in her dress", "a bride dancing in a white dress"], False),
        (["an octopus under the sea", "an octopus under the sea", "wedding card with roses"], False),
        (["an octopus under the sea", "wedding card with roses"], False),
    ],
)
def test_few_copies_go_if_their_captions_have_nothing_to_do_with_one_another(captions, goes):
    assert (~run(under(captions), FEW)).sum() == (len(captions) if goes else 0)


def test_captions_that_lie_near_each_other_are_related_whatever_their_words():
    captions = ["un poulpe sous la mer", "an octopus in deep water", "ein Tintenfisch"]
    frame = under(captions)
    x = np.random.default_rng(0).normal(size=(len(frame.good), 8))
    x[: len(captions)] = x[0]
    x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
    assert not run(frame, FEW).all()
    frame = under(captions)
    frame.text_vectors = x.__getitem__
    assert run(frame, FEW).all()
