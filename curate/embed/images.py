"""Images as a model sees them: bytes to pixels, with checks on the way, and a perceptual hash of the decoded image.

In: the bytes of an image member. Out: uint8 pixels exactly as open_clip's own transform holds them before it makes a
float tensor (the model's resize, crop, conversion, in its order), and 64 bits that survive scaling and recompression.
Before the model's transform, pictures that it would turn black or white are made visible (`visible`): 16-bit and float
grey values are scaled to 8 bits, transparent pictures are laid on white. Nothing here trusts the bytes: formats are a
fixed list, the size is read before any pixel is, and whatever a decoder throws becomes a status with its reason.
"""

import functools
import io
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from curate.errors import UsageError
from curate.storage.tar import suffix_of
from pipelines import pictures
from pipelines.pictures import MAX_PIXELS
from pipelines.terminal import first_line

Image.init()
Image.MAX_IMAGE_PIXELS = None  # `_load` has a limit of its own, which may be larger than Pillow's
FORMATS = tuple(name for name in pictures.FORMATS if name in Image.OPEN)  # KeyError for one that Pillow lacks
HASH_SIDE = 32
LEAST_CONTRAST = 4  # of 255, between the darkest and the brightest of the 32 × 32 cells; JPEG noise is 1 to 2
SAMPLINGS = ((1, 1), (2, 1), (2, 2))  # of the brightness, of a JPEG: 4:4:4, 4:2:2, 4:2:0
MOST_ON_DEVICE = 1 << 24  # pixels; one of these takes a GPU half a gigabyte
MOST_OBLONG = 256  # times as long as wide; the ends of longer pictures are cut off where a crop in the middle follows
NAMES = {"heic": "HEIC", "jxl": "JPEG XL", "avif": "AVIF"}

Transform = Callable[[Image.Image], np.ndarray]


class BadImage(Exception):
    """The bytes are not a usable image. status: one of the sidecar's; reason: why, in a few words."""

    def __init__(self, status: str, reason: str = "") -> None:
        super().__init__(f"{status}: {reason}" if reason else status)
        self.status = status
        self.reason = reason


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image, unrotated, in its own mode: what open_clip's transform is given.

    Raises: BadImage `empty_image`, `too_large` (from the header, before any pixel), `no_decoder` or `decode_error`.
    """
    if not data:
        raise BadImage("empty_image")
    try:
        try:
            return _load(data, max_pixels)
        except ValueError:  # of notes that are too long, among others
            return _load(pictures.without_notes(data), max_pixels)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise _unidentified(data) from None
    except Exception as error:  # decoders answer hostile bytes with nearly every exception there is
        raise BadImage("decode_error", _words(error)) from None


def _load(data: bytes, max_pixels: int) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise BadImage("too_large", _over(max_pixels))
    image.load()
    return image


def plain_jpeg_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """Return width and height of a JPEG that any decoder reads as Pillow does, from its header; None for all others.

    Three components at the usual samplings, in Y'CbCr, not progressive, and complete: Pillow refuses a truncated
    picture, where others fill in grey; progressive ones are decoded on a GPU one by one, partly by the processor.
    """
    if not data.startswith(b"\xff\xd8") or not data.rstrip(b"\0").endswith(b"\xff\xd9"):
        return None
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            components = getattr(image, "layer", ())  # identifier, horizontal and vertical sampling, table of each
            plain = image.format == "JPEG" and image.mode == "RGB" and "progressive" not in image.info
            plain = plain and image.info.get("adobe_transform", 1) == 1 and bytes(c[0] for c in components) != b"RGB"
            plain = plain and [c[1:3] for c in components] in [[most, (1, 1), (1, 1)] for most in SAMPLINGS]
            return image.size if plain and image.width * image.height <= min(max_pixels, MOST_ON_DEVICE) else None
    except Exception:  # whatever is wrong with it, `decode` says so
        return None


def _over(max_pixels: int) -> str:
    return f"over the limit of {max_pixels:,} pixels"


def _words(error: Exception) -> str:
    """Describe an error without numbers and addresses, so that the same kind of fault gives the same words."""
    return re.sub(r"0x[0-9a-fA-F]+|\d+", "N", first_line(error))[:120]


def _unidentified(data: bytes) -> BadImage:
    """Tell formats that lack a decoder from what is no image at all."""
    name = NAMES.get(suffix_of(data))
    if name is not None:
        return BadImage("no_decoder", f"{name} is not decoded here: convert it to JPEG, PNG or WebP")
    text = data[:256].lstrip()[:1] in (b"<", b"{", b"[")
    return BadImage("decode_error", "a web page or other text" if text else "not an image of a known format")


def visible(image: Image.Image) -> Image.Image:
    """Do what `pictures.visible` does.  Raises: BadImage `decode_error`."""
    try:
        return pictures.visible(image)
    except Exception as error:
        raise BadImage("decode_error", _words(error)) from None


def transform(preprocess: Mapping[str, Any], *, fast: bool = False) -> Transform:
    """Build the model's image transform up to uint8: PIL image to u8 [h, w, 3].

    preprocess: the model's preprocess config. It is open_clip's own inference transform without its last two steps (to
    a float tensor, normalise), which run on the device; with `fast` torch resizes what is in RGB. The function raises
    BadImage `decode_error` on what cannot be converted.
    """
    steps = _steps(preprocess)
    cut = any(type(step).__name__ == "CenterCrop" for step in steps)
    if fast:
        steps = [_resized(step) if type(step).__name__ == "Resize" else step for step in steps]

    def apply(image: Image.Image) -> np.ndarray:
        try:
            image = _middle(image) if cut else image
            for step in steps:
                image = step(image)
            pixels: np.ndarray = np.array(image, np.uint8)
            return pixels
        except Exception as error:
            raise BadImage("decode_error", _words(error)) from None

    return apply


def _middle(image: Image.Image) -> Image.Image:
    """Cut off a picture's long ends, which a centre crop does not show, before it is enlarged to the crop's height.

    1 × 60,000 pixels would become 224 × 13,440,000. An even number of pixels is cut, so that the middle stays in place.
    """
    long, short = max(image.size), min(image.size)
    end = (long - MOST_OBLONG * short) // 2
    if end <= 0:
        return image
    wide = image.width == long
    return image.crop((end, 0, long - end, short) if wide else (0, end, short, long - end))


def _steps(preprocess: Mapping[str, Any]) -> list[Any]:
    """Return open_clip's steps of a model's preprocess config, up to those that make a tensor and normalise it."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = {name: value for name, value in preprocess.items() if name in PreprocessCfg.__dataclass_fields__}
    steps: list[Any]
    *steps, to_tensor, normalise = image_transform_v2(PreprocessCfg(**known), is_train=False).transforms
    assert [type(to_tensor).__name__, type(normalise).__name__] == ["MaybeToTensor", "Normalize"]
    return steps


def resizing(preprocess: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Build what `transform` does to RGB pixels, for tensors u8 [n, 3, h, w] on any device: antialiased, in f32.

    Raises: UsageError for a transform that torchvision's steps cannot do.
    """
    steps = [step for step in _steps(preprocess) if type(step).__name__ != "MaybeConvertMode"]
    others = [type(step).__name__ for step in steps if not type(step).__module__.startswith("torchvision.")]
    if others:
        raise UsageError(f"this model's transform has {others[0]}, which no GPU does.", "take --decode fast")
    return lambda pixels: functools.reduce(lambda done, step: step(done), steps, pixels)


def _resized(step: Any) -> Callable[[Image.Image], Image.Image]:
    """Resize as torchvision's step does, by torch: three times as fast, one value in 500 off by 1 of 255."""
    import torch

    mode = step.interpolation.value

    def apply(image: Image.Image) -> Image.Image:
        if image.mode != "RGB" or mode not in ("bicubic", "bilinear"):
            resized: Image.Image = step(image)
            return resized
        short, size = min(image.size), step.size
        if isinstance(size, int) or len(size) == 1:
            side = size if isinstance(size, int) else size[0]
            size = [int(side * image.height / short), int(side * image.width / short)]
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
        made = torch.nn.functional.interpolate(pixels, tuple(size), mode=mode, antialias=True)
        return Image.fromarray(made[0].permute(1, 2, 0).contiguous().numpy())

    return apply


@functools.cache
def _cosines() -> np.ndarray:
    """Return the waves of frequency 1 to 8 of the DCT-II over 32 points, i64 [8, 32], times 4096 and rounded.

    In whole numbers every sum is exact, so the hash has the same bits on every machine.
    """
    frequency, position = np.arange(1, 9)[:, None], np.arange(HASH_SIDE)
    waves = np.cos(np.pi * frequency * (2 * position + 1) / (2 * HASH_SIDE))
    return np.asarray(np.rint(4096 * waves), np.int64)


def grey_cells(image: Image.Image, side: int) -> np.ndarray:
    """Reduce a decoded image to side × side grey values, i64 0 … 255. Raises: BadImage `decode_error`."""
    try:
        grey = image.convert("L") if image.mode in ("RGB", "L") else image.convert("RGB").convert("L")
        return np.asarray(grey.resize((side, side), Image.Resampling.BOX), dtype=np.int64)
    except Exception as error:
        raise BadImage("decode_error", _words(error)) from None


def perceptual_hash(image: Image.Image) -> int | None:
    """Hash a decoded image into 64 bits, of which near-copies differ in few; None for a picture without structure.

    The idea: scaling, recompression and a change of brightness alter fine detail and the mean of a picture, hardly its
    coarse shapes. So keep only the coarse shapes, and of each only whether it is strong or weak.
    1. Reduce the picture to 32 × 32 grey values P.
    2. Take its discrete cosine transform, waves · P · wavesᵀ, for the frequencies 1 to 8 in either direction:
       64 coefficients. Frequency 0, the mean brightness, is left out.
    3. Bit i is 1 where coefficient i is above the median of the 64, so that about half the bits are set.
    A plain area has no shapes: its coefficients are noise, and would make any two plain pictures look alike or unlike
    by chance. Where the 32 × 32 cells differ by less than `LEAST_CONTRAST` there is no hash: it confirms no duplicate.
    Two hashes are compared by the number of bits in which they differ (Hamming distance, 0 to 64).
    Source: the pHash of "Implementation and Benchmarking of Perceptual Image Hash Functions" (Zauner, 2010).
    Differs from Zauner: waves are rounded to whole numbers, and the first row and column are left out with the mean.
    Raises: BadImage `decode_error`.
    """
    return hash_cells(grey_cells(image, HASH_SIDE))


def hash_cells(small: np.ndarray) -> int | None:
    """Hash 32 × 32 grey values, i64, as `perceptual_hash` does."""
    if small.max() - small.min() < LEAST_CONTRAST:
        return None
    waves = _cosines()
    coefficients = (waves @ small @ waves.T).reshape(-1)
    # The median of 64 is the mean of the middle two; both sides are doubled to stay in whole numbers.
    bits = 2 * coefficients > np.sort(coefficients)[31:33].sum()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
