"""Names of groups of captions: what they share and others do not."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from curate import naming

CARS = [f"a {colour} car on the road" for colour in ("red", "blue", "old", "fast")]
BEACHES = [f"a beach with {what} and the sea" for what in ("palms", "chairs", "a dog", "waves")]


def test_a_group_is_named_by_what_it_shares_and_others_do_not():
    found = naming.names({3: CARS, 9: BEACHES}, ["a photo of a kitchen", "a photo of a church on the road"])
    assert found[3].split(", ")[0] == "car" and {"beach", "sea"} <= set(found[9].split(", "))
    assert "a" not in found[3].split(", ") and "photo" not in str(found)


def test_captions_that_share_nothing_have_no_name():
    assert naming.names({1: ["image 404", "blue shirt", "tax form"]}) == {1: ""}
    assert naming.names({1: []}) == {1: ""} and naming.names({}) == {}


@given(st.dictionaries(st.integers(0, 5), st.lists(st.text(max_size=40), max_size=8), max_size=4), st.lists(st.text()))
def test_a_name_is_made_of_phrases_of_its_group_whatever_the_captions(groups, others):
    found = naming.names(groups, others)
    assert found.keys() == groups.keys()
    for group, name in found.items():
        parts = name.split(", ") if name else []
        known = set(itertools.chain.from_iterable(map(naming.phrases, groups[group])))
        assert set(parts) <= known and len(parts) <= naming.NAMES
    shuffled = {group: captions[::-1] for group, captions in reversed(groups.items())}
    assert naming.names(shuffled, others[::-1]) == found
