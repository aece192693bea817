"""Options from tables: a stage's frozen dataclass is the schema of its TOML table and of its manifest's options."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from curate.errors import UsageError, unknown

Options = TypeVar("Options")


def build(kind: type[Options], table: Mapping[str, Any], where: str) -> Options:
    """Make an options object from a table.

    Raises: UsageError naming the key, its value and what was expected.
    """
    if not isinstance(table, Mapping):
        raise UsageError(f"[{where}] is {table!r}, not a table.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            raise unknown(f"key of [{where}]", key, fields)
        values[key] = _fit(value, hints[key], f"{where}.{key}")
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in values:
            raise UsageError(f"[{where}] needs {name}.", f"--set {where}.{name}=…")
    return kind(**values)


def _fit(value: Any, kind: Any, where: str) -> Any:
    """Check a TOML value against a field's type; whole numbers serve as floats, lists as tuples."""
    choices = (
        typing.get_args(kind)
        if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union
        else (kind,)
    )
    for choice in choices:
        origin, arguments = typing.get_origin(choice), typing.get_args(choice)
        if choice is Any or (choice is type(None) and value is None):
            return value
        if origin is typing.Literal and value in arguments:
            return value
        if choice is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple) and all(isinstance(each, str) for each in value):
            return tuple(value)
        if origin in (list, dict, Mapping) and isinstance(value, list if origin is list else dict):
            return value
        if isinstance(choice, type) and isinstance(value, choice) and isinstance(value, bool) == (choice is bool):
            return value
    expected = " or ".join(_name(choice) for choice in choices if choice is not type(None))
    raise UsageError(f"{where}={value!r} is not {expected}.")


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    named = {str: "a string", int: "a whole number", float: "a number", bool: "true or false"}
    return named.get(kind, "a list of strings" if typing.get_origin(kind) is tuple else "a list or table")


def assign(tables: dict[str, Any], setting: str) -> None:
    """Carry out one `--set a.b=c` on parsed TOML tables; the value is a TOML literal, else a string."""
    path, equals, text = setting.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set {setting!r} is not of the form table.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *heads, last = path.strip().split(".")
    for head in heads:
        tables = tables.setdefault(head, {})
        if not isinstance(tables, dict):
            raise UsageError(f"--set {path}: {head} is a value, not a table")
    tables[last] = value
