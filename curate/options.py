"""Options from TOML tables. pipelines/options.py checks them for both programs; here its errors become UsageErrors."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from curate.errors import UsageError
from pipelines import options

Options = TypeVar("Options")


def build(kind: type[Options], table: Any, where: str) -> Options:
    """Make an options object from a table.

    Raises: UsageError naming the key, its value and what was expected.
    """
    with _refusals():
        return options.build(kind, table, where)


def assign(tables: dict[str, Any], setting: str) -> None:
    """Carry out one `--set table.key=value` on parsed TOML tables. Raises: UsageError."""
    with _refusals():
        options.assign(tables, setting)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except options.OptionError as error:
        raise UsageError(error.message, error.hint) from None
