"""Run many commands in one process: one request per line on stdin, one answer per line on stdout.

A request is a JSON list, the words of a `python -m train` command. The answer is `{"exit": 0, "said": …}`, or
`{"exit": 1, "error": …}` with the exit code that the command would have had. Start-up and imports take longer than
training a small model and happen once here; a command writes the same files as when it runs alone.
"""

import contextlib
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from train.errors import Interrupted, TrainError


def end_with(parent: int) -> None:
    """Send SIGTERM to this process, which saves its work, as soon as the one that started it is gone; 0: never."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


def answers(lines: Iterable[str], run: Callable[[list[str]], None]) -> Iterator[dict[str, Any]]:
    """Yield the answer to each request; `run` runs one command, given as words.

    Raises: Interrupted, after which the process must end.
    """
    for line in lines:
        if line.strip():
            yield _answer(line, run)


def _answer(line: str, run: Callable[[list[str]], None]) -> dict[str, Any]:
    said = io.StringIO()
    try:
        words = json.loads(line)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError("a request is a JSON list of words")
        with contextlib.redirect_stdout(said):
            run(words)
    except Interrupted:
        raise
    except TrainError as error:
        return {"exit": error.exit_code, "error": str(error)}
    except ValueError as error:
        return {"exit": 2, "error": f"{line.strip()[:200]}: {error}"}
    except Exception as error:  # a misspelt verb has an exit code; other failures must not reach the next command
        if hasattr(error, "format_message"):
            return {"exit": getattr(error, "exit_code", 2), "error": error.format_message()}
        return {"exit": 1, "error": f"{type(error).__name__}: {error}"}
    return {"exit": 0, "said": said.getvalue()}
