from dataclasses import dataclass
from typing import Literal

import pytest

from curate.errors import UsageError
from curate.options import assign, build


@dataclass(frozen=True)
class Tea:
    leaf: str
    minutes: float = 3
    sugar: bool = False
    cup: Literal["mug", "glass"] = "mug"
    spices: tuple[str, ...] = ()
    note: str | None = None


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
    with pytest.raises(UsageError, match="table.key=value"):
        assign(tables, "nonsense")
