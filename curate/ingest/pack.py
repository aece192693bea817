"""Make a pool of images that are not in tars yet: folders of files, or parquet files that hold images.

In: a folder as img2dataset's `files` output leaves it (`00000/key.jpg`, `key.txt`, `key.json`; any folders of images
will do), or parquet files with images in a column, in a folder or in folders inside it: Hugging Face's `Image` (a
struct of bytes and path), lists of those, which become `key.0.jpg`, `key.1.jpg`, …, or img2dataset's `parquet` output.
Captions that belong to pictures but lie under other names are found by beside.py. Out: `POOL/{stem}.tar`, every image
byte for byte, one tar per folder or parquet file, or several if there are more than `shard_size` samples. Nothing is
decoded. A parquet row without an image keeps its place, with its JSON; a table named after a folder is copied beside
its tar.
"""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from curate import engine
from curate.embed.captions import clean
from curate.engine import Job
from curate.errors import ShardError, UsageError, unknown
from curate.ingest.beside import TABLES, Beside, File, Samples, has_pictures, seen_of, to_json
from curate.ingest.layouts import opened, text_of
from curate.ingest.options import PackOptions
from curate.ingest.parquet_rows import KEYS, Part, Rows, count_keys, key_of
from curate.ingest.table_columns import caption_column, holds_images, image_column, no_images
from curate.storage import faults, manifest, paths
from curate.storage.faults import Faults
from curate.storage.renewal import Parts, shared
from curate.storage.tar import (
    CAPTION_SUFFIX,
    IMAGE_SUFFIXES,
    JSON_SUFFIX,
    MACOS,
    TAR_SUFFIXES,
    UNSAFE,
    TarWriter,
    is_macos,
    is_safe,
    suffix_of,
)
from pipelines.record_forms import as_list

LAYOUTS = ("auto", "files", "parquet")
PATHS = re.compile(r"[:\\]")  # by these a name can lead out of its folder: `C:x`, `\\x`
PACKED = (*IMAGE_SUFFIXES, CAPTION_SUFFIX, JSON_SUFFIX)
WHOLE_BYTES = 16 << 20  # longer files are copied a part at a time
CAPTION_FILES = "caption"  # the suffix of kohya's trainers for texts beside pictures


@shared
def pack(source: str, out: str, options: PackOptions, job: Job) -> dict[str, Any]:
    """Write the tars that are not there yet, and return the manifest.

    Raises: UsageError when the source holds no images of the layout, saying what it holds.
    """
    if options.layout not in LAYOUTS:
        raise unknown("layout", options.layout, LAYOUTS)
    if options.shard_size < 1:
        raise UsageError(f"shard_size is {options.shard_size}, expected at least 1")
    if not paths.exists(source):
        raise UsageError(f"{source} does not exist")
    if not paths.is_dir(source) and not source.endswith(".parquet"):
        raise UsageError(f"{source} is a file; expected a folder, or a parquet file with images in a column.")
    if any(name.lower().endswith(TAR_SUFFIXES) for name in paths.listdir(source)):
        raise UsageError(f"{source} holds tars: it is a pool already.", f"curate embed {source} …")
    passed: dict[str, int] = {}
    told: Faults = {}
    parts: dict[str, Part] = {}
    if options.layout != "parquet" and not source.endswith(".parquet"):
        parts = _folders(source, options, passed, told)
    if not parts and options.layout != "files":
        parts = _tables(source, options, told)
    if not parts:
        held = ", ".join(paths.listdir(source)[:6]) or "nothing"
        raise UsageError(
            f"{source} holds {held}; expected folders of images, or parquet files with images in a column."
        )
    made = {"layout": options.layout, "image": options.image, "caption": options.caption}
    listing = [[stem, part.rows, part.start, _digest(part)] for stem, part in parts.items()]
    inputs = {"source": {"path": source, "digest": manifest.digest(listing)}}
    seen = {stem: part.seen for stem, part in parts.items()}
    output = manifest.open_output(
        out,
        "pack",
        {**made, "shard_size": options.shard_size},
        inputs,
        overwrite=job.overwrite,
        parts=Parts(("source",), seen, paths.place(source if paths.is_dir(source) else paths.parent(source))),
    )
    if output.complete:
        return output.manifest
    output.tell(quiet=job.quiet)
    todo = output.pending(job.share(list(parts)), ".tar")
    task = PackShard(parts, output.directory)
    outcome = engine.run_stage("pack", task, todo, job, places=(out, paths.parent(source)))
    output.log(stage="pack", rows=outcome.rows, seconds=round(outcome.seconds, 3))
    failed = output.failures(list(parts), outcome.failed, ".tar")
    if unfinished := output.unfinished(list(parts), failed, ".tar"):
        return unfinished
    count_keys({stem: part for stem, part in parts.items() if stem not in failed}, told)
    faults.write("pack", told, quiet=job.quiet)
    rows = {stem: {"rows": part.rows} for stem, part in parts.items() if stem not in failed}
    return output.finish(
        shards=rows,
        counts={"rows": sum(each["rows"] for each in rows.values())},
        **({"passed_over": passed} if passed else {}),
        **({"faults": told} if told else {}),
        **({"failed": failed} if failed else {}),
    )


def _digest(part: Part) -> Any:
    if not part.files:
        return paths.size(part.source)
    return [file.name or [file.suffix, file.text] for file in part.files]


def _folders(source: str, options: PackOptions, passed: dict[str, int], told: Faults) -> dict[str, Part]:
    """Find folders that hold images: their samples in the order of their names.

    passed: filled with other files, by suffix; told: filled with what was passed over, taken from beside or renamed.
    """
    parts: dict[str, Part] = {}
    closed: Faults = {}
    tree = dict(_walk(source, closed))
    if not any(map(has_pictures, tree.values())):
        return parts
    told |= closed
    for folder in tree:
        kinds = ("links to folders, which are not followed", "links to files that do not exist")
        for kind, names in zip(kinds, paths.linked(paths.join(source, folder) if folder else source), strict=True):
            for name in names:
                faults.add(told, kind, f"{folder}/{name}" if folder else name)
    beside = Beside(source, tree, options.caption, told)
    beside.read_tables()
    listed: dict[str, dict[str, paths.Found]] = {}
    for folder, names in tree.items():
        samples = _samples(folder, names, passed, told)
        if not samples:
            continue
        beside.add_to(folder, samples)
        place = paths.join(source, folder) if folder else source
        stem = folder or paths.name(source if paths.is_remote(source) else os.path.abspath(paths.local(source)))
        for name, start, stop in _cut(stem.replace("/", "__"), len(samples), options.shard_size):
            files = [file for key in list(samples)[start:stop] for file in samples[key]]
            seen = seen_of(files, place, source, listed)
            _add_part(parts, name, Part(place, stop - start, files, root=source, seen=seen))
    beside.count_unused()
    return parts


def _samples(folder: str, names: Sequence[str], passed: dict[str, int], told: Faults) -> Samples:
    """Group a folder's files by their names without the last suffix; no samples if no file is an image.

    A key ends at its first dot, so dots in names become underlines. Where that, or another spelling of the suffix
    (`e.jpg`, `e.JPG`), makes two names one, the later one gets a number.
    """
    if not has_pictures(names):
        return {}
    usable = [(name, *_split(name)) for name in names if name not in TABLES]
    texts = {base for _, base, suffix in usable if suffix == CAPTION_SUFFIX}
    samples: Samples = {}
    base_of: dict[str, str] = {}
    for name, base, suffix in usable:
        shown = f"{folder}/{name}" if folder else name
        if suffix == CAPTION_FILES and base and base not in texts:
            faults.add(told, f"texts that end in .{CAPTION_FILES}: written as .{CAPTION_SUFFIX}", shown)
            suffix = CAPTION_SUFFIX
        if suffix not in PACKED or not base or is_macos(name):
            passed[suffix] = passed.get(suffix, 0) + 1
            faults.add(told, f"files passed over: {MACOS if is_macos(name) else f'.{suffix}'}", shown)
            continue
        plain = UNSAFE.sub("_", base.replace(".", "_"))
        plain = plain if is_safe(plain) else PATHS.sub("_", plain)
        keys = (plain if number == 1 else f"{plain}__{number}" for number in itertools.count(1))
        key = next(
            each
            for each in keys
            if each not in samples or (base_of[each] == base and suffix not in [held.suffix for held in samples[each]])
        )
        if "." in base:
            faults.add(told, "names with dots: written with _, since a key ends at its first dot", shown)
        if UNSAFE.search(base):
            faults.add(told, "names with control characters, or not in UTF-8: written with _ in their place", shown)
        if PATHS.search(base) and not PATHS.search(plain):
            faults.add(told, "names that would lead out of their folder: written with _ for : and \\", shown)
        if key != plain:
            faults.add(told, "names that would give the same key: a number is added to the later ones", shown)
        base_of[key] = base
        samples.setdefault(key, []).append(File(key, suffix, name))
    return samples


def _split(name: str) -> tuple[str, str]:
    """Split a file's name at its last dot, with the suffix in lower case."""
    base, dot, suffix = name.rpartition(".")
    return (base, suffix.lower()) if dot else (name, "")


def _add_part(parts: dict[str, Part], stem: str, part: Part) -> None:
    """Add a part. Raises: UsageError where another one has its stem."""
    if stem in parts:
        raise UsageError(f"{parts[stem].source} and {part.source} would both become {stem}.tar.", "rename one of them")
    parts[stem] = part


def _walk(source: str, told: Faults) -> Iterator[tuple[str, list[str]]]:
    """Yield every folder under a source with the names in it, both sorted. Links to folders are not followed.

    told: filled with folders that may not be read, such as `lost+found` of a whole disk.
    """
    left = [""]  # no recursion: folders may lie in folders as deep as a path is long
    while left:
        folder = left.pop()
        try:
            names, folders = paths.entries(paths.join(source, folder) if folder else source)
        except PermissionError:
            if not folder:
                raise
            faults.add(told, "folders passed over: no permission to read them", folder)
            continue
        yield folder, names
        left += [f"{folder}/{name}" if folder else name for name in reversed(folders)]


def _cut(stem: str, rows: int, shard_size: int) -> Iterator[tuple[str, int, int]]:
    """Cut rows into shards: (stem, start, stop), the stems numbered where there are several."""
    number = math.ceil(rows / shard_size)
    for index in range(number):
        name = stem if number == 1 else f"{stem}_{index:05d}"
        yield name, index * shard_size, min(rows, (index + 1) * shard_size)


def _tables(source: str, options: PackOptions, told: Faults) -> dict[str, Part]:
    """Find parquet files with an image column; one without is refused, since it would be left out unnoticed.

    If one of several cannot be read, it is a part that fails. told: filled with other columns of bytes, which JSON
    cannot hold.
    """
    parts: dict[str, Part] = {}
    for location, listed in _parquet_files(source, told):
        try:
            with opened(location) as held:
                schema, rows = held.schema_arrow, held.metadata.num_rows
        except ShardError as error:
            failed = Part(location, 0, seen=(listed.size, listed.stamp, "cannot be read"), broken=str(error))
            _add_part(parts, _stem(location, source), failed)
            continue
        image = image_column(schema, options.image, location)
        caption = caption_column(schema, options.caption, location)
        if not image:
            raise no_images(schema, location)
        for field in schema:
            if field.name not in (image, caption, *KEYS) and holds_images(field.type):
                faults.add(told, f"values left out: the column {field.name} holds bytes, too", location, rows)
        for name, start, stop in _cut(_stem(location, source), rows, options.shard_size):
            seen = (listed.size, listed.stamp, f"{start} {stop} {image} {caption}")
            keyed = any(each in KEYS and each != image for each in schema.names)
            _add_part(parts, name, Part(location, stop - start, (), start, image, caption, seen=seen, keyed=keyed))
    broken = [part.broken for part in parts.values() if part.broken]
    if broken and len(broken) == len(parts):
        raise UsageError(broken[0])
    return parts


def _stem(location: str, source: str) -> str:
    """Name the tars of a parquet file after its place in the source."""
    stem = location.removeprefix(source).strip("/") if location != source else paths.name(location)
    return stem.removesuffix(".parquet").replace(".", "_").replace("/", "__")


def _parquet_files(source: str, told: Faults) -> Iterator[tuple[str, paths.Found]]:
    """List a parquet file, or those of a folder and of the folders in it (`data/`, a subset each)."""
    if not paths.is_dir(source):
        yield source, paths.look(source)
        return
    for folder, _ in _walk(source, told):
        place = paths.join(source, folder) if folder else source.rstrip("/")
        for name, found in sorted(paths.files(place).items()):
            if name.endswith(".parquet"):
                yield paths.join(place, name), found


@dataclass
class PackShard:
    """The task: one part to one tar."""

    parts: dict[str, Part]
    out: str

    def setup(self) -> None:
        """Begin without an open parquet file."""
        self.table = Rows()

    def __call__(self, stem: str) -> dict[str, Any]:
        """Write one tar."""
        part = self.parts[stem]
        if part.broken:
            raise ShardError(part.broken)
        members = _read_files(part) if part.files else _read_rows(stem, part, self.table)
        with paths.atomic_write(paths.join(self.out, f"{stem}.tar")) as file, TarWriter(file) as tar:
            for name, data in members:
                if isinstance(data, bytes):
                    tar.add(name, data)
                    continue
                with paths.open_read(data) as long:
                    tar.copy(name, long)
            side = f"{part.source}.parquet"
            if part.files and paths.name(part.source) == stem and paths.exists(side):
                with paths.atomic_write(paths.join(self.out, f"{stem}.parquet")) as copy:
                    copy.write(paths.read_bytes(side))
        return {"rows": part.rows}


def _read_files(part: Part) -> Iterator[tuple[str, bytes | str]]:
    """Yield the members made of files: their bytes, or for large files their location."""
    for file in part.files:
        engine.advance(file.suffix.removeprefix("0.") in IMAGE_SUFFIXES)
        place = paths.join(part.root if file.beside else part.source, file.name)
        long = file.name and not paths.is_remote(place) and paths.size(place) > WHOLE_BYTES
        held = place if long else paths.read_bytes(place) if file.name else file.text.encode()
        yield f"{file.key}.{file.suffix}", held


def _read_rows(stem: str, part: Part, table: Rows) -> Iterator[tuple[str, bytes]]:
    """Yield the members made of a parquet file's rows. Raises: ShardError if it holds paths instead of images."""
    seen: set[str] = set()
    pictures = 0
    for number, row in enumerate(table.read(part), part.start):
        held = row.pop(part.image)
        listed = [each if isinstance(each, dict) else {"bytes": each} for each in as_list(held)]
        images = [each["bytes"] for each in listed if each["bytes"]]
        key, _ = key_of(row, f"{stem}_{number:09d}", seen)
        for place, image in enumerate(images):
            yield f"{key}.{f'{place}.' if len(images) > 1 else ''}{suffix_of(image)}", image
        pictures += len(images)
        if there := [each["path"] for each in listed if not each["bytes"] and each.get("path")]:
            row[f"{part.image}_path"] = there if isinstance(held, list) else there[0]
        engine.advance(1)
        given = row.get(part.caption) if part.caption else None
        several = given if isinstance(given, list) else [given]
        texts = [text_of(each) if isinstance(each, bytes) else each for each in several]
        caption = next((each for each in texts if clean(each)), None)
        if caption:
            yield f"{key}.{CAPTION_SUFFIX}", caption.encode("utf-8", "replace")
        plain = {name: value for name, value in row.items() if not isinstance(value, bytes)}
        yield f"{key}.{JSON_SUFFIX}", json.dumps(to_json(plain), ensure_ascii=True, default=str).encode()
    if part.rows and not pictures:
        raise ShardError(f"{part.source} holds no image bytes in {part.image}: write it with the image files embedded")
