"""The law of options: each option of each verb of both programs is typed in a test that runs the command line."""

import ast
import functools
from pathlib import Path

import pytest
import typer

from curate.cli import app as curate_app
from train.__main__ import app as train_app

TESTS = Path(__file__).parent
PROGRAMS = {name: typer.main.get_command(app) for name, app in (("curate", curate_app), ("train", train_app))}
OPTIONS = sorted(
    (program, verb, option)
    for program, group in PROGRAMS.items()
    for verb, command in group.commands.items()
    for parameter in command.params
    for option in [next((each for each in parameter.opts if each.startswith("--")), "")]
    if option and option != "--help"
)


class Scan(ast.NodeVisitor):
    """Finds the options typed after a verb in one list, tuple or call; names stand for what was last assigned to them.

    program: whose verbs come without its name before them.
    """

    def __init__(self, program: str) -> None:
        self.program, self.found = program, set()
        self.assigned: list[dict[str, ast.expr]] = [{}]

    def words(self, node: ast.expr, depth: int = 0) -> list[str]:
        """List the words that an element of a command line surely holds."""
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return [node.value]
        if isinstance(node, ast.JoinedStr) and node.values and isinstance(node.values[0], ast.Constant):
            return [str(node.values[0].value)]
        if isinstance(node, ast.Starred):
            node = node.value
            if isinstance(node, ast.Name):
                node = next((names[node.id] for names in reversed(self.assigned) if node.id in names), node)
            if isinstance(node, ast.List | ast.Tuple) and depth < 9:
                return [word for element in node.elts for word in self.words(element, depth + 1)]
        return []

    def look(self, elements: list[ast.expr]) -> None:
        words, program = [word for element in elements for word in self.words(element)], self.program
        while words and words[0] in ("-m", *PROGRAMS):
            program, words = words[0] if words[0] in PROGRAMS else program, words[1:]
        if words and words[0] in PROGRAMS[program].commands:
            self.found |= {(program, words[0], word.partition("=")[0]) for word in words if word.startswith("--")}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.assigned.append({})
        self.generic_visit(node)
        self.assigned.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)  # before the name is taken: `words = [*words, …]`
        for target in node.targets:
            if isinstance(target, ast.Name):
                value = node.value
                if isinstance(value, ast.List | ast.Tuple):
                    value = ast.Tuple([ast.Constant(word) for word in self.words(ast.Starred(value))])
                self.assigned[-1][target.id] = value

    def visit_List(self, node: ast.List | ast.Tuple) -> None:
        self.look(node.elts)
        self.generic_visit(node)

    visit_Tuple = visit_List

    def visit_Call(self, node: ast.Call) -> None:
        self.look(node.args)
        self.generic_visit(node)


def typed_in(source: str, program: str) -> set[tuple[str, str, str]]:
    scan = Scan(program)
    scan.visit(ast.parse(source))
    return scan.found


@functools.cache
def typed() -> set[tuple[str, str, str]]:
    found = set()
    for path in TESTS.rglob("test_*.py"):
        if path != Path(__file__):
            found |= typed_in(path.read_text(), "train" if TESTS / "train" in path.parents else "curate")
    return found


def test_the_scan_sees_what_is_typed_and_nothing_else():
    source = """
curate("embed", pool, "--model", CLIP, *["--seed", 3], f"--slice={part}")
words = ["emit", out, *unknown]  # --shard-size
call(capfd, "select", where, "--step=sample(3)")
"--prompt"
[sys.executable, "-m", "train", "align", "--out", "x"]
def test():
    more = ("--pool", "x")
    words = ["emit", out, *more]
    words = [*words, "--json"]
    call(*words, "--overwrite")
call(*words, "--format", "llava")
"""
    expected = {("embed", "--model"), ("embed", "--seed"), ("embed", "--slice"), ("select", "--step")}
    expected |= {("emit", "--pool"), ("emit", "--json"), ("emit", "--overwrite"), ("emit", "--format")}
    assert typed_in(source, "curate") == {("curate", *each) for each in expected} | {("train", "align", "--out")}


@pytest.mark.parametrize("program, verb", sorted({each[:2] for each in OPTIONS}))
def test_every_option_of_every_verb_is_typed_in_a_test(program, verb):
    missing = [option for *who, option in OPTIONS if tuple(who) == (program, verb)]
    assert not sorted(set(missing) - {option for *who, option in typed() if tuple(who) == (program, verb)})
