"""Rows of a pool: the facts of each sample of a tar, its image as pixels and its caption as tokens.

In: a tar's samples. Out: the facts of every row (key, uid, phash, status, caption, width, height, url, and the extra
columns that were asked for), and pixels and tokens of the rows that are ok. A row is never lost: what is wrong with it
becomes its status; if both are at fault, that of the image is named, not that of the caption.
"""

import io
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np
from PIL.Image import Image

from curate.embed import details, encoder, images, weights
from curate.embed.captions import read_caption
from curate.embed.side_data import NO_EXTRAS, Captions, Extras
from curate.embed.spent import TimedFile
from curate.errors import ShardError
from curate.storage import faults, manifest, ranges, records, sidecar, tar
from curate.storage.faults import Faults
from curate.storage.schema import STATUSES

DOTTED = "a picture is there, but its key ends at the first dot of its name: rename the files, or `curate pack` them"


@dataclass
class Rows:
    """Consecutive rows of a shard. pixels: u8 [m, h, w, 3] and tokens: i32 [m, context] of the m rows that are ok.

    spent: the seconds that it took to read and to decode them.
    coded: if a device decodes (`jpegs`), a JPEG for each row that is ok, or None if `pixels` has it.
    """

    facts: list[dict[str, Any]]
    pixels: np.ndarray
    tokens: np.ndarray
    spent: dict[str, float] = field(default_factory=dict)
    coded: list[bytes | None] = field(default_factory=list)


def join(parts: Sequence[Rows]) -> Rows:
    """Put consecutive rows together."""
    spent: Counter[str] = Counter()
    for part in parts:
        spent.update(part.spent)
    return Rows(
        [row for part in parts for row in part.facts],
        np.concatenate([part.pixels for part in parts]),
        np.concatenate([part.tokens for part in parts]),
        dict(spent),
        [data for part in parts for data in part.coded],
    )


class Reader:
    """Reads samples into rows for one model; safe to call from several threads.

    preprocess: the model's image config; max_pixels: images of more are refused unseen; faithful: the model's transform
    is given every image as it was decoded, as open_clip does, not as `images.visible` makes it; decode: as in
    EmbedOptions.
    """

    def __init__(
        self,
        source: weights.Source,
        preprocess: dict[str, Any],
        max_pixels: int,
        extras: Extras = NO_EXTRAS,
        *,
        faithful: bool = False,
        decode: str = "full",
    ) -> None:
        warnings.filterwarnings("ignore", module="PIL")  # its complaints about odd files become statuses
        self.transform = images.transform(preprocess, fast=decode == "fast")
        self.leaves_jpegs = decode == "gpu"
        self.tokenize = encoder.Tokenizer(source)
        self.max_pixels = max_pixels
        self.faithful = faithful
        self.extras = extras
        self.captions = Captions(extras.captions) if extras.captions else None
        self.no_pixels = np.empty((0, *encoder.pair(preprocess["size"]), 3), np.uint8)

    def __call__(self, path: str, samples: Sequence[tar.Sample]) -> Rows:
        """Read samples of the tar at a local path; one image is held in memory at a time."""
        facts, pixels, began = [], [], time.perf_counter()
        coded: list[bytes | None] = []
        with TimedFile(path) as timed, io.BufferedReader(timed) as file:
            for sample in samples:
                row, image = read_row(file, sample, self.max_pixels, self.extras, self.captions, self.leaves_jpegs)
                facts.append(row)
                if row["status"] == "ok" and image is not None:
                    try:
                        if isinstance(image, Image):
                            pixels.append(self.pixels(image))
                        coded.append(None if isinstance(image, Image) else image)
                    except images.BadImage as bad:
                        row["status"], row["reason"] = bad.status, bad.reason
        captions = [row["caption"] for row in facts if row["status"] == "ok"]
        rows = Rows(facts, np.stack(pixels) if pixels else self.no_pixels, self.tokenize(captions))
        rows.coded = coded if self.leaves_jpegs else []
        rows.spent = {"read": timed.seconds, "decode": time.perf_counter() - began - timed.seconds}
        return rows

    def pixels(self, image: Image) -> np.ndarray:
        """Turn a decoded image into what the model sees, u8 [h, w, 3].  Raises: BadImage."""
        return self.transform(image if self.faithful else images.visible(image))


def read_row(
    file: IO[bytes],
    sample: tar.Sample,
    max_pixels: int,
    extras: Extras = NO_EXTRAS,
    captions: Captions | None = None,
    leaves_jpegs: bool = False,
) -> tuple[dict[str, Any], Image | bytes | None]:
    """Read a sample's facts, and its decoded image if there is one. A fault of the image decides the status.

    captions: where a sample without a caption finds one by its url.
    leaves_jpegs: the bytes of a plain JPEG are returned undecoded; facts that need its pixels are not filled in.
    """
    row = begin_row(sample) | extras.values()
    if row["status"] != "ok":
        return row, None
    described, row["unread"] = tar.try_describe(file, sample)
    row |= extras.values(described)
    row["url"] = records.usable_text(described.get("url"))
    caption = read_caption(file, sample, described, extras.wanted)
    if caption.status == "no_caption" and captions is not None and row["url"]:
        caption = captions.get(row["url"])
    row["caption"] = caption.text
    status, reason = ("ok", "") if caption.text else (caption.status or "no_caption", caption.reason)
    if status == "no_caption" and row["unread"] and not reason:
        reason = f"and its JSON is not read: {row['unread']}"
    image: Image | bytes | None = None
    try:
        image = _read_image(file, sample, row, max_pixels, leaves_jpegs)
    except images.BadImage as bad:
        status, reason = bad.status, bad.reason
    row["status"], row["reason"] = status, reason
    row["pictures"] = sum(each.suffix.rpartition(".")[2] in tar.IMAGE_SUFFIXES for each in sample.members)
    return row, image


def _read_image(
    file: IO[bytes], sample: tar.Sample, row: dict[str, Any], max_pixels: int, leaves_jpegs: bool
) -> Image | bytes:
    member = sample.image
    if member is None:
        dotted = [each for each in sample.members if each.suffix.rpartition(".")[2] in tar.IMAGE_SUFFIXES]
        raise images.BadImage("no_image", DOTTED if dotted else "")
    if member.size > tar.MAX_MEMBER_BYTES:
        raise images.BadImage("too_large", f"over the limit of {tar.MAX_MEMBER_BYTES:,} bytes")
    data = read_bytes(file, member) or b""
    row["uid"] = records.image_uid(data) if data else None
    if leaves_jpegs and (size := images.plain_jpeg_size(data, max_pixels)) is not None:
        row["width"], row["height"] = size
        return data
    image = images.decode(data, max_pixels)
    row |= details.describe(images.visible(image))
    row["width"], row["height"] = image.size
    return image


def begin_row(sample: tar.Sample) -> dict[str, Any]:
    """Begin a row, refusing keys that no output may carry. A key that is not UTF-8 is shown escaped."""
    status = "duplicate_key" if sample.repeated else "ok"
    key = sample.key.encode("utf-8", "backslashreplace").decode()
    empty = dict.fromkeys(("uid", "phash", "caption", "width", "height", "url", "detail", "writing"))
    return {"key": key, "status": status if tar.is_safe(sample.key) else "unsafe_key", **empty}


def read_bytes(file: IO[bytes], member: tar.Member) -> bytes | None:
    """Read a member; None where it cannot be."""
    try:
        return tar.read_member(file, member)
    except ShardError:
        return None


def reasons(facts: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return why rows could not be used, where there is more to say than their status, by row number as text."""
    return {
        str(number): row["reason"] for number, row in enumerate(facts) if row["status"] != "ok" and row.get("reason")
    }


def row_faults(stem: str, facts: Sequence[dict[str, Any]]) -> Faults:
    """Count a shard's rows that could not be used, by status and reason, and those with something left out."""
    found: Faults = {}
    for row in facts:
        example = f"{stem}: {row['key']}"
        if row["status"] != "ok":
            faults.add(found, f"{row['status']}: {row.get('reason') or STATUSES[row['status']]}", example)
        if row.get("unread"):
            faults.add(found, f"JSON that could not be read, fields left out: {row['unread']}", example)
        if row["status"] == "ok" and row.get("pictures", 1) > 1:
            faults.add(found, "ok: samples of several pictures, of which only the first is embedded", example)
    return found


def all_faults(facts: Mapping[str, Mapping[str, Any]], passed: Faults) -> Faults:
    """Add up what was wrong with a pool's images and shards, and what of it was passed over."""
    noted = (tar.note_faults(stem, fact.get("notes", [])) for stem, fact in facts.items())
    return faults.total([passed, *noted, *(fact.get("faults", {}) for fact in facts.values())])


def account(output: manifest.Output, stems: Sequence[str]) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Read the facts of the stems that have a sidecar, and count how many of their rows have each status.

    Raises: ContractError when a sidecar's statuses do not add up to its rows.
    """
    missing = set(output.missing(stems))
    made = [stem for stem in stems if stem not in missing]
    found = ranges.ahead(output.directory, lambda stem: sidecar.facts(output.find(stem)), made)
    facts = dict(zip(made, found, strict=True))
    counts: Counter[str] = Counter()
    for stem, fact in facts.items():
        manifest.reconcile(stem, fact["rows"], fact["statuses"])
        counts.update(fact["statuses"])
    return facts, {name: counts[name] for name in STATUSES if counts[name]}
