"""Steps as they are written, `rank(clip_score, 0.40, 0.60)`: parsed, checked against a pool, and run."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from curate import calls, computed
from curate.frame import POOL, Column, Directory, File, Frame, Group, Keep, Verdict
from curate.selectors import STEPS

HIDDEN = 2  # the frame and the step's number are not written


@dataclass(frozen=True)
class Step:
    """A parsed step. number: its place in the funnel, from 1."""

    text: str
    name: str
    arguments: dict[str, Any]
    number: int

    def check(self, frame: Frame) -> None:
        """Refuse columns that are not there, before anything runs."""
        for column in self._columns():
            computed.check(frame, column)
        kinds = calls.parameters(STEPS[self.name], HIDDEN)
        for name, value in self.arguments.items():
            if kinds[name] is Group:
                frame.known(value, frame.groups)

    def _columns(self) -> list[str]:
        kinds = calls.parameters(STEPS[self.name], HIDDEN)
        keeps = [value for name, value in self.arguments.items() if kinds[name] is Keep and ":" in value]
        return [
            *(value for name, value in self.arguments.items() if kinds[name] is Column),
            *(value.partition(":")[2] for value in keeps),
        ]

    def run(self, frame: Frame) -> Verdict:
        """Judge the frame's rows."""
        return STEPS[self.name](frame, self.number, **self.arguments)

    def reads(self) -> list[tuple[str, Any]]:
        """List what the step reads besides the pool: (path, Directory or File), those of its columns included."""
        kinds = calls.parameters(STEPS[self.name], HIDDEN)
        named = [(value, kinds[name]) for name, value in self.arguments.items() if kinds[name] in (Directory, File)]
        found = [(value, kind) for value, kind in named if value != POOL]
        return [*found, *(each for column in self._columns() for each in computed.reads(column))]


def parse(texts: Sequence[str]) -> list[Step]:
    """Parse step texts. Raises: UsageError naming the text, what is wrong with it and what there is."""
    return [_parse(text.strip(), number) for number, text in enumerate(texts, 1)]


def _parse(text: str, number: int) -> Step:
    name, arguments = calls.read(text, STEPS, "step", "rank(clip_score, 0.40, 0.60)", HIDDEN)
    return Step(text, name, arguments, number)


def signature(name: str) -> str:
    """Write how a step is called, with its defaults."""
    return calls.signature(name, STEPS, HIDDEN)
