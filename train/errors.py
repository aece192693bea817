"""What can go wrong in `python -m train`, and the exit code of each kind.

    TrainError              exit 1   the run could not go on
    |-- UsageError          exit 2   the request was wrong: an option, a key, a path, a combination
    |-- DataError           exit 1   the samples cannot be trained on (counts and three examples in the message)
    |-- CheckpointError     exit 1   a checkpoint is corrupt or belongs to another run
    |-- Interrupted         exit 143 SIGTERM came; a checkpoint was written first

A message is one line: what was given, what was expected, what to type. The command line prints it without a traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What the host's allocator says, and, besides torch's own error class, drivers, NVIDIA's libraries and triton.
NO_MEMORY = re.compile(r"allocate memory|out of memory|ALLOC_FAILED")


class TrainError(Exception):
    """Base of every error that a user can cause and fix."""

    exit_code = 1


class UsageError(TrainError):
    """The request itself was wrong."""

    exit_code = 2


class DataError(TrainError):
    """The samples cannot be trained on."""


class CheckpointError(TrainError):
    """A checkpoint is corrupt, incomplete or another run's."""


class Interrupted(TrainError):
    """The run was asked to stop and has saved its state."""

    exit_code = 143


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that host or GPU memory ran out, however it is worded."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error))))


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'? known: a, b, c" with the nearest of `known` (or only the list)."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    guess = f"; did you mean {near[0]!r}?" if near else ";"
    return f"{guess} known: {', '.join(names)}"
