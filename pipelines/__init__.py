"""Shipped pipelines (TOML) and the demo's models, as package data; and how any pipeline's file is read.

A file may begin with `base = "bunny.toml"` (or a list of names): it then contains only what differs. Both programs read
pipelines through `read`, so that they cannot disagree about what a file means.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NESTED = "it is nested too deeply to be read"


def read(path: Path) -> dict[str, Any]:
    """Read a TOML file laid over its bases: tables merge key by key, any other value replaces that of the base.

    Bases are applied in the order named. Each is a file beside the one that names it, or else a shipped pipeline.
    `{here}` in a string becomes the folder of the file that contains it.
    Raises: OSError for a missing file, ValueError for invalid TOML or a base that leads back to itself.
    """
    try:
        return _read(path.resolve(), ())
    except RecursionError:  # tomllib's own, or of tables within tables
        raise ValueError(NESTED) from None


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    if path in above:
        raise ValueError(f"{above[-1].name} leads back to itself through base = {path.name!r}")
    own = fill(tomllib.loads(path.read_text("utf-8")), {"{here}": str(path.parent)})
    named = own.pop("base", [])
    names = [named] if isinstance(named, str) else named
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"base = {named!r} is neither a name nor a list of names")
    merged: dict[str, Any] = {}
    for name in names:
        beside = path.parent / name
        base = beside if beside.is_file() else Path(__file__).parent / name
        merged = overlay(merged, _read(base.resolve(), (*above, path)))
    return overlay(merged, own)


def overlay(lower: Mapping[str, Any], upper: Mapping[str, Any]) -> dict[str, Any]:
    """Lay tables over tables: values of `upper` win, what it does not mention stays. Neither argument is changed."""
    merged = dict(lower)
    for key, value in upper.items():
        beneath = merged.get(key)
        merged[key] = overlay(beneath, value) if isinstance(value, dict) and isinstance(beneath, dict) else value
    return merged


def fill(value: Any, words: Mapping[str, str]) -> Any:
    """Replace words in every string of a TOML value."""
    if isinstance(value, str):
        for word, meaning in words.items():
            value = value.replace(word, meaning)
        return value
    if isinstance(value, dict):
        return {key: fill(item, words) for key, item in value.items()}
    return [fill(item, words) for item in value] if isinstance(value, list) else value
