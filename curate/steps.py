"""Steps as they are written: `rank(clip_score, 0.40, 0.60)`, parsed with `ast` and never evaluated.

The function's signature is the schema, so that an unknown step, argument or column is refused with the list of those
that exist. A bare word is a column. A count is a whole number of rows, or a share of the pool's good rows: `0.02` or
`"2%"`.
"""

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curate.errors import UsageError, unknown
from curate.frame import AUTO, Column, Count, Frame, Group, Share, Threshold, Verdict
from curate.selectors import STEPS


@dataclass(frozen=True)
class Step:
    """A parsed step. number: its place in the funnel, from 1."""

    text: str
    name: str
    arguments: dict[str, Any]
    number: int

    def check(self, frame: Frame) -> None:
        """Refuse columns that are not there, before anything runs."""
        kinds = inspect.signature(STEPS[self.name]).parameters
        for name, value in self.arguments.items():
            if kinds[name].annotation in (Column, Group):
                frame.known(value, frame.columns if kinds[name].annotation is Column else frame.groups)

    def run(self, frame: Frame) -> Verdict:
        """Judge the frame's rows."""
        return STEPS[self.name](frame, self.number, **self.arguments)


def parse(texts: Sequence[str]) -> list[Step]:
    """Parse step texts. Raises: UsageError naming the text, what is wrong with it and what there is."""
    return [_parse(text.strip(), number) for number, text in enumerate(texts, 1)]


def _parse(text: str, number: int) -> Step:
    try:
        call = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        call = None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
        raise UsageError(f"the step {text!r} is not a call like rank(clip_score, 0.40, 0.60).")
    if call.func.id not in STEPS:
        raise unknown("step", call.func.id, STEPS)
    known = dict(list(inspect.signature(STEPS[call.func.id]).parameters.items())[2:])
    usage = signature(call.func.id)
    given: dict[str, ast.expr] = dict(zip(known, call.args, strict=False))
    if len(call.args) > len(known):
        raise UsageError(f"the step {text!r} has {len(call.args)} arguments; it is written {usage}.")
    for keyword in call.keywords:
        if keyword.arg not in known:
            raise unknown(f"argument of {call.func.id}", str(keyword.arg), known)
        if keyword.arg in given:
            raise UsageError(f"the step {text!r} gives {keyword.arg} twice.")
        given[keyword.arg] = keyword.value
    missing = [name for name, parameter in known.items() if parameter.default is parameter.empty and name not in given]
    if missing:
        raise UsageError(f"the step {text!r} lacks {missing[0]}; it is written {usage}.")
    arguments = {name: _convert(node, known[name].annotation, f"{name} in {text}") for name, node in given.items()}
    return Step(text, call.func.id, arguments, number)


def signature(name: str) -> str:
    """Write how a step is called, with its defaults."""
    parameters = list(inspect.signature(STEPS[name]).parameters.values())[2:]
    return f"{name}({', '.join(map(_show, parameters))})"


def _show(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return parameter.name
    default = "auto" if parameter.default == AUTO else parameter.default
    return f"{parameter.name}={default!r}"


def _convert(node: ast.expr, kind: Any, where: str) -> Any:
    """Turn an argument's literal into its value. Raises: UsageError saying what was expected."""
    if kind in (Column, Group):
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise UsageError(f"{where}: expected the name of a column.")
    try:
        value = ast.literal_eval(node)
    except ValueError:
        raise UsageError(f"{where}: {ast.unparse(node)} is no literal.") from None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (Threshold, Share) and value == "auto":
        return AUTO
    if kind is Count:
        return parse_count(value, where)
    if kind is Share and (not number or not 0 <= value <= 1):
        raise UsageError(f'{where}: expected a share between 0 and 1, or "auto", not {value!r}.')
    if kind is Threshold and (not number or not -1 < value < 1):
        raise UsageError(f'{where}: expected a cosine below 1, or "auto", not {value!r}.')
    if kind is str and not isinstance(value, str):
        raise UsageError(f"{where}: expected a word in quotes, not {value!r}.")
    if kind in (int, int | None) and (not isinstance(value, int) or isinstance(value, bool)):
        raise UsageError(f"{where}: expected a whole number, not {value!r}.")
    if kind is float and not number:
        raise UsageError(f"{where}: expected a number, not {value!r}.")
    return value


def parse_count(value: Any, where: str) -> float:
    """Read a count: a whole number of rows, a share like 0.02, or a text like "2%" or "2_000_000"."""
    text = value.strip().replace("_", "").replace(",", "") if isinstance(value, str) else value
    try:
        if isinstance(text, str):
            text = float(text[:-1]) / 100 if text.endswith("%") else float(text) if "." in text else int(text)
        if isinstance(text, int | float) and not isinstance(text, bool) and (0 < text <= 1 or text == int(text) > 0):
            return float(text) if isinstance(text, float) and text <= 1 else int(text)
    except (ValueError, OverflowError):
        pass
    raise UsageError(f'{where}: expected a number of rows, or a share such as 0.02 or "2%", not {value!r}.')
