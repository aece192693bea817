"""Foreign embeddings: the layouts in which others publish them, read part by part as rows with vectors.

A part is one file of vectors and what lies beside it; it becomes one sidecar, or the table that a pool is joined to.

    clip-retrieval   img_emb/img_emb_{i}.npy, text_emb/text_emb_{i}.npy, metadata/metadata_{i}.parquet; LAION published
                     its embeddings in the same form, the tables in a folder named …-metadata
                                                                                  github.com/rom1504/clip-retrieval
    datacomp         {uid}.parquet beside {uid}.npz with {arch}_img and {arch}_txt  github.com/mlfoundations/datacomp
    nemo             *.parquet with image_id and embedding; images only            NeMo Curator's ImageEmbeddingStage
    npy              {name}.npy, and where they exist {name}.text.npy and {name}.parquet

The files of a part belong together by row order, which is checked. Arrays are mapped where possible, never unpickled.
"""

import io
import re
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa

from curate.embed.captions import clean
from curate.errors import ShardError, UsageError, unknown
from curate.storage import faults, paths, records
from curate.storage.faults import Faults
from curate.storage.renewal import Seen
from pipelines import gzipped
from pipelines.terminal import first_line

# What each project calls the columns that a sidecar keeps, or that a pool is joined by.
NAMES = {
    "key": ("image_path", "key", "image_id", "__key__", "uid", "id"),
    "url": ("url", "URL"),
    "caption": ("caption", "text", "TEXT", "top_caption"),
    "sha256": ("sha256",),
    "uid": ("uid",),
    "width": ("original_width", "width", "WIDTH"),
    "height": ("original_height", "height", "HEIGHT"),
}


@dataclass(frozen=True)
class Part:
    """Files that belong together. stem: of the sidecar; image, text, table: locations, or "" where there is none.

    entries: the names of the arrays inside an npz, or of the column inside a parquet file.
    """

    stem: str
    image: str
    text: str
    table: str
    entries: tuple[str, str] = ("", "")

    @property
    def files(self) -> list[str]:
        """Its files, each once."""
        return list(dict.fromkeys(filter(None, (self.image, self.text, self.table))))


@dataclass
class Table:
    """A part, opened: columns by the names of `NAMES` (absent ones missing), vectors f16/f32 [n, d], text or None."""

    rows: int
    columns: dict[str, pa.Array]
    image: np.ndarray
    text: np.ndarray | None


def list_parts(source: str, layout: str, arch: str) -> list[Part]:
    """Find the parts of a foreign directory, sorted by stem.

    Raises: UsageError for an unknown layout, or where nothing of its form is found, saying what is there.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if not paths.exists(source):
        raise UsageError(f"{source} does not exist")
    found, form = LAYOUTS[layout](source, arch)
    if not found:
        held = ", ".join(paths.listdir(source)[:6]) or "nothing"
        raise UsageError(f"{source} does not have the layout {layout}: expected {form}; it holds {held}.")
    return found


def look(parts: Sequence[Part]) -> dict[str, paths.Found]:
    """Look at the files of all parts; a folder costs a listing."""
    listed = {folder: paths.files(folder) for folder in {paths.parent(file) for part in parts for file in part.files}}
    files = {file: listed[paths.parent(file)].get(paths.name(file)) for part in parts for file in part.files}
    return {file: found or paths.look(file) for file, found in files.items()}


def seen(parts: Sequence[Part], looked: Mapping[str, paths.Found]) -> dict[str, Seen]:
    """Return for each part how large its files are, when they were written, and what it lacks that other parts have.

    looked: what `look` returned.
    """
    others = [any(part.text for part in parts), any(part.table for part in parts)]
    found: dict[str, Seen] = {}
    for part in parts:
        files = [looked[file] for file in part.files]
        sizes = " ".join(str(each.size) for each in files)
        lacks = [there and not own for own, there in zip((part.text, part.table), others, strict=True)]
        stamps = " ".join(each.stamp for each in files)
        found[part.stem] = (sum(each.size for each in files), stamps, f"{sizes} {lacks}")
    return found


def left_over(parts: Sequence[Part]) -> Faults:
    """Count the tables and vectors of texts that belong to no part: their file of image vectors is not there."""
    used = {file for part in parts for file in part.files}
    folders = {paths.parent(file) for part in parts for file in part.files}
    found: Faults = {}
    for folder in sorted(folders):
        for name in paths.listdir(folder):
            if name.endswith((".npy", ".npz", ".parquet")) and paths.join(folder, name) not in used:
                faults.add(found, "files left out: there are no image vectors to go with them", name)
    return found


def _clip_retrieval(source: str, arch: str) -> tuple[list[Part], str]:
    beside = next((name for name in paths.listdir(source) if name.endswith("-metadata")), "metadata")
    texts, tables = (_numbered(paths.listdir(paths.join(source, folder))) for folder in ("text_emb", beside))
    parts = []
    for name in paths.listdir(paths.join(source, "img_emb")):
        number = name.removeprefix("img_emb_").removesuffix(".npy")
        if f"img_emb_{number}.npy" != name:
            continue
        text, table = (names.get(number) or names.get(number.lstrip("0") or "0", "") for names in (texts, tables))
        parts.append(
            Part(
                number,
                paths.join(source, "img_emb", name),
                paths.join(source, "text_emb", text) if text else "",
                paths.join(source, beside, table) if table else "",
            )
        )
    return parts, "img_emb/img_emb_{i}.npy"


def _numbered(names: Sequence[str]) -> dict[str, str]:
    """Find files by the number in their names, as written and without leading zeros.

    `metadata_0000.parquet` belongs to `img_emb_0.npy`, too, if there is no `metadata_0.parquet`.
    """
    written = {match[1]: name for name in names if (match := re.search(r"_([^_]+)\.(?:npy|parquet)$", name))}
    plain = {number.lstrip("0") or "0": name for number, name in written.items() if number.isdecimal()}
    return plain | written


def _datacomp(source: str, arch: str) -> tuple[list[Part], str]:
    held = paths.listdir(source)
    stems, tables = [name[:-4] for name in held if name.endswith(".npz")], set(held)
    entries = (f"{arch}_img", f"{arch}_txt")
    place = {stem: paths.join(source, stem) for stem in stems}
    parts = [
        Part(
            stem,
            f"{place[stem]}.npz",
            f"{place[stem]}.npz",
            f"{place[stem]}.parquet" if f"{stem}.parquet" in tables else "",
            entries,
        )
        for stem in stems
    ]
    return parts if any(part.table for part in parts) else [], "{uid}.parquet beside {uid}.npz"


def _nemo(source: str, arch: str) -> tuple[list[Part], str]:
    files = [source] if source.endswith(".parquet") else [paths.join(source, name) for name in paths.listdir(source)]
    tables = [file for file in files if file.endswith(".parquet")]
    return [Part(paths.name(file)[:-8], file, "", file) for file in tables], "*.parquet"


def _npy(source: str, arch: str) -> tuple[list[Part], str]:
    folder = paths.parent(source) if source.endswith(".npy") else source
    held = set(paths.listdir(folder))
    names = [paths.name(source)] if source.endswith(".npy") else sorted(held)
    parts = []
    for name in names:
        stem = name[:-4]
        if name.endswith(".npy") and not stem.endswith(".text"):
            beside = [f"{stem}.text.npy", f"{stem}.parquet"]
            text, table = (paths.join(folder, other) if other in held else "" for other in beside)
            parts.append(Part(stem, paths.join(folder, name), text, table))
    return parts, "{name}.npy"


VECTORS = ("embedding", "embeddings")  # what a parquet file's column of vectors may be called
LAYOUTS: dict[str, Callable[[str, str], tuple[list[Part], str]]] = {
    "clip-retrieval": _clip_retrieval,
    "datacomp": _datacomp,
    "nemo": _nemo,
    "npy": _npy,
}


def open_part(part: Part, more: Sequence[str] = ()) -> Table:
    """Open a part. more: further columns of its table, by their own names.

    Raises: ShardError when a file cannot be read or the rows do not line up.
    """
    columns = read_columns(part, (*NAMES, *more)) if part.table else {}
    image = _vectors(part.image, part.entries[0])
    text = _vectors(part.text, part.entries[1]) if part.text else None
    held = {"images": len(image), "texts": len(image if text is None else text)}
    held |= {name: len(column) for name, column in columns.items()}
    if len(set(held.values())) > 1:
        told = ", ".join(f"{count:,} {name}" for name, count in held.items())
        raise ShardError(f"the rows of {part.image} do not line up: {told}")
    if text is not None and text.shape != image.shape:
        raise ShardError(f"{part.text} has vectors of {text.shape[1]} dimensions, {part.image} of {image.shape[1]}")
    return Table(len(image), columns, image, text)


@contextmanager
def opened(location: str) -> Iterator[Any]:
    """Open a parquet file, for as long as it is read. Raises: ShardError, naming it, if it cannot be."""
    import pyarrow.parquet as pq

    try:
        with paths.open_read(location) as file:
            yield pq.ParquetFile(file)
    except (pa.ArrowException, OSError) as error:
        raise ShardError(f"{location} cannot be read: {first_line(error)}") from None


def table_schema(part: Part) -> pa.Schema:
    """Read which columns a part's table has. Raises: ShardError."""
    with opened(part.table) as held:
        return held.schema_arrow


def read_columns(part: Part, wanted: tuple[str, ...]) -> dict[str, pa.Array]:
    """Read those of the wanted columns that a part's table has, by our names or its own. Raises: ShardError."""
    with opened(part.table) as held:
        there = set(held.schema_arrow.names)
        chosen = {ours: next((name for name in NAMES.get(ours, (ours,)) if name in there), None) for ours in wanted}
        read = held.read(columns=sorted({name for name in chosen.values() if name}))
    return {ours: read[name].combine_chunks() for ours, name in chosen.items() if name}


def text_of(value: Any) -> str | None:
    """Return a table's value as text: text, UTF-8 bytes, or the first of a list of these; None for anything else."""
    if isinstance(value, list | tuple):
        return next((text for text in map(text_of, value) if text is not None), None)
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8-sig")
        except UnicodeDecodeError:
            return None
    return clean(value)


def name_of(value: Any) -> str | None:
    """Return a table's value as the name of a row: text, a whole number, or bytes; None for anything else.

    Bytes that are not UTF-8, such as ids of 16 bytes, are written in hexadecimal digits.
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return str(int(value))
    if isinstance(value, bytes):
        return text_of(value) or value.hex() or None
    return str(value) if isinstance(value, uuid.UUID) else records.usable_text(value)


def _vectors(location: str, entry: str) -> np.ndarray:
    """Read vectors f16/f32 [n, d] from an npy (mapped when local), an npz entry or a parquet column."""
    try:
        if location.endswith(".parquet"):
            return _parquet_vectors(location)
        if location.endswith(".npz") or paths.is_remote(location):
            with paths.open_read(location) as file:
                if location.endswith(".npz"):
                    _refuse_oversized(file, location)
                held = np.load(file, allow_pickle=False)
                found = held[entry] if location.endswith(".npz") else held
        else:
            found = np.load(paths.local(location), mmap_mode="r", allow_pickle=False)
    except KeyError:
        raise ShardError(f"{location} has no array {entry}") from None
    except ShardError:
        raise
    except Exception as error:  # numpy parses headers as Python text: hostile ones raise nearly anything
        raise ShardError(f"{location} cannot be read: {first_line(error)}") from None
    if not isinstance(found, np.ndarray):
        raise ShardError(f"{location} is a zip of arrays (.npz), whatever its name; rename it, or name one .npy a part")
    if found.ndim != 2 or found.dtype.kind != "f" or not found.shape[1]:
        raise ShardError(f"{location} holds {found.dtype} {found.shape}, not vectors of numbers [n, d]")
    return np.asarray(found)


def _refuse_oversized(file: IO[bytes], location: str) -> None:
    """Raise ShardError for an npz that unpacks to far more than its size: vectors hardly compress."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as packed:
        large = sum(each.file_size for each in packed.infolist())
    if large > max(gzipped.LEAST_BYTES, gzipped.TIMES * size):
        raise ShardError(f"{location} unpacks to {large:,} bytes, {large // size:,} times its size")
    file.seek(0)


def _parquet_vectors(location: str) -> np.ndarray:
    """Read a list column as f32 [n, d]; a row that is null or of another length becomes NaN. d is 0 if all are."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with paths.open_read(location) as file:
        held = pq.ParquetFile(file)
        names = held.schema_arrow.names
        column = next((name for name in VECTORS if name in names), "")
        if not column:
            raise ShardError(f"{location} has no column {' or '.join(VECTORS)}; it has {', '.join(names)}")
        lists = held.read(columns=[column])[column].combine_chunks()
    if not (
        pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type) or pa.types.is_fixed_size_list(lists.type)
    ):
        raise ShardError(f"{location} has {lists.type} in {column}, not lists of numbers")
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    given = lengths[lengths > 0]  # a null row says nothing of the others' length
    dim = int(np.bincount(given).argmax()) if len(given) else 0
    if not dim:
        return np.empty((len(lists), 0), np.float32)
    sound = lengths == dim
    vectors = np.full((len(lists), dim), np.nan, np.float32)
    flat = pc.list_flatten(lists.filter(pa.array(sound))).to_numpy(zero_copy_only=False)
    vectors[sound] = flat.astype(np.float32).reshape(-1, dim)
    return vectors
