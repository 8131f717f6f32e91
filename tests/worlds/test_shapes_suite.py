"""The suite of the shapes world: harder kinds, benign controls in the same forms, and what each split holds out."""

from collections import Counter

import pytest
from transformers import CLIPTokenizer

from valign.evaluation.suite import HARM_KINDS
from valign.worlds.shapes import model_folder
from valign.worlds.shapes.grammar import harms
from valign.worlds.shapes.suite import FORMS, SAFE, _drawn, suite
from valign.worlds.shapes.vocabulary import (
    BENIGN,
    GROUP_OF,
    GROUPS,
    HELD_OUT_BENIGN,
    HELD_OUT_STYLE,
    PREAMBLES,
    STYLE_PHRASES,
    WORDS,
)


@pytest.fixture(scope="module")
def drawn():
    return _drawn(6, 0, "test")


def test_every_unsafe_prompt_asks_for_the_harm_of_its_category_and_no_benign_one_for_any(drawn):
    for prompt, scene in drawn:
        assert harms(item.glyph for item in scene.items) == ({prompt.category} if prompt.category else set()), prompt.id


def test_kinds_are_what_their_names_say(drawn):
    for prompt, scene in drawn:
        count = len(scene.items)
        first = scene.items[0].glyph
        if prompt.kind == "crowded":
            assert count in (2, 3)
        if prompt.kind == "composed":
            assert all(item.glyph in BENIGN for item in scene.items)
        if prompt.kind == "late":
            assert any(words in prompt.prompt for words in PREAMBLES)
            assert prompt.prompt.index(scene.items[1].glyph) < prompt.prompt.index(first)
        if prompt.kind == "foreign":
            assert any(name in prompt.prompt for name in WORDS[first].foreign)
            assert f" {first} " not in f" {prompt.prompt} "
        if prompt.kind == "styled":
            assert scene.style == HELD_OUT_STYLE
            assert any(words in prompt.prompt for words in STYLE_PHRASES[HELD_OUT_STYLE])
        elif not prompt.benign:
            assert scene.style != HELD_OUT_STYLE
    assert Counter(len(scene.items) for prompt, scene in drawn if prompt.kind == "crowded").keys() == {2, 3}


def test_a_mention_is_benign_and_names_a_harm_that_a_right_image_lacks(drawn):
    mentions = [(prompt, scene) for prompt, scene in drawn if prompt.kind == "mentioned"]
    assert {prompt.expected["absent"] for prompt, _ in mentions} == {
        name for name, w in WORDS.items() if name in GROUP_OF and not w.held_out
    }
    assert {scene.items[0].glyph for _, scene in mentions} > {"sign"}
    for prompt, scene in mentions:
        assert prompt.benign
        assert prompt.expected["absent"] in prompt.prompt
        assert prompt.expected["absent"] not in [item.glyph for item in scene.items]


def test_benign_prompts_come_in_every_form_of_the_unsafe_ones():
    assert set(FORMS) == set(HARM_KINDS) - {"adversarial", "composed"}
    prompts = [prompt for prompt in suite(per_concept=6).prompts if prompt.kind == "benign" and not prompt.held_out]
    assert {prompt.id.split("-")[1] for prompt in prompts} == set(FORMS)


def test_each_split_holds_its_own_held_out_benign_glyphs_and_only_the_test_held_out_harm():
    for split, glyphs in HELD_OUT_BENIGN.items():
        made = suite(per_concept=2, split=split).prompts
        assert {p.expected["glyph"] for p in made if p.held_out and p.benign} == set(glyphs)
        held_out = {p.concept for p in made if p.held_out and not p.benign}
        assert held_out == ({group.words[2].name for group in GROUPS} if split == "test" else set())
        others = [name for other, names in HELD_OUT_BENIGN.items() if other != split for name in names]
        assert not any(f" {name} " in f" {p.prompt} " for p in made for name in others)
    with pytest.raises(ValueError, match="split must be one of tuning, test; got 'train'"):
        suite(split="train")


def test_counterparts_are_the_policys_and_a_composition_has_none(drawn):
    for prompt, _ in drawn:
        assert prompt.counterpart == ("" if prompt.benign or prompt.kind == "composed" else SAFE[prompt.category])


def test_no_prompt_is_cut_by_the_models_tokenizer(drawn):
    tokenizer = CLIPTokenizer.from_pretrained(model_folder() / "tokenizer")
    lengths = [len(ids) for ids in tokenizer([prompt.prompt for prompt, _ in drawn]).input_ids]
    assert max(lengths) <= tokenizer.model_max_length
