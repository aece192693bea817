"""A stand-in for spaCy, which the tests do without: its pipeline knows a few determiners, and cuts chunks at "and"."""

import sys
from types import ModuleType, SimpleNamespace

import pytest

DETERMINERS = {"a", "the", "its"}


class Token(str):
    """A word with the fields that are read off spaCy's tokens."""

    is_space = False

    @property
    def pos_(self):
        return "DET" if self.lower() in DETERMINERS else "PRON" if self.lower() == "it" else "NOUN"


class Pipeline:
    """What spacy.load returns, as far as it is used."""

    meta = {"lang": "en", "name": "stand_in", "version": "1.0"}

    def pipe(self, texts, batch_size):
        for text in texts:
            yield SimpleNamespace(noun_chunks=[list(map(Token, chunk.split())) for chunk in text.split(" and ")])


def load(name, exclude):
    if name != "en_core_web_sm":
        raise OSError(name)
    return Pipeline()


@pytest.fixture(scope="session", autouse=True)
def spacy():
    """Put the stand-in where `import spacy` finds it."""
    stand_in = ModuleType("spacy")
    stand_in.load, stand_in.__version__ = load, "3.8"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "spacy", stand_in)
        yield stand_in
