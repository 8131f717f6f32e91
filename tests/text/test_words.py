"""Many words at once: whole, spaced out, cut in two; and what only looks like it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.text import WordList, fold

WORDS = WordList(["weapon", "bomb", "axe", "stand there"])


@pytest.mark.parametrize(
    "text",
    [
        "a weapon",
        "w e a p o n",
        "a w e a p o n s h o p",  # nobody knows where the words end
        "t w o w e a p o n s",
        "a b o m b",
        "b o m b s h e l t e r",
        "an a x e and more",
        "s t a n d t h e r e",
        "stand there",
        "we should stand there",
    ],
)
def test_found(text):
    assert WORDS.any(text)


@pytest.mark.parametrize(
    "text",
    [
        "weapons",
        "bombard",
        "a x e s",
        "t a x e s",
        "c o m b o m b s",
        "standthere",
        "stand by there",
        "wea pon",
        "we apon",
        "b omb",
        "",
    ],
)
def test_not_found(text):
    assert not WORDS.any(text)


@pytest.mark.parametrize("text", ["w eapon", "weapo n", "weap on", "a weapo n shop"])
def test_a_word_with_one_or_two_letters_cut_off(text):
    assert WORDS.any(text) == (text != "weap on")  # "on" is a word


@pytest.mark.parametrize(
    "text", ["weappon", "wweeaappoonn", "weapoon", "bommb", "aaxxe", "stannd there", "a wweapon", "weaponn shop"]
)
def test_a_word_with_doubled_letters(text):
    assert WORDS.any(text)


@pytest.mark.parametrize(
    ("term", "text"),
    [
        ("son", "soon"),  # of three different letters two must be doubled
        ("raping", "rapping"),
        ("stripping", "striping"),  # fewer letters are another word
        ("shot", "shoot"),
        ("bare", "barre"),
        ("ass", "as"),
        ("ass", "asss"),
        ("gun", "gunn"),
        ("no", "noo"),
        ("term499", "term4999"),
    ],
)
def test_words_that_only_look_doubled(term, text):
    assert not WordList([term]).any(text)


def test_a_doubled_word_is_found_where_it_stands():
    assert list(WORDS.find(" a bommbb and a weapon ")) == [(3, 9, "bomb"), (16, 22, "weapon")]


@given(st.lists(st.text("abc ", min_size=1, max_size=6).filter(str.strip), min_size=1, max_size=5), st.text("abc ", max_size=30))
def test_agrees_with_a_look_at_every_word(terms, text):
    """The obvious way, for whole words: any and find."""
    words = WordList(terms)
    folded = fold(text)
    plain = {term for term in words.terms if f" {term} " in f" {folded} "}
    found = {term for _, _, term in words.find(f" {folded} ")}
    assert plain <= found
    assert words.any(folded) == bool(found)
    for start, end, term in words.find(f" {folded} "):
        found_there, meant = f" {folded} "[start:end].replace(" ", ""), term.replace(" ", "")
        assert found_there == meant or re.fullmatch("".join(f"{letter}+" for letter in meant), found_there)


def test_the_first_and_longest_comes_first():
    words = WordList(["red", "red fox", "fox"])
    assert [term for _, _, term in words.find(" a red fox ")] == ["red fox", "red", "fox"]


def test_refuses_blank_terms():
    with pytest.raises(ValueError, match=r"WordList\.terms must be words, got 2 with a blank one"):
        WordList(["axe", " - "])
    with pytest.raises(ValueError, match="got 0"):
        WordList([])
