"""How texts are split into words, for everything that counts or compares them.

`words` gives what a reader calls words: runs of letters and digits that may contain apostrophes and hyphens ("man's",
"t-shirt", "2019"). `pieces` cuts at every sign, so that texts that differ only in hyphens and apostrophes are the same
("t-shirt" is "t", "shirt"): for finding text again. Both fold case. The column `caption_words`, the number of words of
a caption, follows a third rule, DataComp's: a word is what is between spaces.
"""

import re
import unicodedata

WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
PIECE = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """List the case-folded words of a text, in order."""
    return WORD.findall(text.casefold())


def is_blank(text: str) -> bool:
    """Say whether nothing of a text is visible: it has at most spaces, control and formatting characters."""
    return all(unicodedata.category(letter)[0] in "ZC" for letter in text)


def pieces(text: str) -> list[str]:
    """List the case-folded runs of letters, digits and underscores of a text, in order."""
    return PIECE.findall(text.casefold())
