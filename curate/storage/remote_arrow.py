"""Arrow files on a URL, read by ranges: the footer, the batches' metadata, then the columns that are asked for.

A footer says where batches lie, a batch's metadata where its buffers do (Arrow's columnar format, "IPC File Format"
and "Message.fbs", in flatbuffers). pyarrow reads some columns of a file by itself, but one buffer after another, and
asks for the file's size; here all ranges go out at once, and pyarrow decodes what came back.

Requests: one for the footer, one for the batches' metadata, then those for the columns. Nothing is kept open.
"""

import io
import struct
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from curate.storage import paths, ranges
from curate.storage.ranges import Pieces

TAIL_BYTES = 4 << 10  # requested while no footer of the folder is known
VECTOR_WASTE = 0.5  # as `ranges.WASTE`, between rows of vectors, which are too short for a request each
MAGIC = b"ARROW1"
END = 1 << 60  # the assumed end of a file, since asking for its size would cost a request
BLOCK = np.dtype([("offset", "<i8"), ("described", "<i4"), ("_", "<i4"), ("body", "<i8")])
BUFFER = np.dtype([("offset", "<i8"), ("size", "<i8")])
ALIGNED = 8

_footer_bytes: dict[str, int] = {}  # by folder, since the footers in a folder have similar sizes


class RemoteFile:
    """An Arrow IPC file on a URL. Raises: FileNotFoundError, OSError or pa.ArrowInvalid where there is none."""

    def __init__(self, location: str) -> None:
        self.location = location
        folder = paths.parent(location)
        asked = _footer_bytes.get(folder, TAIL_BYTES)
        [tail] = ranges.read_remote(location, [-asked], [None])
        self._whole = tail if len(tail) < asked else None
        needed = _footer_size(tail)
        if needed > len(tail) and self._whole is None:
            [tail] = ranges.read_remote(location, [-needed], [None])
        if needed > len(tail):
            raise pa.ArrowInvalid("the file is shorter than its footer states")
        _footer_bytes[folder] = needed + ALIGNED
        self._footer = tail[-needed:]
        self._messages: dict[int, memoryview] = {}  # the metadata of batches, as far as it was read
        self._described: list[Pieces] = []

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns, with the metadata."""
        return self._reader(Pieces([], [])).schema

    @cached_property
    def _blocks(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the dictionaries lie, and the batches: BLOCK each."""
        dictionaries, batches = (_vector(self._footer, _root(self._footer, 0), field, BLOCK) for field in (2, 3))
        return dictionaries, batches

    def _describe(self, wanted: Sequence[int]) -> None:
        """Read what comes before the columns of some batches: their metadata, and the first time the dictionaries."""
        new = [index for index in wanted if index not in self._messages]
        dictionaries, batches = self._blocks[0][: 0 if self._messages else None], self._blocks[1][new]
        ends = dictionaries["offset"] + dictionaries["described"] + dictionaries["body"]
        starts = np.concatenate([dictionaries["offset"], batches["offset"]])
        found = self._fetch(starts, np.concatenate([ends, batches["offset"] + batches["described"]]))
        self._described.append(found)
        blocks = zip(batches["offset"].tolist(), batches["described"].tolist(), strict=True)
        self._messages.update({index: found(*block) for index, block in zip(new, blocks, strict=True)})

    def _rows(self) -> list[int]:
        """Count the rows of each batch."""
        every = range(len(self._blocks[1]))
        self._describe(every)
        return [_rows_of(self._messages[index]) for index in every]

    def num_rows(self) -> int:
        """Count the rows."""
        return sum(self._rows())

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        """Yield the record batches, or some columns of them."""
        for index in range(len(self._rows())):
            yield self.batch(index, columns)

    def batch(self, index: int, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Read a record batch, or some columns of it."""
        names = list(self.schema.names if columns is None else columns)
        places = [self.schema.get_field_index(name) for name in names]
        if min(places, default=0) < 0:
            raise KeyError(f"{self.location} has no column {names[places.index(-1)]}")
        starts, sizes = self._buffers(index)
        if columns is not None:
            bounds = np.cumsum([0, *(_num_buffers(kind) for kind in self.schema.types)])
            if bounds[-1] == len(starts):  # else of a kind that is not known here: all of it is read
                wanted = np.concatenate([np.arange(bounds[place], bounds[place + 1]) for place in places])
                starts, sizes = starts[wanted], sizes[wanted]
        filled = sizes > 0
        found = self._fetch(starts[filled], (starts + -(-sizes // ALIGNED) * ALIGNED)[filled])
        return self._reader(found, sorted(places)).get_batch(index).select(names)

    def vectors(self, column: str, rows: np.ndarray) -> np.ndarray:
        """Read rows (numbers within the file, in any order) of an embedding column as f16 [len(rows), d].

        Only their bytes are read, and some between them. Null rows come as what is stored under them: zeros.
        """
        place = self.schema.get_field_index(column)
        dim = self.schema.field(place).type.list_size
        before = sum(_num_buffers(kind) for kind in self.schema.types[:place])
        found = np.empty((len(rows), dim), np.float16)
        first = 0
        for index, count in enumerate(self._rows()):
            last = first + count
            here = np.flatnonzero((rows >= first) & (rows < last))
            if len(here):
                values = int(self._buffers(index)[0][before + 2])  # after the validity of lists and of values
                starts = values + (rows[here] - first) * dim * 2
                pieces = self._fetch(starts, starts + dim * 2, VECTOR_WASTE)
                for at, start in zip(here.tolist(), starts.tolist(), strict=True):
                    found[at] = np.frombuffer(pieces(start, dim * 2), np.float16)
            first = last
        return found

    def _buffers(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Locate the buffers of a batch in the file: where they start, and their bytes, i64 [n] each."""
        self._describe([index])
        block, message = self._blocks[1][index], self._messages[index]
        found = _vector(message, _header(message), 2, BUFFER)
        return int(block["offset"]) + int(block["described"]) + found["offset"], found["size"].astype(np.int64)

    def _fetch(self, starts: np.ndarray, stops: np.ndarray, waste: float = ranges.WASTE) -> Pieces:
        if self._whole is not None:
            return Pieces([0], [self._whole])
        return ranges.read(self.location, starts, stops, waste)

    def _reader(self, found: Pieces, included: Sequence[int] | None = None) -> pa.ipc.RecordBatchFileReader:
        options = pa.ipc.IpcReadOptions(included_fields=included)
        served = _Served(self._footer, [found, *self._described])
        return pa.ipc.open_file(pa.PythonFile(served, mode="r"), options=options)


class _Served(io.RawIOBase):
    """The bytes of a file that are known so far, readable from any position. footer: those at its end."""

    def __init__(self, footer: bytes, known: Sequence[Pieces]) -> None:
        self.position = 0
        self.known = [Pieces([END - len(footer)], [footer]), *known]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: END}[whence]
        return self.position

    def read(self, size: int = -1) -> Any:
        start, self.position = self.position, self.position + size
        for pieces in self.known if size else ():
            if (found := pieces.find(start, size)) is not None:
                return found
        if size:
            raise OSError(f"bytes {start:,} to {start + size:,} were not read")
        return b""


def _num_buffers(kind: pa.DataType) -> int:
    """Count the buffers that a column of this type has in a message, those of its children included."""
    if pa.types.is_null(kind):
        return 0
    own = 2 if pa.types.is_dictionary(kind) else int(kind.num_buffers)
    return own + sum(_num_buffers(kind.field(part).type) for part in range(kind.num_fields))


def _footer_size(tail: bytes) -> int:
    """Read how many bytes the footer takes, its length and the mark at the end included. Raises: pa.ArrowInvalid."""
    if len(tail) < 10 or tail[-6:] != MAGIC:
        raise pa.ArrowInvalid("not an Arrow file")
    return int(struct.unpack_from("<i", tail, len(tail) - 10)[0]) + 10


def _root(data: Any, at: int) -> int:
    """Locate the table of a flatbuffer that begins at a position."""
    return at + int(struct.unpack_from("<I", data, at)[0])


def _field(data: Any, table: int, number: int) -> int:
    """Locate a field of a flatbuffers table; 0 where it is left out."""
    fields = table - struct.unpack_from("<i", data, table)[0]
    slot = 4 + 2 * number
    known = slot < struct.unpack_from("<H", data, fields)[0]
    offset = struct.unpack_from("<H", data, fields + slot)[0] if known else 0
    return table + offset if offset else 0


def _vector(data: Any, table: int, number: int, dtype: np.dtype) -> np.ndarray:
    """Read a field that is a vector of structs."""
    field = _field(data, table, number)
    if not field:
        return np.empty(0, dtype)
    at = _root(data, field)
    return np.frombuffer(data, dtype, struct.unpack_from("<I", data, at)[0], at + 4)


def _header(message: Any) -> int:
    """Locate the RecordBatch in the metadata of a batch."""
    mark = struct.unpack_from("<i", message, 0)[0]
    table = _root(message, 8 if mark == -1 else 4)
    return _root(message, _field(message, table, 2))


def _rows_of(message: Any) -> int:
    field = _field(message, _header(message), 0)
    return int(struct.unpack_from("<q", message, field)[0]) if field else 0
