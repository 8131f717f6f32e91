"""Words in prompts: undo disguised spelling, and match thousands of words at once. For block rules, word lists and encoders."""

from valign.text.spelling import View, clean, fold, readings, views
from valign.text.words import WordList

__all__ = ["View", "WordList", "clean", "fold", "readings", "views"]
