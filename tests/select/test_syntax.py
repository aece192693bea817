"""How counts and defaults are written: what is printed may be typed, and nothing is read as ten times what it says."""

import inspect

import pytest

from curate.errors import UsageError
from curate.select import catalogue, computed_columns, syntax

REQUIRED = {
    **{"column": "clip_score", "x": "0.3", "lo": "0", "hi": "1", "n": "10", "directory": "'d'", "file": "'f'"},
    **{"vocabulary": "'v'", "text": "'a'", "code": "'en'"},
}
TABLES = {"step": (catalogue.STEPS, catalogue.HIDDEN), "column": (computed_columns.COLUMNS, computed_columns.HIDDEN)}


def defaults():
    for noun, (table, hidden) in TABLES.items():
        for name, function in table.items():
            parameters = list(inspect.signature(function).parameters.values())[hidden:]
            needed = [f"{each.name}={REQUIRED[each.name]}" for each in parameters if each.default is each.empty]
            for each in parameters:
                if each.default is not each.empty and each.annotation is not syntax.Texts:
                    yield noun, f"{name}({', '.join([*needed, syntax._show(each)])})", each


@pytest.mark.parametrize("noun, text, parameter", [pytest.param(*each, id=each[1]) for each in defaults()])
def test_every_default_may_be_typed_as_it_is_printed(noun, text, parameter):
    table, hidden = TABLES[noun]
    assert syntax.read(text, table, noun, "like", hidden)[1][parameter.name] == parameter.default


@pytest.mark.parametrize("text", ["0,5%", "1,5%", "1,000%", "0,5", "1,5", "12,34", "1,0000", "0,500", ","])
def test_a_comma_for_a_point_is_no_count(text):
    with pytest.raises(UsageError, match="expected a number of rows"):
        syntax.parse_count(text, "n")


def test_commas_between_thousands_are_read():
    assert syntax.parse_count("2,000,000", "n") == syntax.parse_count("2_000_000", "n") == 2_000_000


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_percentage_inside_a_text_stays_as_it_is_written(quote):
    others = "it is 5%" if quote == "'" else "it's 5%"
    asked = f"prompt({quote}a sale, 50%, now{quote}, {quote}{others}{quote})"
    step = catalogue.parse([f"top({asked}, 2%)"])[0]
    assert step.arguments["n"] == 0.02
    _, arguments = computed_columns._read(step.arguments["column"])
    assert arguments["text"] == "a sale, 50%, now" and arguments["others"] == (others,)
