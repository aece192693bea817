"""Plain JPEGs, decoded and resized on the device that embeds: `--decode gpu`.

In: the bytes of a batch's JPEGs, limited by `images.plain_jpeg_size` to those that every decoder reads alike; all other
pictures come as pixels. Out: the pixels that the model sees, on the device, and the picture's hashes: its grey cells
are averaged on the device and hashed here. A JPEG that the decoder refuses all the same is decoded by the processor.
Decoders round a little differently, so each shard's first pictures are embedded both ways, and the manifest says how
close the vectors are.

torchvision's decoder (nvJPEG on a GPU; deprecated in 0.29) exists once per process, refuses a whole list for one bad
picture in it, and writes on a stream of its own into memory taken from the current stream. So it runs on a stream of
which nothing else makes use, one batch at a time, after all earlier work there has ended. On a processor the same code
runs for tests. Device memory: about 30 bytes per pixel of CHUNK_PIXELS, 1 GiB.
"""

import functools
import io
import sys
import threading
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from curate.embed import details, images
from curate.embed.reader import Reader, Rows
from pipelines.terminal import first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CHUNK_PIXELS = 1 << 25  # decoded at a time
COMPARED = 64  # samples at a shard's beginning that are embedded both ways
NEAR = 0.999  # a cosine


def reason_against(device: str) -> str:
    """Return why a device cannot decode, or "" if it can; it is tried on a small JPEG."""
    if not device.startswith("cuda"):
        return "no GPU is seen"
    out = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(out, "JPEG")
    try:
        _decode([out.getvalue()], device)
    except Exception as error:  # torchvision is absent, or built without nvJPEG, or has no decoder any more
        return first_line(error)[:200]
    return ""


def _decode(coded: Sequence[bytes], device: Any) -> list["Tensor"]:
    """Decode JPEGs to u8 [3, h, w] each.  Raises: RuntimeError where one of them is refused."""
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    warnings.filterwarnings("ignore", message=r"(?s).*TorchCodec", category=DeprecationWarning)
    read = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in coded]
    decoded: list[Tensor] = decode_jpeg(read, ImageReadMode.RGB, torch.device(device))
    return decoded


class Jpegs:
    """Decodes on one device for one model. Safe to call from several threads."""

    def __init__(self, device: str, preprocess: Mapping[str, Any], size: tuple[int, int]) -> None:
        """size: height and width of the pixels.  Raises: UsageError for a transform that no device does."""
        import torch

        self.device, self.size = torch.device(device), size
        self.resize = images.resizing(preprocess)
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()

    def __call__(self, coded: Sequence[bytes]) -> tuple["Tensor", list[dict[str, Any]]]:
        """Decode JPEGs to pixels u8 [n, h, w, 3] on the device, and describe each as `details.describe` does.

        Raises: RuntimeError where one of them is refused.
        """
        import torch

        places: list[int] = []
        pixels: list[Tensor] = []
        cells: dict[int, list[Tensor]] = {images.HASH_SIDE: [], details.WRITING_SIDE: []}
        with self._alone():
            for at, stack in self._stacks(coded):
                places += at
                pixels.append(self.resize(stack).permute(0, 2, 3, 1))
                grey = _grey(stack)
                for side, into in cells.items():
                    into.append(_boxed(grey, side))
            order = torch.tensor(places).argsort().to(self.device)
            made = torch.cat(pixels)[order]
            told = [torch.cat(each)[order].cpu().numpy() for each in cells.values()]
        if self._stream is not None:
            made.record_stream(torch.cuda.current_stream(self.device))
        return made, [details.describe_cells(*both) for both in zip(*told, strict=True)]

    def _stacks(self, coded: Sequence[bytes]) -> Iterator[tuple[list[int], "Tensor"]]:
        """Decode a few pictures at a time, and yield those of one size, u8 [n, 3, h, w], with their places."""
        import torch

        sizes = [images.plain_jpeg_size(data, images.MOST_ON_DEVICE) or (1, 1) for data in coded]
        chunks: list[list[int]] = []
        held = CHUNK_PIXELS
        for at, (width, height) in enumerate(sizes):
            held += width * height
            if held > CHUNK_PIXELS:
                chunks.append([])
                held = width * height
            chunks[-1].append(at)
        for chunk in chunks:
            alike = defaultdict(list)
            for at, image in zip(chunk, _decode([coded[at] for at in chunk], self.device), strict=True):
                alike[image.shape].append((at, image))
            for pairs in alike.values():
                yield [at for at, _ in pairs], torch.stack([image for _, image in pairs])

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Run the body on this decoder's stream while no other batch does, and wait for its work to end."""
        import torch

        with self._lock:
            if self._stream is None:
                yield
                return
            with torch.cuda.stream(self._stream):
                try:
                    yield
                finally:
                    self._stream.synchronize()

    def _each(self, coded: Sequence[bytes]) -> list[tuple["Tensor", dict[str, Any]] | None]:
        """Decode JPEGs: pixels u8 [h, w, 3] and the hashes of each; None for those that the device refuses."""
        try:
            return list(zip(*self(coded), strict=True))
        except RuntimeError:
            return [each for data in coded for each in self._each([data])] if len(coded) > 1 else [None]

    def fill(self, rows: Rows, put: Callable[[np.ndarray], "Tensor"], exact: Reader) -> tuple[Rows, "Tensor"]:
        """Decode the JPEGs that a batch left undecoded. Returns its rows, and the pixels of the ok rows on the device.

        put: brings pixels to the device. exact: decodes what the device refuses; if it refuses too, the row is bad.
        """
        import torch

        ok = [row for row in rows.facts if row["status"] == "ok"]
        left = {at: data for at, data in enumerate(rows.coded) if data is not None}
        here = put(rows.pixels) if len(rows.pixels) else ()
        shown = dict(zip([at for at in range(len(ok)) if at not in left], here, strict=True))
        for (at, data), found in zip(left.items(), self._each(list(left.values())) if left else [], strict=True):
            try:
                shown[at], told = found or _again(data, put, exact)
            except images.BadImage as bad:
                told = {"status": bad.status, "reason": bad.reason}
            ok[at] |= {**told, "on_device": found is not None}
        kept = sorted(shown)
        pixels = [shown[at] for at in kept] or [torch.empty((*self.size, 3), dtype=torch.uint8, device=self.device)]
        return Rows(rows.facts, rows.pixels, rows.tokens[kept], rows.spent), torch.stack(pixels)[: len(kept)]


def _again(data: bytes, put: Callable[[np.ndarray], "Tensor"], exact: Reader) -> tuple["Tensor", dict[str, Any]]:
    """Decode on the processor what the device has refused.  Raises: BadImage."""
    image = images.decode(data, exact.max_pixels)
    return put(exact.pixels(image)[None])[0], details.describe(image)


def _grey(stack: "Tensor") -> "Tensor":
    """Turn u8 [n, 3, h, w] into grey values i32 [n, h, w], as Pillow's `convert("L")` does."""
    red, green, blue = stack.int().unbind(1)
    return (19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16


def _boxed(grey: "Tensor", side: int) -> "Tensor":
    """Average grey values i32 [n, h, w] to i64 [n, side, side], within 1 of Pillow's BOX, which rounds twice."""
    down, across = (_shares(length, side, grey.device) for length in grey.shape[1:])
    return (down @ grey.double() @ across.T).round().long()


@functools.lru_cache(256)
def _shares(length: int, side: int, device: "torch.device") -> "Tensor":
    """Return each pixel's weight in each cell, f64 [side, length]: equal for the pixels whose middle is in the cell."""
    import torch

    middle = (torch.arange(side, dtype=torch.float64)[:, None] + 0.5) * length / side
    away = (torch.arange(length) + 0.5 - middle) / max(length / side, 1)
    inside = ((away > -0.5) & (away <= 0.5)).double()
    return (inside / inside.sum(dim=1, keepdim=True)).to(device)


def compare(
    facts: Sequence[dict[str, Any]], image_md: np.ndarray, exact: Sequence[dict[str, Any]], exact_md: np.ndarray
) -> dict[str, Any]:
    """Compare a shard's first rows, embedded both ways. facts: of the whole shard; image_md: f32, of those that are ok.

    Returns how many pictures each decoder took, and the deviation of those that the device decoded.
    """
    decoders = Counter("gpu" if row.get("on_device") else "processor" for row in facts if row["status"] == "ok")
    mine, theirs = ([at for at, row in enumerate(rows) if row["status"] == "ok"] for rows in (facts, exact))
    here = dict(zip(mine, image_md, strict=True))
    cosines = [
        float(here[at] @ vector)
        for at, vector in zip(theirs, exact_md, strict=True)
        if facts[at].get("on_device") and at in here
    ]
    finite = [cosine for cosine in cosines if np.isfinite(cosine)]
    return {
        "decoded": dict(decoders),
        "deviation": {"compared": len(finite), "least": round(min(finite, default=1), 6)},
    }


def account(facts: Mapping[str, Mapping[str, Any]], *, quiet: bool) -> dict[str, Any]:
    """Add up what `compare` found in all shards, for the manifest, and print it; nothing if no device decoded."""
    shards = [fact for fact in facts.values() if "deviation" in fact]
    if not shards:
        return {}
    decoded: Counter[str] = Counter()
    for fact in shards:
        decoded.update(fact["decoded"])
    compared = sum(fact["deviation"]["compared"] for fact in shards)
    least = min(fact["deviation"]["least"] for fact in shards)
    if not quiet:
        near = f"cosine with the processor's at least {least:.5f} over {compared:,} pictures"
        far = f", which is under {NEAR}: --decode full embeds exactly" if least < NEAR else ""
        sys.stderr.write(
            f"embed: {decoded['gpu']:,} pictures decoded by the GPU, {decoded['processor']:,} by the processor; "
            f"{near if compared else 'none was compared'}{far}\n"
        )
    told = {"compared": compared, **({"least_cosine": least} if compared else {})}
    return {"decoded": dict(sorted(decoded.items())), "deviation": told}
