"""Attempt one item: the task's result for it, or why it failed and what that means for the other items."""

import contextlib
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from curate import faults, processes
from curate.errors import CurateError

Around = Callable[[], contextlib.AbstractContextManager[None]]


class Task(Protocol):
    """Work on one kind of item."""

    def setup(self) -> None:
        """Prepare a worker: load the model, open the index. Called once per process."""

    def __call__(self, item: Any, /) -> dict[str, Any]:
        """Work one item. Returns counts for the report (`rows`, `bad`) and whatever the driver needs."""
        ...


@dataclass(frozen=True)
class Report:
    """What became of one item. Exactly one of value and error is set.

    passes: the error may pass, so a retry may help. ends: every other item would fail too. trace: the traceback of an
    error.
    """

    item: Any
    value: dict[str, Any] | None = None
    error: str | None = None
    passes: bool = False
    ends: bool = False
    trace: str = ""


def attempt(task: Task, item: Any) -> Report:
    """Run the task on an item; an exception becomes the report's error."""
    try:
        return Report(item, value=task(item))
    except Exception as error:
        return failure(item, error)


def failure(item: Any, error: Exception) -> Report:
    """Say what an exception means for its item and for the others."""
    told = str(error) if isinstance(error, CurateError) else faults.in_words(error)
    passes = isinstance(error, OSError | MemoryError | processes.WorkerDied) and not isinstance(error, faults.LASTING)
    trace = "".join(traceback.format_exception(error))
    return Report(item, error=told, passes=passes, ends=faults.ends_all(error), trace=trace)


@dataclass
class Grouped:
    """A task over groups of small items. around: a context in which each group is processed; leaving it may fail."""

    task: Task
    around: Around

    def setup(self) -> None:
        """Set up the task."""
        self.task.setup()

    def __call__(self, items: Sequence[Any], /) -> dict[str, Any]:
        """Attempt each item of a group. Returns its reports."""
        with self.around():
            return {"reports": [attempt(self.task, item) for item in items]}
