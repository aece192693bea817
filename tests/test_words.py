"""How texts are cut into words."""

import pytest

from curate.words import pieces, words


@pytest.mark.parametrize(
    "text, whole, cut",
    [
        ("A man's T-Shirt, 2019!", ["a", "man's", "t-shirt", "2019"], ["a", "man", "s", "t", "shirt", "2019"]),
        ("-well- 'tis snake_case", ["well", "tis", "snake", "case"], ["well", "tis", "snake_case"]),
        ("STRASSE Straße", ["strasse", "strasse"], ["strasse", "strasse"]),
        ("  \n…", [], []),
    ],
)
def test_words_keep_apostrophes_and_hyphens_and_pieces_do_not(text, whole, cut):
    assert words(text) == whole and pieces(text) == cut
