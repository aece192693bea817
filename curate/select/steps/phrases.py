"""Noun phrases of captions, found by spaCy: its noun chunks, case-folded, less leading determiners and pronouns.

spaCy and its English pipeline are installed apart: `pip install 'data-curate[text]'`, then
`python -m spacy download en_core_web_sm`. Which versions ran is recorded, since phrases differ with them. Some
milliseconds a caption on one core.
"""

from collections.abc import Callable, Iterable, Iterator

from curate.errors import UsageError

DEFAULT = "spacy:en_core_web_sm"  # LLaVA's
Extractor = Callable[[Iterable[str]], Iterator[list[str]]]


def extractor(name: str) -> tuple[Extractor, str]:
    """Load an extractor of phrases, `spacy:PIPELINE`. Returns it, and its name with versions.

    Raises: UsageError for another name, and where spaCy or the pipeline is missing.
    """
    kind, _, model = name.partition(":")
    if kind != "spacy" or not model:
        raise UsageError(f"unknown extractor {name!r}; expected a spaCy pipeline.", f"extractor={DEFAULT!r}")
    try:
        import spacy
    except ImportError:
        missing = f"extractor={name!r} needs spaCy, which is not installed."
        raise UsageError(missing, f"pip install 'data-curate[text]' && python -m spacy download {model}") from None
    try:
        pipeline = spacy.load(model, exclude=["ner", "lemmatizer"])
    except OSError:
        raise UsageError(f"spaCy has no pipeline {model!r} here.", f"python -m spacy download {model}") from None

    def extract(captions: Iterable[str]) -> Iterator[list[str]]:
        for document in pipeline.pipe(captions, batch_size=1000):
            yield [phrase for chunk in document.noun_chunks if (phrase := _phrase(chunk))]

    meta = pipeline.meta
    return extract, f"spacy {spacy.__version__}, {meta['lang']}_{meta['name']} {meta['version']}"


def _phrase(chunk: Iterable[object]) -> str:
    """Write a noun chunk, less what comes before its first content word; a pronoun alone is none."""
    tokens = [token for token in chunk if not getattr(token, "is_space", False)]
    while tokens and getattr(tokens[0], "pos_", "") in ("DET", "PRON", "PUNCT"):
        tokens = tokens[1:]
    return " ".join(str(token).casefold() for token in tokens)
