"""The language of a caption, by lingua (the extra `language`), whose models come with the package.

Source: lingua-language-detector; n-grams of one to five letters, which is what works on texts as short as captions.
"""

from collections.abc import Callable
from functools import lru_cache

from curate.errors import UsageError, unknown

NAME = "lingua"


@lru_cache(maxsize=4)
def detector(code: str) -> Callable[[str], float]:
    """Make a function: the probability of a language (ISO 639-1, "en") for a text, over the likeliest one's: 0 … 1.

    1: no language is likelier. For a caption of five words even the right language has a low probability, as 75
    languages share it; the ratio is reliable. A text without letters has 0.
    Raises: UsageError where lingua is not installed or knows no such language.
    """
    try:
        import lingua
    except ImportError:
        raise UsageError("language() needs lingua.", "pip install 'data-curate[language]'") from None
    by_code = {each.iso_code_639_1.name.lower(): each for each in lingua.Language.all()}
    if code.lower() not in by_code:
        raise unknown("language", code, by_code)
    built = lingua.LanguageDetectorBuilder.from_all_languages().build()

    def beside_the_likeliest(text: str) -> float:
        confidence = {each.language: each.value for each in built.compute_language_confidence_values(text)}
        best = max(confidence.values(), default=0.0)
        return float(confidence[by_code[code.lower()]] / best) if best else 0.0

    return beside_the_likeliest
