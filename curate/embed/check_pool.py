"""A look at a pool before any model is loaded: does it have images and captions at all, and under which names?"""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import IO

from curate.embed.captions import Wanted, read_caption, texts_in
from curate.errors import ShardError, UsageError
from curate.storage import tar

PROBED_JSON = 100  # samples of a shard that are opened in search of a caption


def check_members(found: Sequence[tar.Shard], wanted: Wanted, *, captions: bool) -> None:
    """Look for one image and one caption, from the first shard on, before any model is loaded.

    captions: they come from elsewhere.

    Raises: UsageError naming the members seen when the whole pool has none.
    """
    seen: Counter[str] = Counter()
    fields: Counter[str] = Counter()
    image, caption = False, captions
    for shard in found:
        try:
            with tar.local_tar(shard.location) as path, open(path, "rb") as file:
                samples = tar.read_index(file).samples
                seen.update(member.suffix for sample in samples for member in sample.members)
                image = image or any(sample.image for sample in samples)
                caption = caption or _has_caption(file, samples, wanted, fields)
        except (ShardError, OSError):
            continue  # it fails, by name, when it is embedded
        if image and caption:
            return
    if seen:
        held = ", ".join(f"{count:,} .{suffix}" for suffix, count in seen.most_common(8))
        if not image:
            tars = any(f".{suffix}".endswith(tar.TAR_SUFFIXES) for suffix in seen)
            raise UsageError(
                f"the pool has no images: {len(found):,} shard(s) hold {held}; a sample needs .jpg, .png or .webp.",
                "tars inside tars are not read: unpack the outer ones, and give what they hold as the pool"
                if tars
                else None,
            )
        needed = f"one of {', '.join(wanted.fields)}" if wanted.fields else ".txt, or .json with a caption"
        named = ", ".join(field for field, _ in fields.most_common(8))
        raise UsageError(
            f"the pool has no captions: {len(found):,} shard(s) hold {held}; a sample needs {needed}."
            + (f" Texts in its JSON: {named}." if named else ""),
            "name a field or a suffix: --caption FIELD" if named or not wanted.fields else None,
        )


def _has_caption(file: IO[bytes], samples: Sequence[tar.Sample], wanted: Wanted, fields: Counter[str]) -> bool:
    """Say whether one of a shard's first samples has a caption. fields: takes the JSON's fields that hold text."""
    if not wanted.fields and any(member.size for each in samples if (member := each.member(tar.CAPTION_SUFFIX))):
        return True
    found = False
    for sample in itertools.islice(samples, PROBED_JSON):
        described = tar.describe(file, sample)
        fields.update(name for name, value in described.items() if any(texts_in(value)))
        found = found or bool(read_caption(file, sample, described, wanted).text)
    return found
