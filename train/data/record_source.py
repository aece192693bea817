"""Records of instruction data in a file (JSON, JSON lines or parquet), with pictures in a folder or in the records.

For JSON, only the positions of the records are kept in memory. Parquet is converted once to an uncompressed Arrow file
in the folder for temporary files, from which any process reads single rows; it takes the space of the unpacked data.
"""

from __future__ import annotations

import bisect
import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines import record_files, record_forms, records
from pipelines.samples import MAX_MEMBER_BYTES
from pipelines.terminal import first_line
from train.data import scratch
from train.data.prompts import Rejected
from train.data.reading import REASONS, Files, Record, rejection, text_of
from train.errors import UsageError

ROWS = 64  # parquet rows in memory at a time


class JsonRows:
    """The records of a JSON or JSON-lines file, read by their position in it."""

    def __init__(self, path: Path) -> None:
        self.path, self.files = str(path), Files()
        spans: list[tuple[int, int]] = []
        value: Any = None
        with path.open("rb") as file:
            self.codec = record_files.encoding_of(file.read(64))[0]
            try:
                for item in record_files.read_items(file, str(path)):
                    value = item.value
                    spans.append((item.offset, item.size))
            except record_files.Broken as broken:
                raise UsageError(str(broken)) from None
        if path.suffix == ".json" and len(spans) == 1 and not record_forms.has_turns(value):
            raise UsageError(f"{path}: expected a JSON list of records, JSON lines, or an object that holds records")
        self.spans: NDArray[np.int64] = np.array(spans, np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self.spans)

    def fields(self, index: int) -> dict[str, Any]:
        """Parse one record.  Raises: Rejected."""
        offset, size = (int(x) for x in self.spans[index])
        data = self.files.read(self.path, offset, size)
        try:
            fields = record_files.parse(data, self.codec)
        except (ValueError, RecursionError):
            fields = None
        if not isinstance(fields, dict):
            raise Rejected("bad_json")
        return fields


class TableRows:
    """The rows of parquet files that share a schema.  Raises: UsageError if they do not."""

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.place = str(scratch.fresh(".arrow"))
        self.starts = [0]
        self.opened: Any = None
        schema = None
        try:
            with contextlib.ExitStack() as stack:
                for path in paths:
                    table = pq.ParquetFile(path)
                    if schema is None:
                        schema = table.schema_arrow.remove_metadata()
                        writer = stack.enter_context(pa.ipc.new_file(self.place, schema))
                    for batch in table.iter_batches(ROWS):
                        writer.write_batch(batch.cast(schema) if batch.schema != schema else batch)
                        self.starts.append(self.starts[-1] + batch.num_rows)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be read: {first_line(error)}") from None

    def __len__(self) -> int:
        return self.starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": None}

    def fields(self, index: int) -> dict[str, Any]:
        """Read one row."""
        import pyarrow as pa

        if self.opened is None:
            self.opened = pa.ipc.open_file(pa.memory_map(self.place))
        batch = bisect.bisect_right(self.starts, index) - 1
        [row] = self.opened.get_batch(batch).slice(index - self.starts[batch], 1).to_pylist()
        return dict(row)


class RecordSource:
    """Records of any form that pipelines/records.py reads, from a JSON or a table, with images in a folder or inside.

    images_digest: digest of the names and sizes of the records' images, in their order, so that a copy of the folder
    counts as the same. An image replaced by one of equal size goes unnoticed; reading all would take as long as an
    epoch.
    """

    def __init__(self, path: Path, rows: JsonRows | TableRows, images: Path | None, *, digest: bool = False) -> None:
        self.path, self.rows, self.images = path, rows, images
        self.files, self.notes = Files(), list[str]()
        here = {os.path.abspath(images), os.path.realpath(images)} if images else set()
        self.folders = [folder.rstrip("/") + "/" for folder in here]
        self.images_digest = self._digest_images() if digest else ""

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        """Read one record and check that its images exist.  Raises: Rejected."""
        fields = self.rows.fields(index)
        reading = records.read(fields, f"#{index}")
        if reading.record is None:
            named = record_forms.as_list(fields.get("image"))
            if reading.fault in REASONS or reading.fault == records.NO_NAME:
                for name in named:  # an image's fault is reported before the turns'; embedded bytes have no path
                    if not (isinstance(name, bytes) or (isinstance(name, dict) and name.get("bytes"))):
                        self._locate(name)
            raise rejection(fields, reading.fault, len(named))
        locations = tuple(self._locate(each.name)[0] if each.data is None else each.data for each in reading.pictures)
        key = text_of(reading.record.get("id", f"#{index}"))
        return Record(key, reading.record["conversations"], locations, reading.record)

    def name(self, index: int) -> str:
        """Return file/key."""
        return f"{self.path.name}/{self.key(index)}"

    def key(self, index: int) -> str:
        """Return the record's id, or #row if it has none."""
        try:
            return text_of(self.rows.fields(index).get("id", f"#{index}"))
        except Rejected:
            return f"#{index}"

    def extents(self) -> Iterator[tuple[str, int, int]]:
        """Yield the file's stem and records."""
        yield self.path.stem, 0, len(self)

    def _locate(self, image: Any) -> tuple[str, int]:
        """Return the path of an image below the folder, and its size.  Raises: Rejected."""
        if isinstance(image, str):
            image = next((image.removeprefix(each) for each in self.folders if image.startswith(each)), image)
        parts = PurePosixPath(image).parts if isinstance(image, str) else ("..",)
        if ".." in parts or PurePosixPath(image).is_absolute():
            raise Rejected("image_outside_folder")
        if self.images is None:
            raise Rejected("no_image_folder")
        found = _stat(self.images.joinpath(*parts))
        if found is None and "\\" in image:  # a Windows path
            return self._locate(image.replace("\\", "/"))
        if found is None:
            raise Rejected("missing_image")
        if found[1] > MAX_MEMBER_BYTES:
            raise Rejected("too_large")
        return found

    def _digest_images(self) -> str:
        seen = hashlib.blake2b(digest_size=16)
        for index in range(len(self)):
            seen.update(self._describe_images(index).encode(errors="replace"))
        return seen.hexdigest()

    def _describe_images(self, index: int) -> str:
        try:
            fields = self.rows.fields(index)
            reading = records.read(fields, "")
            names = [each.name for each in reading.pictures if each.data is None]
            names = names if reading.record is not None else record_forms.as_list(fields.get("image"))
            return "".join(f"{name} {self._locate(name)[1]}\n" for name in names)
        except Rejected:
            return f"{index} Rejected\n"

    def image_bytes(self, location: Any) -> bytes:
        """Read an image file, or return what the record itself holds."""
        try:
            return location if isinstance(location, bytes) else Path(location).read_bytes()
        except OSError:
            raise Rejected("unreadable") from None


def _stat(path: Path) -> tuple[str, int] | None:
    """Return a regular file's path and size, or None."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # also a name that no file can have
        return None
    return (str(path), found.st_size) if stat.S_ISREG(found.st_mode) else None
