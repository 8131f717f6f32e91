"""Disguised, diluted and cut prompts keep label and meaning; what each disguise may change is said exactly."""

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from valign.checks import UserError
from valign.data.prompts.disguise import (
    DISGUISES,
    diluted,
    disguised,
    fragments,
    garbled,
    glued,
    in_every_disguise,
    marked,
    misspelt,
    shredded,
    soup,
    tailed,
)
from valign.data.prompts.pairs import LabelledPrompt

WORDS = st.lists(st.text("abcdefgh", min_size=1, max_size=9), min_size=1, max_size=12)
SEEDS = st.integers(0, 2**32)
ROWS = [
    LabelledPrompt(
        f"toy:{i}", f"a {'furious' if i % 2 else 'quiet'} boat number {i} on a lake", i % 2, (), "toy", f"toy:{i}", f"p{i // 2}"
    )
    for i in range(40)
]


@given(WORDS, SEEDS)
def test_gluing_loses_spaces_only(words, seed):
    assert "".join(glued(words, ["x"], Random(seed))) == "".join(words)


@given(WORDS, SEEDS)
def test_misspelling_changes_long_words_by_a_letter(words, seed):
    wrong = misspelt(words, ["x"], Random(seed))
    assert len(wrong) == len(words)
    assert all(one == other for one, other in zip(words, wrong) if len(one) < 4)
    assert all(abs(len(one) - len(other)) <= 1 for one, other in zip(words, wrong))


@given(WORDS, SEEDS)
def test_marks_stay_inside_words(words, seed):
    for one, other in zip(words, marked(words, ["x"], Random(seed)), strict=True):
        assert other[0] in {one[0], *"@3105"}
        assert len(other) >= len(one)


@given(WORDS, SEEDS)
def test_a_soup_keeps_the_long_words(words, seed):
    made = soup(words, ["x"], Random(seed))
    assert sorted(word for word in made if len(word) > 3) == sorted(word for word in words if len(word) > 3)


@given(WORDS, SEEDS)
def test_a_tail_leaves_the_prompt_whole(words, seed):
    made = tailed(words, ["tailpiece"], Random(seed))
    assert words in (made[: len(words)], made[-len(words) :])
    assert 3 <= len(made) - len(words) <= 12


@given(WORDS, SEEDS)
def test_garbling_keeps_first_letters_and_short_words(words, seed):
    made = garbled(words, ["x"], Random(seed))
    assert [one[0] for one in made] == [one[0] for one in words]
    assert all(one == other for one, other in zip(words, made) if len(one) < 3)
    assert all(abs(len(one) - len(other)) <= 1 for one, other in zip(words, made))
    assert all(garbled([word], ["x"], Random(seed)) != [word] or len(set(word[1:])) < 5 for word in words)


@given(WORDS, SEEDS)
def test_shredding_keeps_every_letter_in_order(words, seed):
    assert "".join(shredded(words, ["x"], Random(seed))) == "".join(words)


@given(SEEDS)
def test_labels_are_kept(seed):
    for made, count in ((disguised(ROWS, share=0.5, seed=seed), 20), (diluted(ROWS, share=0.5, seed=seed), 20)):
        assert len(made) == count
        assert all(one.label == int(one.id[4:-1]) % 2 and one.pair == "" for one in made)


def test_every_row_in_every_disguise():
    made = in_every_disguise(ROWS, seed=0)
    names = [disguise.__name__ for disguise in DISGUISES]
    assert [one.source for one in made] == [name for name in ("plain", *names) for _ in ROWS]
    assert [one.label for one in made] == [row.label for row in ROWS] * (1 + len(names))
    assert [one.prompt for one in made[: len(ROWS)]] == [row.prompt for row in ROWS]
    assert len({one.id for one in made}) == len(made)
    with pytest.raises(UserError, match="need harmless prompts"):
        in_every_disguise(ROWS[1::2], seed=0)


def test_company_hides_nothing():
    assert all(("furious" in one.prompt) == (one.label == 1) for one in diluted(ROWS, share=1.0, seed=0))


def test_fragments_are_harmless_and_short():
    made = fragments(ROWS, share=1.0, seed=0)
    assert len(made) == 20
    assert all(one.label == 0 and 1 <= len(one.prompt.split()) <= 3 for one in made)


def test_one_letter_survives_every_disguise():
    for disguise in DISGUISES:
        assert "a" in " ".join(disguise(["a"], ["x"], Random(0))) or disguise is soup


@pytest.mark.parametrize("make", [disguised, diluted, fragments])
def test_refuses_a_share_beyond_one(make):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\], got 2"):
        make(ROWS, share=2.0, seed=0)
