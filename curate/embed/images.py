"""Images as a model sees them: bytes to pixels, judged on the way, and a perceptual hash of what was decoded.

In: the bytes of an image member. Out: uint8 pixels exactly as open_clip's own transform holds them before it makes a
float tensor (the model's resize, crop, conversion, in its order), and 64 bits that survive scaling and recompression.
Nothing here trusts the bytes: formats are a fixed list, the size is read before any pixel is, and whatever a decoder
throws becomes a status.
"""

import functools
import io
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from curate.embed.options import MAX_PIXELS

# What web pools hold. Fixed, because Pillow's full list runs helpers (EPS) and parsers that nobody needs here.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "MPO", "AVIF")
HASH_SIDE = 32

Transform = Callable[[Image.Image], np.ndarray]


class BadImage(Exception):
    """The bytes are no image that can be used. `status`: one of the sidecar's statuses."""

    def __init__(self, status: str) -> None:
        super().__init__(status)
        self.status = status


def decode(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an image, unrotated, in its own mode: what open_clip's transform is given.

    Raises: BadImage `empty_image`, `too_large` (from the header, before any pixel) or `decode_error`.
    """
    if not data:
        raise BadImage("empty_image")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise BadImage("too_large")
        image.load()
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage("too_large") from None
    except Exception:  # decoders answer hostile bytes with nearly every exception there is
        raise BadImage("decode_error") from None
    return image


def transform(preprocess: Mapping[str, Any]) -> Transform:
    """Build the model's image transform up to uint8: PIL image to u8 [h, w, 3].

    preprocess: the model's preprocess config. It is open_clip's own inference transform without its last two steps (to
    a float tensor, normalise), which run on the device. The function raises BadImage `decode_error` on what cannot be
    converted.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2

    known = {name: value for name, value in preprocess.items() if name in PreprocessCfg.__dataclass_fields__}
    *steps, to_tensor, normalise = image_transform_v2(PreprocessCfg(**known), is_train=False).transforms
    assert [type(to_tensor).__name__, type(normalise).__name__] == ["MaybeToTensor", "Normalize"]

    def apply(image: Image.Image) -> np.ndarray:
        try:
            for step in steps:
                image = step(image)
            pixels: np.ndarray = np.array(image, np.uint8)
            return pixels
        except Exception:
            raise BadImage("decode_error") from None

    return apply


@functools.cache
def _cosines() -> np.ndarray:
    """Return the waves of frequency 1 to 8 of the DCT-II over 32 points, i64 [8, 32], times 4096 and rounded.

    In whole numbers every sum is exact, so the hash has the same bits on every machine.
    """
    frequency, position = np.arange(1, 9)[:, None], np.arange(HASH_SIDE)
    waves = np.cos(np.pi * frequency * (2 * position + 1) / (2 * HASH_SIDE))
    return np.asarray(np.rint(4096 * waves), np.int64)


def perceptual_hash(image: Image.Image) -> int:
    """Hash a decoded image into 64 bits; near-copies differ in few of them, a flat image gives 0.

    The idea: scaling, recompression and a change of brightness alter fine detail and the mean of a picture, hardly its
    coarse shapes. So keep only the coarse shapes, and of each only whether it is strong or weak.
    1. Reduce the picture to 32 × 32 grey values P.
    2. Take its discrete cosine transform, waves · P · wavesᵀ, for the frequencies 1 to 8 in either direction:
       64 coefficients. Frequency 0, the mean brightness, is left out.
    3. Bit i is 1 where coefficient i is above the median of the 64, so that about half the bits are set.
    Two hashes are compared by the number of bits in which they differ (Hamming distance, 0 to 64).
    Source: the pHash of "Implementation and Benchmarking of Perceptual Image Hash Functions" (Zauner, 2010).
    Differs from Zauner: waves are rounded to whole numbers, and the first row and column are left out with the mean.
    Raises: BadImage `decode_error`.
    """
    try:
        grey = image.convert("L") if image.mode in ("RGB", "L") else image.convert("RGB").convert("L")
        small = np.asarray(grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), dtype=np.int64)
    except Exception:
        raise BadImage("decode_error") from None
    waves = _cosines()
    coefficients = (waves @ small @ waves.T).reshape(-1)
    # The median of 64 is the mean of the middle two; both sides are doubled to stay in whole numbers.
    bits = 2 * coefficients > np.sort(coefficients)[31:33].sum()
    return int.from_bytes(np.packbits(bits).tobytes(), "big")
