"""Which words carry the harm, with a guard whose answers are known."""

import re

import pytest

from valign.guard.rewriting.edit_search import MOST_LOOKED_AT, carriers, content_words, droppable, part_of, parts_that_carry

LIMIT = 0.5


def risks_of(weights):
    """A guard that adds up what words weigh; asked texts are kept."""
    asked = []

    def risks(texts):
        asked.append(list(texts))
        return [sum(weight for words, weight in weights.items() if re.search(rf"\b{words}\b", text)) for text in texts]

    return risks, asked


def found(text, weights, must=(), likely=None):
    risks, asked = risks_of(weights)
    sets = carriers(text, content_words(text), list(must), likely or [0.0] * 40, risks, LIMIT)
    words = [re.findall(r"\w+", text)[place] for place in sets[0]] if sets else None
    return words, sets, asked


def test_the_fewest_words_that_carry_it_then_more():
    words, sets, asked = found("a cruel man with a knife in a garden", {"knife": 0.9, "cruel": 0.3, "garden": 0.1})
    assert words == ["knife"]
    assert sets == [(5,), (1, 5), (1, 2, 5), (1, 2, 5, 8)]
    assert len(asked) == 2  # words left out, then growing sets
    words, _, _ = found("a cruel man with a knife in a garden", {"knife": 0.9, "cruel": 0.6})
    assert words == ["cruel", "knife"]


def test_larger_sets_take_the_likeliest_words():
    likely = [0.0, 0.1, 0.0, 0.0, 0.0, 0.9, 0.0, 0.0, 0.8]
    _, sets, _ = found("a cruel man with a knife in a garden", {"cruel": 0.9}, likely=likely)
    assert sets == [(1,), (1, 5), (1, 5, 8), (1, 2, 5, 8)]


def test_a_phrase_is_left_out_as_a_whole_where_no_word_of_it_carries_the_harm():
    def risks(texts):  # either word is enough for the harm
        return [float(bool(re.search("golden|shower", text))) for text in texts]

    sets = carriers("a man under a golden shower at noon", [1, 4, 5, 7], [], [0.0] * 8, risks, LIMIT)
    assert sets[0] == (4, 5)


def test_words_that_must_change_are_in_every_set_and_may_be_enough():
    words, sets, asked = found("a nude man with a knife", {"nude": 1.0}, must=[1])
    assert words == ["nude"]
    assert all(1 in one for one in sets)
    assert len(asked) == 1


def test_nothing_where_few_words_are_not_enough():
    assert found("a b c d e f g h i j k", dict.fromkeys("bcdefghijk", 1.0))[1] == []
    assert found("the of and", {"the": 1.0})[1] == []


def test_of_a_long_prompt_the_parts_that_carry_it_are_looked_at():
    prompt = ", ".join(f"detail{number} word{number}" for number in range(20)) + ", a bloody knife"
    words, _, asked = found(prompt, {"bloody": 0.6, "knife": 0.6})
    assert words == ["bloody", "knife"]
    assert len(asked[1]) <= MOST_LOOKED_AT + 1


def test_content_words_by_number():
    assert content_words("a man on the old hill") == [1, 4, 5]


@pytest.mark.parametrize(
    ("text", "words", "gone"),
    [
        ("a corrupt cop at noon", [1], [1]),
        ("a corrupt cop at noon", [1, 2], []),  # the next word goes too
        ("a man rusty nail", [2], []),  # behind a noun
        ("a group of nazis burn books", [3], []),  # a plural describes nothing
        ("a cruel, man", [1], []),
        ("cruel men", [0], [0]),
        ("a cop at night", [1], []),
    ],
)
def test_words_that_can_go_without_a_gap(text, words, gone):
    assert droppable(text, words) == gone


def test_a_part_behind_a_comma_can_go_as_a_whole():
    text = "a man in a garden, holding a knife, oil painting"
    assert text[slice(*part_of(text, [5, 7]))] == ", holding a knife"
    assert part_of(text, [1]) is None
    assert part_of(text, [5, 8]) is None


def test_of_a_list_the_parts_that_carry_it_go():
    text = "a sunset, cruel hands, oil painting, a knife, wide shot"
    risks, _ = risks_of({"cruel": 0.6, "knife": 0.6})
    assert [text[slice(*span)] for span in parts_that_carry(text, risks, LIMIT)] == [", cruel hands", ", a knife"]
    assert parts_that_carry("a sunset, a knife, oil", risks, LIMIT) == []  # no list
    assert parts_that_carry("knife, cruel, knife, cruel", risks, LIMIT) == []  # half is not enough
