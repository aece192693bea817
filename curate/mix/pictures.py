"""Where the pictures of a mix's records are: files under a folder, members of tars, or bytes that a record holds.

In: names as records write them. Out: `Picture`s, each a byte range that `read_picture` reads again. A name is looked
up only under its source's folder: an absolute one is accepted only if it leads there.
"""

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field

from curate.errors import ShardError, UsageError
from curate.storage import paths
from curate.storage.tar import (
    GZIP_MAGIC,
    IMAGE_SUFFIXES,
    MAX_MEMBER_BYTES,
    TAR_SUFFIXES,
    Shard,
    TarWriter,
    is_safe,
    list_pool,
    open_tar,
    read_index,
    suffix_of,
)
from pipelines.tar_headers import BLOCK

SNIFFED_BYTES = 16


@dataclass(frozen=True, slots=True)
class Picture:
    """Where an image's original bytes are. offset: -1 for a whole file. data: the bytes, while they are in memory."""

    location: str
    offset: int
    size: int
    suffix: str
    data: bytes | None = field(default=None, compare=False, repr=False)


def read_picture(picture: Picture) -> bytes:
    """Read a picture's original bytes. Raises: ShardError if they have changed."""
    if picture.data is not None:
        return picture.data
    try:
        with paths.open_read(picture.location) as file:
            file.seek(max(picture.offset, 0))
            data = file.read(picture.size)
    except OSError as error:
        raise ShardError(f"the image {picture.location} can no longer be read: {error.strerror or error}") from None
    if len(data) != picture.size:
        again = "run `curate mix` again with --overwrite"
        raise ShardError(f"the image {picture.location} has changed while the mix was made", again)
    return data


def is_tars(root: str) -> bool:
    """Say whether images are in tars, rather than files under a folder."""
    if not paths.is_dir(root):
        return True
    files, folders = paths.entries(root)
    names = [name.lower() for name in files]
    if any(name.endswith(".tar") for name in names):
        return True
    loose = folders or any(name.endswith(tuple(f".{kind}" for kind in IMAGE_SUFFIXES)) for name in names)
    return not loose and any(name.endswith(TAR_SUFFIXES) for name in names)  # tars beside pictures: what they came in


def plain_tar(shard: Shard, scratch: str) -> str:
    """Return a plain tar in which a shard's members can be read at their places: itself, or an unpacked copy.

    scratch: path prefix of the copy.
    """
    with paths.open_read(shard.location) as file:
        if file.read(len(GZIP_MAGIC)) != GZIP_MAGIC:
            return shard.location
    copy = f"{scratch}.{shard.stem}.tar"
    with open_tar(shard.location) as plain, paths.atomic_write(copy) as file:
        shutil.copyfileobj(plain, file, 1 << 20)
    return copy


class ImageFinder:
    """Find a source's images by the names that records give: files under a folder, or members of tars.

    scratch: path prefix for tars that must be unpacked.
    """

    def __init__(self, root: str, scratch: str) -> None:
        self.root = root
        self.members: dict[str, Picture] | None = None
        if root and is_tars(root):
            self.members = {}
            for shard in list_pool(root):
                location = plain_tar(shard, f"{scratch}.images")
                with paths.open_read(location) as file:
                    for sample in read_index(file).samples:
                        for member in sample.members:
                            kind = member.suffix.rpartition(".")[2]
                            picture = Picture(location, member.offset, member.size, kind)
                            self.members.setdefault(member.name.removeprefix("./"), picture)
        here = paths.local(root) if root and not paths.is_remote(root) else ""
        self.folders = {os.path.abspath(here), os.path.realpath(here)} if here else set()

    def find(self, image: str) -> tuple[Picture | None, str]:
        """Locate an image. Returns (picture, "") or (None, why not). Raises: UsageError where there is no folder."""
        if not self.root:
            raise UsageError(
                f"a record names the image {image[:80]!r}, but its source names no folder of images.",
                "add images = …",
            )
        if image.startswith("/"):
            inside = [folder.rstrip("/") + "/" for folder in self.folders]
            image = next((image.removeprefix(each) for each in inside if image.startswith(each)), image)
        if not is_safe(image):
            return None, "unsafe or foreign image name"
        found, why = self._look_up(image)
        if found is None and "\\" in image:  # as Windows writes it
            found, why = self._look_up(image.replace("\\", "/"))
        return found, why

    def _look_up(self, image: str) -> tuple[Picture | None, str]:
        suffix = image.rpartition(".")[2].lower()
        if self.members is not None:
            if suffix not in IMAGE_SUFFIXES:
                return None, "unsafe or foreign image name"
            picture = self.members.get(image.removeprefix("./"))
            if picture is not None and picture.size > MAX_MEMBER_BYTES:
                return None, f"image over the limit of {MAX_MEMBER_BYTES:,} bytes"
            if picture is not None or not paths.is_dir(self.root):
                return (picture, "") if picture is not None else (None, "missing image")
        location = paths.join(self.root, image)
        try:
            if suffix not in IMAGE_SUFFIXES and paths.exists(location) and not paths.is_dir(location):
                with paths.open_read(location) as file:
                    head = file.read(SNIFFED_BYTES)
                suffix = suffix_of(head, suffix)
            size = os.stat(paths.local(location)).st_size if not paths.is_remote(location) else paths.size(location)
        except (OSError, ValueError):
            size = -1
        if suffix not in IMAGE_SUFFIXES:
            return None, "unsafe or foreign image name"
        if size < 0:
            return None, "missing image"
        if size > MAX_MEMBER_BYTES:
            return None, f"image over the limit of {MAX_MEMBER_BYTES:,} bytes"
        return (Picture(location, -1, size, suffix), "") if size else (None, "empty image")


class PictureStore:
    """A tar for pictures that have no file of their own, created when the first one comes; use as a context."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.stack = ExitStack()
        self.tar: TarWriter | None = None

    def add(self, name: str, data: bytes) -> Picture:
        """Keep a picture byte for byte, also in memory, since the tar can be read only once it is complete."""
        if self.tar is None:
            self.tar = self.stack.enter_context(TarWriter(self.stack.enter_context(paths.atomic_write(self.location))))
        suffix = suffix_of(data)
        self.tar.add(f"{name}.{suffix}", data)
        padded = -(-len(data) // BLOCK) * BLOCK
        return Picture(self.location, self.tar.offset - padded, len(data), suffix, data)

    def __enter__(self) -> "PictureStore":
        return self

    def __exit__(self, *failure: object) -> None:
        self.stack.__exit__(*failure)  # type: ignore[arg-type]
