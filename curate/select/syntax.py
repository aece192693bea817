"""Calls as they are written, `rank(clip_score, 0.40, 0.60)`, parsed with `ast` and never evaluated.

A function's signature is the schema: an unknown name or argument is refused with the list of those that exist. A bare
word is a column, and so is a call of a computed column. A count is a whole number of rows, or a share of the pool's
good rows: `0.02`, `2%` or `"2%"`.
"""

import ast
import inspect
import logging
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from curate.errors import UsageError, unknown
from curate.select.frame import AUTO, Column, Count, Directory, File, Group, Keep, Levels, Share, Texts, Threshold

QUOTED = r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')"""
PERCENT = re.compile(QUOTED + r"|(?<=[\s(,=])(\d[\d_.]*%)(?=\s*[,)])")  # 2%, which Python cannot read; not in a text
WITH_COMMAS = re.compile(r"[1-9]\d{0,2}(,\d{3})+")  # 2,000,000; but 0,5% is no count, and surely not 5 %
THOUSANDS = re.compile(r"[(,=]\s*\d{1,3}(,\d{3})*,000\s*[,)](?=[^\"']*$)")  # sample(1,000): one row, and a seed of 0
Table = Mapping[str, Callable[..., Any]]
LARGEST = sys.float_info.max
RENAMED = {("balance", "wary"): "contradicting_last"}  # arguments by what they were called once
log = logging.getLogger("curate")


def read(text: str, table: Table, noun: str, like: str, hidden: int) -> tuple[str, dict[str, Any]]:
    """Read a call of one of the table's functions. Returns its name and the arguments given.

    noun, like: what it is called in messages, and an example. hidden: parameters of the functions that are not written.
    Raises: UsageError naming the text, what is wrong with it and what exists.
    """
    if THOUSANDS.search(text):
        raise UsageError(f"the {noun} {text!r}: a comma begins another argument.", "write 1_000 for a thousand")
    call = _parse(text) or _parse(PERCENT.sub(lambda found: found[1] or f'"{found[2]}"', text))
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UsageError(f"the {noun} {text!r} is not a call like {like}.")
    name = call.func.id
    if name not in table:
        raise unknown(noun, name, table)
    known = dict(list(inspect.signature(table[name]).parameters.items())[hidden:])
    usage = signature(name, table, hidden)
    args = call.args
    if known and list(known.values())[-1].annotation is Texts and len(args) >= len(known):
        args = [*args[: len(known) - 1], ast.Tuple(args[len(known) - 1 :])]
    given: dict[str, ast.expr] = dict(zip(known, args, strict=False))
    if len(args) > len(known):
        raise UsageError(f"the {noun} {text!r} has {len(call.args)} arguments; write {usage}.")
    for keyword in call.keywords:
        key = RENAMED.get((name, str(keyword.arg)), str(keyword.arg))
        if key not in known:
            raise unknown(f"argument of {name}", key, known)
        if key in given:
            raise UsageError(f"the {noun} {text!r} gives {key} twice.")
        if key != keyword.arg:
            log.warning("%s: %s= is called %s= now", name, keyword.arg, key)
        given[key] = keyword.value
    missing = [key for key, parameter in known.items() if parameter.default is parameter.empty and key not in given]
    if missing:
        raise UsageError(f"the {noun} {text!r} lacks {missing[0]}; write {usage}.")
    return name, {key: _read_argument(node, known[key], f"{key} in {text}") for key, node in given.items()}


def _parse(text: str) -> ast.expr | None:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def parameters(function: Callable[..., Any], hidden: int) -> dict[str, Any]:
    """List the parameters that are written, with the kind of each."""
    return {key: value.annotation for key, value in list(inspect.signature(function).parameters.items())[hidden:]}


def signature(name: str, table: Table, hidden: int) -> str:
    """Write how a function is called, with its defaults."""
    shown = list(inspect.signature(table[name]).parameters.values())[hidden:]
    return f"{name}({', '.join(map(_show, shown))})"


def _show(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return parameter.name
    if parameter.annotation is Texts:
        return f"{parameter.name}, …"
    default = "auto" if parameter.default == AUTO else parameter.default
    return f"{parameter.name}={default!r}"


def _read_argument(node: ast.expr, parameter: inspect.Parameter, where: str) -> Any:
    """Read an argument. Defaults that stand for "nothing" may be written, too: `among=0`, `seed=None`."""
    if not parameter.default and ast.unparse(node) == repr(parameter.default):
        return parameter.default
    return _convert(node, parameter.annotation, where)


def _convert(node: ast.expr, kind: Any, where: str) -> Any:
    """Turn an argument's literal into its value. Raises: UsageError saying what was expected."""
    if kind in (Column, Group):
        return _column(node, kind, where)
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        hint = "put it in quotes" if isinstance(node, ast.Name | ast.BinOp | ast.Attribute) else None
        raise UsageError(f"{where}: {ast.unparse(node)} is not a literal.", hint) from None
    number = _is_number(value, where)
    if kind in (Threshold, Share) and value == "auto":
        return AUTO
    if kind is Count:
        return parse_count(value, where)
    if kind is Levels:
        return _levels(value, where)
    if kind is Texts:
        if not all(isinstance(each, str) for each in value):
            raise UsageError(f"{where}: expected texts in quotes, not {value!r}.")
        return tuple(value)
    if kind is Share and (not number or not 0 <= value <= 1):
        raise UsageError(f'{where}: expected a share between 0 and 1, or "auto", not {value!r}.')
    if kind is Threshold and (not number or not -1 < value < 1):
        raise UsageError(f'{where}: expected a cosine below 1, or "auto", not {value!r}.')
    if kind in (str, Keep, Directory, File) and not isinstance(value, str):
        raise UsageError(f"{where}: expected a word in quotes, not {value!r}.")
    if kind in (int, int | None) and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
        raise UsageError(f"{where}: expected a whole number, 0 or more, not {value!r}.")
    if kind is bool and not isinstance(value, bool):
        raise UsageError(f"{where}: expected True or False, not {value!r}.")
    if kind is float and not number:
        raise UsageError(f"{where}: expected a number, not {value!r}.")
    return value


def _is_number(value: Any, where: str) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and not -LARGEST <= value <= LARGEST:
        raise UsageError(f"{where}: this number is out of range.")
    return number


def _column(node: ast.expr, kind: Any, where: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Call) and kind is Column:
        return ast.unparse(node)
    raise UsageError(f"{where}: expected the name of a column.")


def _levels(value: Any, where: str) -> tuple[int, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in values)
    if not values or not whole or sorted(values, reverse=True) != values:
        raise UsageError(f"{where}: expected falling numbers of clusters, like [1000, 100], not {value!r}.")
    return tuple(values)


def parse_count(value: Any, where: str) -> float:
    """Read a count: a whole number of rows, a share like 0.02, or a text like "2%" or "2_000_000"."""
    text = value.strip().replace("_", "") if isinstance(value, str) else value
    text = text.replace(",", "") if isinstance(text, str) and WITH_COMMAS.fullmatch(text) else text
    percent = isinstance(text, str) and text.endswith("%")
    try:
        if isinstance(text, str):
            text = float(text[:-1]) / 100 if percent else float(text) if "." in text else int(text)
        share = isinstance(text, float) and 0 < text <= 1
        whole = isinstance(text, int | float) and not isinstance(text, bool) and not percent and text == int(text) > 0
        if share or whole:
            return float(text) if share else int(text)
    except (ValueError, OverflowError):
        pass
    raise UsageError(f'{where}: expected a number of rows, or a share such as 0.02 or "2%", not {value!r}.')
