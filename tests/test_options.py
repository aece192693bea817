from dataclasses import dataclass, field
from typing import Literal

import pytest

import pipelines
from curate.errors import UsageError
from curate.options import assign, build
from pipelines import options as shared
from train.errors import UsageError as TrainerUsageError


@dataclass(frozen=True)
class Tea:
    leaf: str
    minutes: float = 3
    sugar: bool = False
    cup: Literal["mug", "glass"] = "mug"
    spices: tuple[str, ...] = ()
    note: str | None = None
    heat: tuple[float, float] = (80, 95)
    times: list[int] = field(default_factory=list)
    prices: dict[str, float] = field(default_factory=dict)


def test_a_table_becomes_options():
    tea = build(Tea, {"leaf": "assam", "minutes": 4, "spices": ["clove"], "cup": "glass"}, "tea")
    assert tea == Tea("assam", 4.0, False, "glass", ("clove",))


@pytest.mark.parametrize(
    "table, words",
    [
        ({"leaf": "a", "minuts": 3}, ["unknown key of [tea] 'minuts'", "did you mean 'minutes'", "spices"]),
        ({"leaf": 3}, ["tea.leaf=3 is not a string"]),
        ({"leaf": "a", "minutes": "long"}, ["is not a number"]),
        ({"leaf": "a", "sugar": 1}, ["true or false"]),
        ({"leaf": "a", "cup": "bowl"}, ["one of mug, glass"]),
        ({}, ["needs leaf"]),
        ({"leaf": "a", "spices": [3]}, ["tea.spices=[3] is not a list of strings"]),
        ({"leaf": "a", "spices": "clove"}, ["is not a list of strings"]),
        ({"leaf": "a", "minutes": float("inf")}, ["tea.minutes=inf is not a finite number"]),
        ({"leaf": "a", "minutes": True}, ["tea.minutes=True is not a number"]),
        ({"leaf": "a", "heat": [80]}, ["tea.heat=[80] is not a list of 2 numbers"]),
        ({"leaf": "a", "heat": [80, "x"]}, ["tea.heat=[80, 'x'] is not a list of 2 numbers"]),
        ({"leaf": "a", "times": [1, 2.5]}, ["tea.times=[1, 2.5] is not a list of whole numbers"]),
        ({"leaf": "a", "prices": {"oz": "x"}}, ["tea.prices={'oz': 'x'} is not a table of numbers"]),
        ({"leaf": "a", "note": 3}, ["tea.note=3 is not a string"]),
        (3, ["[tea] is 3, not a table"]),
    ],
)
def test_what_does_not_fit_is_refused_in_words(table, words):
    with pytest.raises(UsageError) as refusal:
        build(Tea, table, "tea")
    assert all(word in str(refusal.value) for word in words)


def test_settings_reach_into_tables():
    tables = {"tea": {"leaf": "assam"}}
    for setting in ["tea.minutes=2.5", "tea.spices=['clove']", "tea.leaf=earl grey", "new.deep.key=true"]:
        assign(tables, setting)
    assert tables == {"tea": {"leaf": "earl grey", "minutes": 2.5, "spices": ["clove"]}, "new": {"deep": {"key": True}}}
    for setting in ["nonsense", "tea..leaf=3", "tea.=3", "=3", ".=3"]:
        with pytest.raises(UsageError, match="table.key=value"):
            assign(tables, setting)
    with pytest.raises(UsageError, match="leaf is a value, not a table"):
        assign(tables, "tea.leaf.colour=3")


def test_what_a_table_leaves_out_is_taken_from_the_defaults():
    given = Tea("assam", heat=(1, 2))
    assert shared.build(Tea, {"minutes": 5}, "tea", given) == Tea("assam", 5.0, heat=(1, 2))
    told = shared.build(Tea, {"heat": [70, 90.5], "times": [1, 2], "prices": {"oz": 3}}, "tea", given)
    assert (told.heat, told.times, told.prices) == ((70.0, 90.5), [1, 2], {"oz": 3.0})
    assert all(isinstance(number, float) for number in (*told.heat, *told.prices.values()))


def test_both_programs_refuse_a_table_in_the_same_words(tmp_path):
    from train import config

    (tmp_path / "p.toml").write_text("[align]\nlrr = 3\n")
    with pytest.raises(shared.OptionError) as ours:
        shared.build(config.Stage, {"lrr": 3}, "align")
    with pytest.raises(TrainerUsageError) as theirs:
        config.load(str(tmp_path / "p.toml"))
    assert str(theirs.value) == f"{ours.value.message} {ours.value.hint}"


@pytest.mark.parametrize("text", ["x = " + "[" * 100_000, "x = " + "{a = " * 5_000, "a" + ".a" * 5_000 + " = 1"])
def test_tables_within_tables_without_end_are_refused_in_a_line(tmp_path, text):
    (tmp_path / "deep.toml").write_text(text)
    with pytest.raises(ValueError, match="nested too deeply"):
        pipelines.read(tmp_path / "deep.toml")


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5_000])
def test_a_setting_that_no_toml_reader_takes_is_a_text(text):
    assert shared.parse_setting(f"a.b={text}") == (["a", "b"], text)
