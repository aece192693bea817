"""Texts that belong to pictures but lie under other names: tables of metadata, captions in a folder of their own.

Tables: `metadata.jsonl`, `.csv` or `.parquet`, as ImageFolder of the library `datasets` reads them. A row names its
picture by `file_name` (or `image_file_name`, …; several such columns, or `file_names`, name several pictures), relative
to the table's folder. The row becomes its picture's `key.json`, and the column of captions `key.txt`.
Folders of texts: if `images/a.jpg` has no text, `captions/a.txt` is its caption, provided that the two paths differ
only in the name of one folder; so is `labels/a.txt`.
"""

import csv
import functools
import io
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from curate.embed.captions import texts_in
from curate.errors import ContractError, UsageError
from curate.storage import faults, paths, records
from curate.storage.faults import Faults
from curate.storage.json_files import digest
from curate.storage.renewal import Seen
from curate.storage.tar import CAPTION_SUFFIX, IMAGE_SUFFIXES, JSON_SUFFIX, is_macos
from pipelines.terminal import first_line

FILE_NAME = re.compile("(.*_)?file_names?")
TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
CAPTIONS = ("caption", "text", "txt", "TEXT", "top_caption", "alt_text")
# If several folders of texts have one with a picture's name, the first of these counts, then the first by alphabet.
FOLDERS = ("captions", "caption", "texts", "text", "txt", "labels")


@dataclass(frozen=True, slots=True)
class File:
    """A future member of a sample: a file by its name in the folder, or, if that is empty, a text.

    beside: the name is relative to the source, not to the folder.
    """

    key: str
    suffix: str
    name: str
    text: str = ""
    beside: bool = False


def seen_of(files: Sequence[File], place: str, source: str, listed: dict[str, dict[str, paths.Found]]) -> Seen:
    """Say how large the files of a folder's samples are, and the table that is named after it, and when written.

    listed: takes the listings of folders, so that each costs one.
    """
    names = [paths.join(source if file.beside else place, file.name) for file in files if file.name]
    found = []
    for name in (*names, f"{place}.parquet"):
        folder = paths.parent(name)
        if folder not in listed:
            listed[folder] = paths.files(folder)
        found += [(name, held)] if (held := listed[folder].get(paths.name(name))) else []
    texts = [[file.key, file.suffix, file.text] for file in files if not file.name]
    sizes = [[name.removeprefix(source), held.size] for name, held in found]
    return sum(held.size for _, held in found), digest([held.stamp for _, held in found]), digest([sizes, texts])


Samples = dict[str, list[File]]
Pattern = tuple[str, str]  # a path without one of its names: what stands before it, and after it
Row = dict[str, Any]


@dataclass
class Beside:
    """What a tree of folders holds beside pictures. tree: names by folder. caption: the columns asked for, or "".

    rows: of tables, by the path of their first picture; told: takes what was taken and what could not be.
    """

    source: str
    tree: Mapping[str, Sequence[str]]
    caption: str
    told: Faults
    rows: dict[str, tuple[list[str], Row]] = field(default_factory=dict)
    covered: set[str] = field(default_factory=set)  # folders with a table
    taken: set[str] = field(default_factory=set)  # texts that a picture of another folder has
    _texts: dict[str, set[str]] | None = None
    _but_one: dict[Pattern, list[str]] = field(default_factory=dict)  # folders of texts by their path but for one name

    def read_tables(self) -> None:
        """Read every table of metadata in the tree. Raises: UsageError for one that cannot be read."""
        for folder, names in self.tree.items():
            for table in (name for name in TABLES if name in names):
                place = f"{folder}/" if folder else ""
                self.covered.add(place)
                for number, row in enumerate(_rows(paths.join(self.source, place + table), place + table, self.told)):
                    named = [self._path(place, name) for name in _names(row)]
                    if not named:
                        faults.add(self.told, f"rows of {table} without a file_name", f"{place}{table}: row {number}")
                    elif named[0] in self.rows:
                        faults.add(self.told, f"rows of {table} whose picture an earlier row names, too", named[0])
                    else:
                        self.rows[named[0]] = named, row

    def _path(self, place: str, name: str) -> str:
        """Write a picture's name relative to the source; if there is no such file, backslashes separate folders."""
        plain = place + name.removeprefix("./")
        if "\\" not in name or plain in self.files:
            return plain
        return place + name.replace("\\", "/").removeprefix("./")

    @functools.cached_property
    def files(self) -> set[str]:
        """The paths of all files of the tree."""
        return {f"{folder}/{name}" if folder else name for folder, names in self.tree.items() for name in names}

    def add_to(self, folder: str, samples: Samples) -> None:
        """Add to a folder's samples the texts of their pictures, and join the samples that one row names together."""
        place = f"{folder}/" if folder else ""
        key_of = {place + each.name: each.key for files in samples.values() for each in files}
        others = self._text_folders(folder)
        covered = any(f"{above}/" in self.covered for above in _above(folder)) or "" in self.covered
        for key in list(samples):
            pictures = [each for each in samples.get(key, ()) if each.suffix in IMAGE_SUFFIXES]
            if not pictures:
                continue
            named, row = self.rows.pop(place + pictures[0].name, ([], {}))
            if row:
                self._join(samples, key, [key_of.get(name, "") for name in named[1:]])
                self._add_row(samples[key], key, row)
            elif covered:
                faults.add(self.told, "pictures without a row in the metadata", place + pictures[0].name)
            self._add_texts(samples[key], pictures[0], others)

    def count_unused(self) -> None:
        """Count what was used for no picture: rows of tables, and texts in folders without pictures."""
        for name in self.rows:
            faults.add(self.told, "rows of metadata whose picture is not there", name)
        for folder, names in self.tree.items():
            if not has_pictures(names):
                for name in names:
                    path = f"{folder}/{name}" if folder else name
                    if path not in self.taken and name not in TABLES and not self._is_side_table(path):
                        kind = f"files passed over: in a folder without pictures, .{name.rpartition('.')[2].lower()}"
                        faults.add(self.told, kind, path)

    def _is_side_table(self, path: str) -> bool:
        """Say whether img2dataset put a file beside a folder of its `files` output."""
        return any(path.endswith(end) and path.removesuffix(end) in self.tree for end in (".parquet", "_stats.json"))

    def _join(self, samples: Samples, key: str, others: Sequence[str]) -> None:
        """Make the pictures of other samples further pictures of this one: key.0.jpg, key.1.jpg, …"""
        there = [other for other in others if other and other != key and other in samples]
        if len(there) < len(others):
            faults.add(self.told, "rows of metadata with a further picture that is not in the folder", key)
        if not there:
            return
        pictures = [each for name in (key, *there) for each in samples[name] if each.suffix in IMAGE_SUFFIXES]
        rest = [each for each in samples[key] if each.suffix not in IMAGE_SUFFIXES]
        for name in there:
            del samples[name]
        samples[key] = [File(key, f"{n}.{each.suffix}", each.name) for n, each in enumerate(pictures)] + rest

    def _add_row(self, files: list[File], key: str, row: Row) -> None:
        there = {each.suffix for each in files}
        wanted = [name.strip() for name in self.caption.split(",") if name.strip()] or CAPTIONS
        caption = next((text for name in wanted for text in texts_in(row.get(name))), "")
        if caption and CAPTION_SUFFIX not in there:
            files.append(File(key, CAPTION_SUFFIX, "", caption))
        if JSON_SUFFIX in there:
            faults.add(self.told, "rows of metadata not written as .json: their picture has a .json already", key)
            return
        try:
            files.append(File(key, JSON_SUFFIX, "", json.dumps(to_json(row), default=str)))
        except RecursionError:
            faults.add(self.told, "rows of metadata not written as .json: nested too deep", key)

    def _add_texts(self, files: list[File], picture: File, others: Sequence[str]) -> None:
        base = picture.name.rpartition(".")[0]
        for suffix in (CAPTION_SUFFIX, JSON_SUFFIX):
            if any(each.suffix == suffix for each in files):
                continue
            path = next((f"{each}/{base}.{suffix}" for each in others if f"{base}.{suffix}" in self.names[each]), "")
            if path:
                self.taken.add(path)
                files.append(File(picture.key, suffix, path, beside=True))
                faults.add(self.told, f"texts taken from a neighbouring folder: {path.rpartition('/')[0]}", path)

    def _text_folders(self, folder: str) -> list[str]:
        """List the folders without pictures whose path differs from a folder's in one name alone, best first."""
        found = []
        for (before, after), there in ((pattern, self._alike(pattern)) for pattern in _but_one(folder)):
            for other in there:
                name = other.removeprefix(before).removesuffix(after).lower()
                found.append((FOLDERS.index(name) if name in FOLDERS else len(FOLDERS), other))
        return [other for _, other in sorted(found)]

    def _alike(self, pattern: Pattern) -> list[str]:
        """List the folders of texts with a path, whatever stands in the place of one name of it."""
        if not self._but_one:
            for folder in self.names:
                for each in _but_one(folder):
                    self._but_one.setdefault(each, []).append(folder)
        return self._but_one.get(pattern, [])

    @property
    def names(self) -> dict[str, set[str]]:
        """The folders that hold texts and no pictures, with their names."""
        if self._texts is None:
            self._texts = {
                folder: set(names)
                for folder, names in self.tree.items()
                if folder and not has_pictures(names) and any(name.endswith((".txt", ".json")) for name in names)
            }
        return self._texts


def _above(folder: str) -> Iterator[str]:
    """Yield a folder and those above it."""
    while folder:
        yield folder
        folder = folder.rpartition("/")[0]


def _but_one(folder: str) -> list[Pattern]:
    """Take each name out of a path in turn: yields what comes before it and after it."""
    parts = folder.split("/")
    ends = [(parts[:place], parts[place + 1 :]) for place in range(len(parts))]
    return [("".join(f"{name}/" for name in before), "".join(f"/{name}" for name in after)) for before, after in ends]


def has_pictures(names: Sequence[str]) -> bool:
    """Say whether one of a folder's files is a picture by its suffix."""
    return any(name.rpartition(".")[2].lower() in IMAGE_SUFFIXES and not is_macos(name) for name in names)


def _names(row: Row) -> list[str]:
    """Take the names of a row's pictures out of it: `file_name`, `file_names`, `image_file_name`, …"""
    found: list[str] = []
    for column in [name for name in row if isinstance(name, str) and FILE_NAME.fullmatch(name)]:
        value = row.pop(column)
        found += [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str) and name]
    return found


def _rows(location: str, shown: str, told: Faults) -> Iterator[Row]:
    """Yield the rows of a table. Raises: UsageError when it cannot be read."""
    try:
        if location.endswith(".parquet"):
            import pyarrow.parquet as pq

            with paths.open_read(location) as file:
                for batch in pq.ParquetFile(file).iter_batches(1024):
                    yield from batch.to_pylist()
        elif location.endswith(".csv"):
            with paths.open_read(location) as file:
                yield from csv.DictReader(io.TextIOWrapper(file, "utf-8-sig", newline=""))
        else:
            with paths.open_read(location) as file:
                for number, (value, trouble) in enumerate(records.read_records(file, location)):
                    if isinstance(value, dict):
                        yield value
                    else:
                        why = "that are not JSON" if trouble else "that are not objects"
                        faults.add(told, f"lines of metadata {why}", f"{shown}: record {number}")
    except (pa.ArrowException, OSError, csv.Error, UnicodeDecodeError, ContractError) as error:
        raise UsageError(f"{location} cannot be read: {first_line(error)}") from None


def to_json(value: Any) -> Any:
    """Convert a value to what JSON can hold: no NaN, no infinity, no bytes."""
    if isinstance(value, dict):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list):
        return [to_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return None if isinstance(value, bytes) else value
