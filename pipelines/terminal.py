"""How both programs deal with their terminal: Ctrl-C, a reader that has gone, closed streams.

typer handles Ctrl-C and a broken pipe itself: silently, with an exit code of its own. Both programs therefore put
`Commands` before typer's group of commands: Ctrl-C is raised as `Stopped`, which the program reports in one line, and
if nobody reads the output any more (`| head`), the command ends.
"""

import io
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(BaseException):
    """Ctrl-C, kept from typer's own handling; or SIGTERM, within `stoppable`."""

    exit_code = 130


class Terminated(Stopped):
    """SIGTERM, from a scheduler or `kill`."""

    exit_code = 143


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does: what it has started ends, and its temporary files are deleted.

    After the body both end the process silently: during Python's shutdown they would show tracebacks.
    """

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)


class Commands:
    """What a group of commands does before typer's own handling."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Read what was typed. Raises: Stopped."""
        with _past_typer():
            return super().make_context(*given, **named)  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        """Run a command. Raises: Stopped."""
        try:
            with _past_typer():
                answer = super().invoke(ctx)  # type: ignore[misc]
                sys.stdout.flush()  # buffered output fails here, not when Python ends
            return answer
        except BrokenPipeError:
            if _is_read(1):  # a pipe other than stdout's, such as a worker's
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes its buffer when it ends
            raise SystemExit(0) from None


@contextmanager
def _past_typer() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped from None


def _is_read(number: int) -> bool:
    """Say whether anybody may still read what is written to a descriptor."""
    poll = select.poll()
    poll.register(number, 0)  # errors are always reported
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def open_closed() -> None:
    """Give a program that was started with closed streams (`2>&-`) streams that lead nowhere.

    Text that is not UTF-8, as file names may be, is printed escaped from then on.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does by default


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str, but: str = "") -> str:
    """Remove terminal control sequences from a text: captions, keys and file names may hold escapes.

    The result is one line. Text that is not UTF-8 is left to the stream, which escapes it. but: what to leave in (line
    breaks).
    """
    if text.isprintable():
        return text
    return "".join(
        letter if _harmless(letter) or letter in but else " " if letter.isspace() else "�" for letter in text
    )


def _harmless(letter: str) -> bool:
    return letter.isprintable() or "\udc80" <= letter <= "\udcff"
