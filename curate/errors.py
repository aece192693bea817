"""The errors that curate tells its user about, and the one-line form that they take.

CurateError          anything the user can act on; shown as one line, never as a traceback
├── UsageError       the request was wrong: unknown name, bad value, nothing to do            exit 2
├── ContractError    files do not fit together: other options, rows that do not line up       exit 2
├── RunError         nothing can go on: a full disk, a lost mount; a rerun takes it up again  exit 1
└── ShardError       one shard cannot be worked; the others go on, a rerun retries it         exit 1
"""

import difflib
from collections.abc import Iterable

MOST_LISTED = 50  # names in one line; of more, those like the given one


class CurateError(Exception):
    """A failure with a message for the user and, where one exists, the command that mends it."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}  hint: {self.hint}"


class UsageError(CurateError):
    """The request cannot be carried out as it stands."""

    exit_code = 2


class ContractError(CurateError):
    """Artefacts contradict each other or the request."""

    exit_code = 2


class RunError(CurateError):
    """What all shards rest on is out of order, so that the run stops at once; when that is mended, a rerun goes on."""


class ShardError(CurateError):
    """One shard failed; the run goes on without it and ends with exit code 1."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """Build the refusal of a name: what was given, the nearest name, and all that exist, or of very many some."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    listed = names if len(names) <= MOST_LISTED else difflib.get_close_matches(given, names, n=10, cutoff=0)
    more = f" and {len(names) - len(listed)} others" if len(listed) < len(names) else ""
    return UsageError(
        f"unknown {kind} {given!r}; there are: {', '.join(listed) or 'none'}{more}.",
        f"did you mean {near[0]!r}?" if near else None,
    )
