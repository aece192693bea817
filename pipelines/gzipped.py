"""Unpack gzipped tars into a file, with bounded memory and disk space, for both programs.

Pictures hardly compress, and tars of short texts to a twentieth; a file that unpacks to hundreds of times its size is a
mistake or a trap: one megabyte of it can fill a disk. So more than `TIMES` the packed size is refused, from 1 GiB on.
"""

import io
import zlib
from typing import IO

TIMES, LEAST_BYTES = 100, 1 << 30
CHUNK = 1 << 20


class Oversized(ValueError):
    """A file unpacks to far more than its size."""


def unpack(packed: IO[bytes], plain: IO[bytes], where: str) -> bool:
    """Unpack a gzip file as far as possible. Returns whether it is complete. where: its name for messages.

    Concatenated files, as `cat` makes them, are read one after the other. Raises: Oversized.
    """
    limit = max(LEAST_BYTES, TIMES * packed.seek(0, io.SEEK_END))
    packed.seek(0)
    unpacker, begun, written = zlib.decompressobj(wbits=31), False, 0  # 31: with gzip's header and checksum
    while part := packed.read(CHUNK):
        while part := part if begun else part.lstrip(b"\0"):  # zeros may pad the space between two files
            try:
                data, begun = unpacker.decompress(part, CHUNK), True
            except zlib.error:
                return False
            written += len(data)
            if written > limit:
                raise Oversized(
                    f"{where} unpacks to more than {limit:,} bytes, {TIMES} times its size: "
                    "if that is intended, unpack it yourself (gunzip)"
                )
            plain.write(data)
            part = unpacker.unconsumed_tail or unpacker.unused_data
            if unpacker.eof:
                unpacker, begun = zlib.decompressobj(wbits=31), False
    plain.write(unpacker.flush())
    plain.flush()
    return not begun
