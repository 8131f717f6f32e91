"""Only what a person can type is searched in."""

import pytest

from valign.attacks.tokens import TypedTokens
from valign.checks import UserError


def test_whole_words_that_are_not_listed(tiny_model):
    tokens = TypedTokens(tiny_model, frozenset({"man", "red"}))
    words = {tokens.text([row]) for row in tokens.ids.tolist()}
    assert {"a", "woman", "photo"} <= words
    assert not {"man", "red"} & words
    assert all(word.isalpha() for word in words)


def test_a_text_that_is_read_as_other_tokens_cannot_be_typed(tiny_model):
    tokens = TypedTokens(tiny_model, frozenset())
    spelt = tokens.tokenizer.convert_tokens_to_ids(["m", "a", "n</w>"])  # the tokenizer joins these letters to one word
    assert tokens.text(spelt) == "man"
    assert tokens.typed(spelt) == ""
    assert tokens.typed(tokens.of("a red man")) == "a red man"


def test_the_nearest_word_of_a_word_is_itself(tiny_model):
    tokens = TypedTokens(tiny_model, frozenset())
    assert (tokens.nearest(3 * tokens.vectors) == tokens.ids).all()  # the cosine does not see length


def test_too_few_words_are_refused(tiny_model):
    every = {chr(97 + i) for i in range(26)} | {"the", "of", "and", "in", "on", "with", "man", "woman", "red", "blue", "photo"}
    with pytest.raises(UserError, match=r"must have at least 8 words to search in, got \d"):
        TypedTokens(tiny_model, frozenset(every))
