"""What both programs make of the terminal that they run in: Ctrl-C, a reader that has gone, streams that are closed.

typer answers Ctrl-C and a broken pipe itself: without a word, with an exit code of its own. `Commands` stands before
its group of commands in a class of both programs: Ctrl-C is raised on as `Stopped`, for the program to say in a line,
and where nobody reads any more (`| head`) the command is done.
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
    """Ctrl-C, where typer does not take it for its own; or SIGTERM, within `stoppable`."""

    exit_code = 130


class Terminated(Stopped):
    """SIGTERM: a scheduler's, or `kill`."""

    exit_code = 143


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM end the body as Ctrl-C does: what it has started ends, and what it has laid aside is deleted.

    After the body either of them ends the process without a word: in what Python does at its end they are tracebacks.
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
    """What a group of commands is to do before typer's own."""

    def make_context(self, *given: Any, **named: Any) -> Any:
        """Read what was typed. Raises: Stopped."""
        with _past_typer():
            return super().make_context(*given, **named)  # type: ignore[misc]

    def invoke(self, ctx: Any) -> Any:
        """Carry out a command. Raises: Stopped."""
        try:
            with _past_typer():
                answer = super().invoke(ctx)  # type: ignore[misc]
                sys.stdout.flush()  # what is still held back breaks here, not when Python ends
            return answer
        except BrokenPipeError:
            if _is_read(1):  # another pipe than that of the answer: a worker's, say
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python writes out at its end what it still holds
            raise SystemExit(0) from None


@contextmanager
def _past_typer() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped from None


def _is_read(number: int) -> bool:
    """Say whether somebody may still read what is written to a descriptor."""
    poll = select.poll()
    poll.register(number, 0)  # errors are told in any case
    return not any(event & select.POLLERR for _, event in poll.poll(0))


def open_closed() -> None:
    """Give a program that was started with closed streams (`2>&-`) some that lead nowhere.

    What is no UTF-8, as names of files may be, is printed escaped from then on.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr is by itself


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or the name of its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str, but: str = "") -> str:
    """Take out of a text what would command the terminal: captions, keys and names of files may hold escapes.

    It becomes a line. What is no UTF-8 is left to the stream, which escapes it. but: what else stays (line breaks).
    """
    if text.isprintable():
        return text
    return "".join(
        letter if _harmless(letter) or letter in but else " " if letter.isspace() else "�" for letter in text
    )


def _harmless(letter: str) -> bool:
    return letter.isprintable() or "\udc80" <= letter <= "\udcff"
