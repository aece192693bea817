"""A remote file system in memory that counts what is read of each file: `counted://…`."""

import io
from collections import Counter

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class CountedFile(io.BytesIO):
    """A file whose reads are counted. path: under which name."""

    def __init__(self, data, path):
        super().__init__(data)
        self.path, self.size = path, len(data)

    def read(self, size=-1):
        data = super().read(size)
        Counted.read[self.path] += len(data)
        return data


class Counted(MemoryFileSystem):
    """`read`: bytes by path; `requests`: how often each file was asked for."""

    protocol = "counted"
    store, pseudo_dirs = {}, [""]
    read, requests = Counter(), Counter()

    def cat_file(self, path, start=None, end=None, **options):
        data = super().cat_file(path, start, end, **options)
        path = self._strip_protocol(path)
        self.read[path] += len(data)
        self.requests[path] += 1
        return data

    def _open(self, path, mode="rb", **options):
        if mode != "rb":
            return super()._open(path, mode, **options)
        self.requests[path] += 1
        return CountedFile(super().cat_file(path), path)


fsspec.register_implementation("counted", Counted, clobber=True)


def reset():
    """Forget what was counted."""
    Counted.read.clear()
    Counted.requests.clear()


def bytes_of(*parts):
    """Add up the bytes read of files in whose path all parts stand."""
    return sum(size for path, size in Counted.read.items() if all(part in path for part in parts))


def size_of(*parts):
    """Add up the sizes of files in whose path all parts stand."""
    return sum(len(Counted.store[path].getbuffer()) for path in Counted.store if all(part in path for part in parts))


def upload(folder, url):
    """Copy a local folder."""
    Counted().put(str(folder), url, recursive=True)
