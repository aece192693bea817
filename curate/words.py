"""How texts are cut into words, for all that counts or compares them.

`words` is what a reader calls a word: a run of letters and digits in which apostrophes and hyphens may stand ("man's",
"t-shirt", "2019"). `pieces` cuts at every sign, so that texts which differ in hyphens and apostrophes alone are the
same ("t-shirt" is "t", "shirt"): for finding text again. Both fold case. How many words a caption has, the column
`caption_words`, is another rule still, DataComp's: what stands between spaces.
"""

import re
import unicodedata

WORD = re.compile(r"[^\W_]+(?:['’\-][^\W_]+)*")
PIECE = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """List the case-folded words of a text, in order."""
    return WORD.findall(text.casefold())


def is_blank(text: str) -> bool:
    """Say whether nothing of a text is to be seen: it has spaces, control and formatting characters at most."""
    return all(unicodedata.category(letter)[0] in "ZC" for letter in text)


def pieces(text: str) -> list[str]:
    """List the case-folded runs of letters, digits and underscores of a text, in order."""
    return PIECE.findall(text.casefold())
