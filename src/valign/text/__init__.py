"""Words in prompts: undo what hides them, and find thousands of them at once. For block rules, word lists and encoders alike."""

from valign.text.spelling import View, clean, fold, readings, views
from valign.text.words import WordList

__all__ = ["View", "WordList", "clean", "fold", "readings", "views"]
