"""Folding: the same word however it is dressed, and every character knows where it came from."""

import re
import sys

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from valign.text import View, clean, fold, readings, views
from valign.text.spelling import LEET, unleet
from valign.text.unseen import UNSEEN


@pytest.mark.parametrize(
    "hidden",
    [
        "WEAPON",
        "ｗｅａｐｏｎ",  # full width
        "wea\u200bpon",  # zero-width space
        "we\u00adapon",  # soft hyphen
        "wёаpоn".replace("ё", "e"),  # Cyrillic a and o
        "w̶e̶a̶p̶o̶n̶",  # struck through with combining marks
        "w3ap0n",
        "we@p0n",
        "w e a p o n",
        "w.e.a.p.o.n",
        "w - e - a - p - o - n",
        "a w e a p o n",  # the article is no letter of the word
        "wea-pon",
        "wea\u2011pon",  # no-break hyphen
        "wea\u2013pon",  # en dash
        "w\u2014e\u2014a\u2014p\u2014o\u2014n",  # em dashes
        "wea\u2212pon",  # minus
        "wea\xb4pon",  # an accent by itself
        "wea\u02bcpon",  # a spacing modifier, which Unicode counts as a letter
        "wea\u2764pon",  # any sign beyond ASCII
        "wea=pon",
        "wea,pon",
        "wea[pon",
        "a\u3164weapon\u3164here",  # fillers for spaces
        "a\u200bweapon\u200bhere",  # a tokenizer cuts at what has no width
        "a\u2800wea\u200bpon\u2800here",
        "a\x7fweapon",
        "weeeapon",
        "ᴡᴇᴀᴘᴏɴ",  # small capitals
        "ⓦⓔⓐⓟⓞⓝ",  # circled
        "\U0001f166\U0001f154\U0001f150\U0001f15f\U0001f15e\U0001f15d",  # black circled
        "\U0001f186\U0001f174\U0001f170\U0001f17f\U0001f17e\U0001f17d",  # black squared
        "\U0001f1fc\U0001f1ea\U0001f1e6\U0001f1f5\U0001f1f4\U0001f1f3",  # flag letters
    ],
)
def test_a_hidden_word_is_read(hidden):
    assert any("weapon" in text.split() for text in readings(hidden)), readings(hidden)


def test_an_unseen_character_in_a_word_hides_it_from_nothing():
    words = {code: f"wea{chr(code)}pon" for code in UNSEEN | {0x7F, 0x80, 0x600}}
    assert [hex(code) for code, word in words.items() if fold(word) != "weapon" or clean(word) != "weapon"] == []


def test_all_that_unicode_calls_ignorable_is_unseen():
    ignorable = regex.compile(r"\p{Default_Ignorable_Code_Point}")
    assert {code for code in range(sys.maxunicode + 1) if ignorable.match(chr(code))} <= UNSEEN


@pytest.mark.parametrize(
    "plain", ["1950 sci-fi robots", "a b-movie from 1984", "route 66 at night", "a 4k photo, f/1.8", "I am a cat"]
)
def test_ordinary_writing_keeps_its_plain_reading(plain):
    assert readings(plain)[0] == fold(plain)


HIDDEN = st.text(st.sampled_from("abkt  031@!.-\n\x00éа\u200b\u3164"), max_size=40)  # what the rules are about


@settings(deadline=None)
@given(st.text(max_size=60) | HIDDEN)
def test_the_quick_readings_are_the_views(text):
    assert readings(text)[0] == fold(text)
    assert readings(text) == [view.text.strip() for view in views(text)]


@settings(deadline=None)
@given(st.text(max_size=60) | HIDDEN)
def test_folding_twice_is_folding_once(text):
    assert fold(fold(text)) == fold(text)
    assert fold(text).split() == fold(text).split(" ") or not fold(text)


@settings(deadline=None)
@given(st.text(max_size=60) | HIDDEN)
def test_every_character_points_into_the_prompt(text):
    for view in views(text):
        assert len(view.text) == len(view.origin)
        assert all(0 <= place < max(len(text), 1) for place in view.origin)
        assert list(view.origin) == sorted(view.origin)


def test_a_span_covers_the_word_as_typed():
    prompt = "oil painting of a w3ap0n"
    view = next(view for view in views(prompt) if " weapon " in view.text)
    start = view.text.index("weapon")
    assert prompt[slice(*view.span(start, start + 6))] == "w3ap0n"


@pytest.mark.parametrize(
    ("prompt", "typed"),
    [
        ("two well-worn weapons, on a wall", "weapons"),  # letter by letter, in the middle of a token
        ("a ｗｅａｐｏｎｓ rack", "ｗｅａｐｏｎｓ"),
        ("the w e a p o n s, here", "w e a p o n s"),
        ("(we@p0n$)", "we@p0n$"),
        ("ﬁne wea\u200bpons", "wea\u200bpons"),  # a ligature before it is two letters
    ],
)
def test_a_span_is_as_narrow_as_it_can_be(prompt, typed):
    view = next(view for view in views(prompt) if " weapons " in view.text)
    start = view.text.index("weapons")
    assert prompt[slice(*view.span(start, start + 7))].strip("()") == typed


def test_an_empty_view_is_a_space():
    assert next(iter(views(""))) == View(" ", (0,))


@pytest.mark.parametrize(
    ("typed", "seen"), [("a  cat\n", "a cat"), ("wea\u200bpon", "weapon"), ("caf\u00e9", "café"), ("mоon", "moon")]
)
def test_clean_keeps_what_an_encoder_should_see(typed, seen):
    assert clean(typed) == seen


BOTH = re.compile(r"(?=\S*[a-z])(?=\S*[0134578@$!|€])[a-z0-9@$!|€]{3,}")  # the rule in one line, quadratic in a word's length


@given(st.text("ab1904@$!-.é", max_size=24), st.sampled_from("il"))
def test_leetspeak_is_read_as_the_rule_says(token, one):
    assert unleet(token, LEET[one]) == BOTH.sub(lambda run: run[0].translate(LEET[one]), token)
