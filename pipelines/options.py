"""Check the tables of a TOML file against dataclasses, and carry out `--set table.key=value`.

The fields of a dataclass define which keys a table may have, their types, and their defaults. Both programs, curate and
train, read their tables here and turn `OptionError` into an error of their own.
"""

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

Options = TypeVar("Options")
NAMES = {str: ("a string", "strings"), int: ("a whole number", "whole numbers"), float: ("a number", "numbers")}
NAMES |= {bool: ("true or false", "values true or false"), dict: ("a table", "tables")}


class OptionError(ValueError):
    """A table or a setting cannot be used. message: what was given and what was expected. hint: what to type."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message, self.hint = message, hint


def build(kind: type[Options], table: Any, where: str, defaults: Options | None = None) -> Options:
    """Make an options object from a table; missing keys come from `defaults`, else from the class.

    where: the table's name in messages. Raises: OptionError naming the key, its value and what was expected.
    """
    if not isinstance(table, Mapping):
        raise OptionError(f"[{where}] is {table!r}, not a table.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else None
            raise OptionError(f"unknown key of [{where}] {key!r}; there are: {', '.join(sorted(fields))}.", hint)
        values[key] = check(value, hints[key], f"{where}.{key}")
    if defaults is not None:
        return dataclasses.replace(defaults, **values)  # type: ignore[type-var]
    for name, field in fields.items():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and name not in values:
            raise OptionError(f"[{where}] needs {name}.", f"--set {where}.{name}=…")
    return kind(**values)


def check(value: Any, hint: Any, where: str) -> Any:
    """Return a TOML value as the type that `hint` names: a whole number serves as a float, a list as a tuple.

    Raises: OptionError for any other value, and for a float that is not finite.
    """
    kinds = _alternatives(hint)
    for kind in kinds:
        fits, found = _fit(value, kind)
        if fits:
            return found
    expected = " or ".join(_name(kind) for kind in kinds if kind is not type(None))
    if float in kinds and isinstance(value, float):
        expected = "a finite number"
    raise OptionError(f"{where}={value!r} is not {expected}.")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    return typing.get_args(hint) if union else (hint,)


def _fit(value: Any, kind: Any) -> tuple[bool, Any]:
    """Say whether a value is of a type, and convert it to that type."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or (kind is type(None) and value is None):
        return True, value
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in inner), value
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number, float(value) if number else value
    if origin is tuple:
        several = [inner[0]] * len(value) if isinstance(value, list | tuple) and inner[-1] is ... else inner
        if not isinstance(value, list | tuple) or len(value) != len(several):
            return False, value
        parts = [_fit(item, each) for item, each in zip(value, several, strict=True)]
        return all(fits for fits, _ in parts), tuple(item for _, item in parts)
    if origin is list:
        parts = [_fit(item, inner[0]) for item in value] if isinstance(value, list) else [(False, value)]
        return all(fits for fits, _ in parts), [item for _, item in parts]
    if origin in (dict, Mapping):
        pairs = {key: _fit(item, inner[1]) for key, item in value.items()} if isinstance(value, dict) else None
        if pairs is None or not all(fits for fits, _ in pairs.values()):
            return False, value
        return True, {key: item for key, (_, item) in pairs.items()}
    return isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool), value


def _name(kind: Any) -> str:
    """Name a type so that it completes a sentence "… is not"."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if origin is tuple and inner[-1] is not ...:
        return f"a list of {len(inner)} {NAMES[inner[0]][1]}"
    if origin in (list, tuple):
        return "a list" + (f" of {NAMES[inner[0]][1]}" if inner[0] in NAMES else "")
    if origin in (dict, Mapping):
        return "a table" + (f" of {NAMES[inner[1]][1]}" if inner[1] in NAMES else "")
    return NAMES[kind][0] if kind in NAMES else str(kind)


def parse_setting(setting: str) -> tuple[list[str], Any]:
    """Read one `table.key=value`: its names from the outermost table inwards, and the value.

    The value is a TOML literal; anything else is a string. Raises: OptionError for any other form.
    """
    path, equals, text = setting.partition("=")
    names = [name.strip() for name in path.split(".")]
    if not equals or not all(names):
        raise OptionError(f"--set {setting!r} is not of the form table.key=value.", "for example --set align.epochs=2")
    try:
        return names, tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return names, text.strip()


def assign(tables: dict[str, Any], setting: str) -> None:
    """Carry out one `--set table.key=value` on parsed TOML tables, in place. Raises: OptionError."""
    (*heads, last), value = parse_setting(setting)
    for head in heads:
        tables = tables.setdefault(head, {})
        if not isinstance(tables, dict):
            raise OptionError(f"--set {setting}: {head} is a value, not a table.")
    tables[last] = value
