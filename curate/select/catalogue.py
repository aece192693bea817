"""The selection steps: each looks at the rows still alive and decides which of them stay.

A step is a function of the frame, its place in the funnel (which seeds its random draws) and its arguments; its
signature defines how it is written. Steps are in `steps/`, one file per kind. Here are the table of all steps, and how
a written one, such as `rank(clip_score, 0.40, 0.60)`, is parsed, checked against a pool, and run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from curate.ask.vocabularies import BUILT_IN
from curate.select import computed_columns, syntax
from curate.select.frame import Column, Directory, File, Frame, Group, Keep, Verdict
from curate.select.steps import by_budget, by_caption, by_concept, by_coverage, by_duplicates, by_score, by_target

STEPS: dict[str, Callable[..., Verdict]] = {
    step.__name__: step
    for step in (
        *(
            by_duplicates.dedup,
            by_score.rank,
            by_score.above,
            by_score.at_least,
            by_score.below,
            by_score.at_most,
            by_score.top,
            by_score.bottom,
        ),
        *(by_budget.sample, by_budget.balance, by_budget.balance_tree, by_budget.cap),
        *(by_coverage.typical, by_coverage.coincide),
        *(by_caption.noun_phrases, by_caption.metaclip, by_concept.concepts),
        *(by_score.mismatch, by_duplicates.placeholders, by_target.exclude, by_target.image_based, by_target.subset),
    )
}

HIDDEN = 2  # the frame and the step's number are not written


@dataclass(frozen=True)
class Step:
    """A parsed step. number: its place in the funnel, from 1."""

    text: str
    name: str
    arguments: dict[str, Any]
    number: int

    def check(self, frame: Frame) -> None:
        """Refuse columns that do not exist, before anything runs."""
        for column in self._columns():
            computed_columns.check(frame, column)
        kinds = syntax.parameters(STEPS[self.name], HIDDEN)
        for name, value in self.arguments.items():
            if kinds[name] is Group:
                frame.known(value, frame.groups)

    def _columns(self) -> list[str]:
        kinds = syntax.parameters(STEPS[self.name], HIDDEN)
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
        kinds = syntax.parameters(STEPS[self.name], HIDDEN)
        named = [(value, kinds[name]) for name, value in self.arguments.items() if kinds[name] in (Directory, File)]
        besides = [(value, kind) for value, kind in named if value not in BUILT_IN]
        return [*besides, *(each for column in self._columns() for each in computed_columns.reads(column))]


def parse(texts: Sequence[str]) -> list[Step]:
    """Parse step texts. Raises: UsageError naming the text, what is wrong with it and what exists."""
    return [_parse(text.strip(), number) for number, text in enumerate(texts, 1)]


def _parse(text: str, number: int) -> Step:
    name, arguments = syntax.read(text, STEPS, "step", "rank(clip_score, 0.40, 0.60)", HIDDEN)
    return Step(text, name, arguments, number)


def signature(name: str) -> str:
    """Write how a step is called, with its defaults."""
    return syntax.signature(name, STEPS, HIDDEN)
