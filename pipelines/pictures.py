"""Pictures that a plain conversion would spoil, for both programs: so that what is embedded is what is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

# What web pools hold. Fixed, because Pillow's full list runs helpers (EPS) and parsers that nobody needs here.
# Multi-picture JPEGs (MPO) have no entry of their own: Pillow's JPEG reader turns into theirs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 256 MB as RGB
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"iCCP", b"zTXt", b"iTXt", b"tEXt")  # of no use here, and of any size


def without_notes(data: bytes) -> bytes:
    """Copy a PNG without its colour profile and text chunks. A chunk: length, type, content, checksum.

    Pillow refuses PNGs, with a ValueError, if their chunks unpack to over 1 MiB each or 64 MiB in all. Any other file
    is returned as it is.
    """
    if not data.startswith(PNG_MAGIC):
        return data
    kept, at = [PNG_MAGIC], len(PNG_MAGIC)
    while at + 8 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] not in PNG_NOTES:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def visible(image: Image) -> Image:
    """Convert a picture that a plain conversion to RGB would turn black or white to 8 bits without transparency.

    16-bit, 32-bit and float grey values are scaled so that the file's own darkest becomes 0 and its brightest 255;
    values that are not finite count as the darkest. A picture with transparent parts is laid on white, or on black
    where nothing could be seen on white. Every other picture is returned as it is.
    Differs from open_clip and Pillow's `convert`, which cut grey values off at 255 and ignore transparency.
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _scaled(image)
    return _opaque(image) if image.has_transparency_data else image


def _scaled(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    values_hw = np.array(image, np.float64)
    finite = np.isfinite(values_hw)
    low, high = (values_hw[finite].min(), values_hw[finite].max()) if finite.any() else (0.0, 0.0)
    shares_hw = np.where(finite, values_hw - low, 0.0) / (high - low or 1.0)
    return Image.fromarray(np.rint(255 * shares_hw).astype(np.uint8))


def _opaque(image: Image) -> Image:
    from PIL import Image

    rgba = image.convert("RGBA")
    if rgba.getextrema()[3][0] == 255:  # transparency is declared and not used: it is taken as it is
        return image
    laid = [Image.alpha_composite(Image.new("RGBA", rgba.size, ground), rgba) for ground in ("white", "black")]
    on_white, on_black = (each.convert("RGB") for each in laid)
    plain = all(low == high for low, high in on_white.getextrema())
    return on_black if plain else on_white
