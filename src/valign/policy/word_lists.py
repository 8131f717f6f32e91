"""Word lists of the languages that valign brings: harm per category, words for minors, and phrases that mean no harm."""

from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from valign.checks import check_choice
from valign.policy.schema import LISTED_LANGUAGES, Part, Text, Words

FOLDER = Path(__file__).parent / "languages"


class LanguageWords(Part):
    """One language. ``"nackt/e/er"`` stands for a stem by itself and with each ending; `terms` writes them out."""

    code: str  # ISO 639-1
    name: Text
    minors: list[Words] = Field(min_length=1)
    categories: dict[str, list[Words]]
    harmless: list[Words] = Field(default=[])

    def terms(self, category: str) -> list[str]:
        return expanded(self.categories.get(category, []))


def expanded(entries: list[str]) -> list[str]:
    """Every form of entries such as ``"nackt/e/er"``; without a slash the entry itself."""
    found = []
    for entry in entries:
        stem, *endings = entry.split("/")
        found += [stem, *(stem + ending for ending in endings)]
    return list(dict.fromkeys(found))


@cache
def language_words(code: str) -> LanguageWords:
    """The lists of a language. Raises: ValueError for one without."""
    check_choice("language_words.code", code, LISTED_LANGUAGES)
    return LanguageWords.model_validate(yaml.safe_load((FOLDER / f"{code}.yaml").read_text(encoding="utf-8")))
