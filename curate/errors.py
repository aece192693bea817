"""The errors that curate reports to its user, and their one-line form.

CurateError          anything the user can act on; shown as one line, never as a traceback
├── UsageError       the request was wrong: unknown name, bad value, nothing to do            exit 2
├── ContractError    files do not fit together: other options, rows that do not line up       exit 2
├── RunError         nothing can go on: a full disk, a lost mount; a rerun resumes            exit 1
└── ShardError       one shard cannot be processed; the others go on, a rerun retries it      exit 1
"""

import difflib
from collections.abc import Iterable

MOST_LISTED = 50  # names in one line; if there are more, only those most like the given one


class CurateError(Exception):
    """A failure with a message for the user and, where there is one, a hint: what to type to fix it."""

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
    """Something that all shards need has failed, so the run stops at once; once that is fixed, a rerun resumes."""


class ShardError(CurateError):
    """One shard failed; the run goes on without it and ends with exit code 1."""


def unknown(kind: str, given: str, known: Iterable[str]) -> UsageError:
    """Build the error for an unknown name: what was given, the nearest name, and those that exist (or some)."""
    names = sorted(known)
    near = difflib.get_close_matches(given, names, n=1)
    listed = names if len(names) <= MOST_LISTED else difflib.get_close_matches(given, names, n=10, cutoff=0)
    more = f" and {len(names) - len(listed)} others" if len(listed) < len(names) else ""
    return UsageError(
        f"unknown {kind} {given!r}; there are: {', '.join(listed) or 'none'}{more}.",
        f"did you mean {near[0]!r}?" if near else None,
    )
