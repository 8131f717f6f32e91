"""Words in pieces: emoji, brackets, weights, tags and alternatives between them, and harmless prompts that have the same signs."""

import pytest

from valign.text import WordList, fold, readings
from valign.text.pieces import MAX_OPTIONS, between_pieces, may_have_pieces

WORDS = WordList(["weapon"])


@pytest.mark.parametrize(
    "prompt",
    [
        "a wea\U0001f600pon",
        "a w\U0001f600e\U0001f600a\U0001f600p\U0001f600o\U0001f600n",
        "a wea\u2764\ufe0fpon",
        "a wea\U0001f468\u200d\U0001f469\u200d\U0001f467pon",  # joined emoji
        "a wea\U0001f44d\U0001f3fdpon",  # with a skin tone
        "a wea\U0001f1e9\U0001f1eapon",  # a flag: two letters to Unicode
        "a wea1\ufe0f\u20e3pon",  # a keycap: a digit to Unicode
        "a wea\u2122pon",  # TM
        "a wea\u24c2pon",  # a circled M
        "a we \U0001f1e9\U0001f1ea apon",
        "a wea \U0001f600 pon",
        "a w\U0001f1e63\U0001f1e6ap0n",  # with leetspeak
        "a wea(pon)",
        "a (wea)(pon)",
        "a w(e)a(p)o(n)",
        "a wea (pon)",
        "a (wea) (pon)",
        "a wea\u3010pon\u3011",
        "a wea(pon:1.2)",
        "a (wea:1.1)(pon:1.2)",
        "a wea[pon:0.5]",
        "a wea()pon",
        "a wea(:1)pon",
        "a wea<lora:any:0>pon",
        "a wea BREAK pon",
        "a wea[pon:cat:0.3]",
        "a wea[cat:pon:0]",
        "a wea[cat|dog|pon]",
        "a wea{cat|{dog|pon}}",
        "a n4-k3d w3-ap0n",
    ],
)
def test_a_word_in_pieces_is_found(prompt):
    assert any(map(WORDS.any, readings(prompt))), readings(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "a cat \U0001f600 and a dog",
        "flags of \U0001f1e9\U0001f1ea and \U0001f1eb\U0001f1f7",
        "portrait, (sharp focus:1.2), [soft light], <lora:detail:0.6>",
        "a {red|green|blue} car",
        "sir lance \\(castle\\)",
        "a lunch BREAK in the park",
        "1\ufe0f\u20e3 first place",
        "((masterpiece)), ((best quality))",
        "we (a pony)",  # the pieces are words of other places
        "wea > pon",
    ],
)
def test_harmless_signs_find_nothing(prompt):
    assert not any(map(WORDS.any, readings(prompt)))
    assert readings(prompt)[0] == fold(prompt)


def test_plain_writing_has_no_pieces():
    assert not may_have_pieces("a cat on a sofa, 35 mm, f/1.8")
    assert list(between_pieces("ein Mädchen", list("ein madchen"))) == []


def test_alternatives_are_read_one_by_one_up_to_a_bound():
    options = "|".join(f"x{chr(97 + number)}" for number in range(MAX_OPTIONS))
    assert not any(map(WORDS.any, readings(f"wea[{options}|pon]")))
    assert any(map(WORDS.any, readings(f"wea[{options.removeprefix('xa|')}|pon]")))
