"""What every source of samples has in common: a record as read, byte ranges of files, and names for what is wrong."""

from __future__ import annotations

import errno
import os
import re
from dataclasses import dataclass, field
from typing import Any

from pipelines import record_forms, records
from pipelines.samples import MAX_MEMBER_BYTES
from train.data.prompts import Rejected, parse

MAX_OPEN_FILES = 64
FULL = (errno.EMFILE, errno.ENFILE)  # too many open files (`ulimit -n`), which is not the sample's fault


@dataclass(frozen=True)
class Record:
    """One sample as read; its images are given as locations that the same source can open."""

    key: str
    conversations: Any
    images: tuple[Any, ...]
    fields: dict[str, Any] = field(default_factory=dict)


class Files:
    """Read byte ranges of many files through a few open descriptors."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes.  Raises: Rejected: unreadable, or too_large (over `MAX_MEMBER_BYTES`)."""
        if size > MAX_MEMBER_BYTES:  # a header may claim far more bytes than fit in memory
            raise Rejected("too_large")
        try:
            if path not in self._open:
                while len(self._open) >= MAX_OPEN_FILES:
                    os.close(self._open.pop(next(iter(self._open))))
                self._open[path] = self._opened(path)
            data = os.pread(self._open[path], size, offset)
        except OSError as error:
            if error.errno in FULL:
                raise
            raise Rejected("unreadable") from None
        if len(data) != size:
            raise Rejected("unreadable")
        return data

    def _opened(self, path: str) -> int:
        """Open a file; if the process has too many open, close others first."""
        while True:
            try:
                return os.open(path, os.O_RDONLY)
            except OSError as error:
                if error.errno not in FULL or not self._open:
                    raise
                os.close(self._open.pop(next(iter(self._open))))

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": {}}


# Faults of records, and the reasons that samples with them are counted under; other faults are their own reason.
REASONS = {
    "not a JSON object": "bad_json",
    "no list of turns": "no_conversation",
    "no turns": "no_conversation",
    record_forms.NO_FORM: "no_conversation",
    "no conversation and no caption": "no_caption",
    "a turn without from and value": "bad_turn",
    "a turn by an unknown speaker": "bad_turn",
    records.NO_PICTURE: "image_mark_without_image",
    records.NO_MARK: "image_without_image_mark",
    records.NOT_UTF8: "bad_utf8",
}


def rejection(fields: dict[str, Any], fault: str, num_images: int) -> Rejected:
    """Name what is wrong with a record; for LLaVA's form with the reason of `parse`, if that refuses it too."""
    try:
        if isinstance(fields.get("conversations"), list):
            parse(fields["conversations"], num_images)
    except Rejected as reason:
        return reason
    return Rejected(REASONS.get(fault, re.sub(r"\W+", "_", fault).strip("_")))


def text_of(value: Any) -> str:
    """Write a value as text that any file can hold: JSON may contain halves of surrogate pairs."""
    return str(value).encode(errors="replace").decode()
