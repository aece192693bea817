"""Which column of a parquet table holds pictures, and which captions: as asked for, else by name and type."""

from collections.abc import Callable, Sequence

import pyarrow as pa

from curate.errors import UsageError, unknown
from curate.ingest.beside import CAPTIONS
from curate.ingest.layouts import NAMES
from pipelines.record_forms import FORM_KEYS

IMAGES = ("image", "images", "jpg", "jpeg", "png", "webp", "img", "bytes", "image_bytes")


def _column(
    schema: pa.Schema, asked: str, names: Sequence[str], fits: Callable[[pa.DataType], bool], where: str, what: str
) -> str:
    """Choose a column by its name, among those of a fitting type; "" if there is none."""
    if asked:
        if asked not in schema.names:
            raise unknown(f"column of {where}", asked, schema.names)
        if not fits(schema.field(asked).type):
            raise UsageError(f"{where}: the column {asked} is {schema.field(asked).type}, which holds no {what}.")
        return asked
    fitting = [field.name for field in schema if fits(field.type)]
    named = [name for name in names if name in fitting]
    if named or what != "image":
        return named[0] if named else ""
    structs = [name for name in fitting if pa.types.is_struct(schema.field(name).type)]
    found = structs or fitting
    if len(found) > 1:
        raise UsageError(f"{where} has several columns that may hold images: {', '.join(found)}.", "--image COLUMN")
    return found[0] if found else ""


def image_column(schema: pa.Schema, asked: str, where: str) -> str:
    """Choose the column of pictures: the one asked for, else by its name, else the only one; "" if there is none."""
    return _column(schema, asked, IMAGES, holds_images, where, "image")


def caption_column(schema: pa.Schema, asked: str, where: str) -> str:
    """Choose the column of captions: the first of those asked for that exists, else by its name."""
    names = [name.strip() for name in asked.split(",") if name.strip()]
    there = next((name for name in names if name in schema.names), names[0] if names else "")
    return _column(schema, there, CAPTIONS, holds_text, where, "caption")


def no_images(schema: pa.Schema, where: str) -> UsageError:
    """Refuse a table without pictures, saying what it has and which command reads it."""
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    url = next((name for name in (*NAMES["url"], "image_url") if name in schema.names), "")
    hint = None
    if url:
        hint = f"download its pictures first: img2dataset --input_format parquet --url_col {url} --url_list {where} …"
    elif any(name in FORM_KEYS[:2] for name in schema.names):
        hint = "if these are records that name pictures, use `curate mix`"
    return UsageError(f"{where} has no column of images: it has {there}.", hint)


def holds_images(kind: pa.DataType) -> bool:
    """Say whether values are bytes, structs with `bytes` as Hugging Face's `Image` has them, or lists of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return holds_images(kind.value_type)
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and holds_images(kind.field("bytes").type)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def holds_text(kind: pa.DataType) -> bool:
    """Say whether values are text, bytes of text, or lists of either."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return holds_text(kind.value_type)
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return bool(text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))
