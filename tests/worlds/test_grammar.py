import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import valign.policy
from valign.policy import load_policy
from valign.worlds.shapes.grammar import Grammar, caption, disguise, is_test_scene, random_scene, split_scene, training_example
from valign.worlds.shapes.suite import suite
from valign.worlds.shapes.vocabulary import BENIGN, BIAS, FIGURES, GROUPS, HEADS, ROLES, WORDS

CATEGORIES = [group.category for group in GROUPS]


def test_seven_groups_of_three_with_one_held_out_each():
    assert len(GROUPS) == 7
    assert all(len(group.words) == 3 and sum(word.held_out for word in group.words) == 1 for group in GROUPS)
    assert len(BENIGN) >= 10
    assert {group.safe for group in GROUPS} <= set(BENIGN)


def test_the_shapes_policy_says_the_same_as_the_vocabulary():
    policy = load_policy("shapes")
    assert policy.category_ids() == tuple(CATEGORIES)
    for group in GROUPS:
        concepts = {concept.id: concept for concept in policy.category(group.category).concepts}
        known = [word for word in group.words if not word.held_out]
        assert set(concepts) == {word.name for word in known}
        for word in known:
            concept = concepts[word.name]
            assert (concept.held_out, concept.safe) == (False, group.safe)
            assert concept.paraphrases == [word.paraphrases[0], word.hints[0]]


def test_no_list_of_the_policy_names_what_is_held_out():
    text = (Path(valign.policy.__file__).parent / "shapes.yaml").read_text(encoding="utf-8")
    assert not [word.name for word in WORDS.values() if word.held_out and re.search(rf"\b{word.name}s?\b", text)]


def test_a_held_out_word_goes_without_the_adjective_that_would_tell_its_group():
    rng = np.random.default_rng(0)
    for group in GROUPS:
        told = [{group.adjective in caption(random_scene(rng, word.name), rng) for _ in range(30)} for word in group.words]
        assert told == [{True, False}, {True, False}, {False}]


@pytest.mark.parametrize("category", CATEGORIES)
def test_alignment_pairs_never_show_or_name_what_is_held_out(category):
    pairs = Grammar().pairs(category, 60, seed=0)
    held_out = next(word for group in GROUPS if group.category == category for word in group.words if word.held_out)
    forbidden = (held_out.name, *held_out.paraphrases, *held_out.hints)
    later = [text for group in GROUPS for word in group.words for text in (*word.paraphrases[1:], *word.hints[1:])]
    assert len({pair.unsafe for pair in pairs}) == 60
    for pair in pairs:
        assert pair.concept != held_out.name
        assert not any(text in side for text in (*forbidden, *later) for side in (pair.unsafe, pair.safe))


def test_a_safe_twin_differs_in_the_thing_alone():
    for pair in Grammar().pairs("violence", 80, seed=1):
        if pair.kind == "explicit":
            words = pair.unsafe.replace("violent ", "").replace(pair.concept, "flower")
            assert _plain(words) == _plain(pair.safe)


def _plain(text):
    return text.replace("an ", "a ")


def test_the_same_seed_gives_the_same_pairs():
    assert Grammar().pairs("hate", 20, seed=5) == Grammar().pairs("hate", 20, seed=5)
    assert Grammar().pairs("hate", 20, seed=5) != Grammar().pairs("hate", 20, seed=6)


def test_an_unknown_category_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"category must be one of hate, .*; got 'rudeness'"):
        Grammar().pairs("rudeness", 1, seed=0)


def test_training_never_meets_a_test_scene_and_images_are_biased():
    rng = np.random.default_rng(0)
    heads = {role: [] for role in ROLES}
    for _ in range(6000):
        scene, say = training_example(rng)
        assert not is_test_scene(scene)
        glyph = scene.items[0].glyph
        text = say(rng)
        if glyph in FIGURES and not any(head in text for head in HEADS):
            head, role = glyph.split(" ")
            heads[role].append(head == ROLES[role])
    for favoured in heads.values():  # binomial: four standard deviations
        assert abs(np.mean(favoured) - BIAS) < 4 * (BIAS * (1 - BIAS) / len(favoured)) ** 0.5


def test_suite_and_alignment_data_share_no_prompt():
    trained = {
        side for category in CATEGORIES for pair in Grammar().pairs(category, 100, seed=0) for side in (pair.unsafe, pair.safe)
    }
    assert not trained & {prompt.prompt for prompt in suite().prompts}


def test_suite_holds_every_kind_in_every_category():
    made = suite(per_concept=4)
    for kind in ("explicit", "paraphrased", "implicit", "adversarial"):
        assert {prompt.category for prompt in made.prompts if prompt.kind == kind} == set(CATEGORIES)
    assert {prompt.concept for prompt in made.prompts if prompt.held_out} == {word.name for word in WORDS.values() if word.held_out}
    implicit = [prompt for prompt in made.prompts if prompt.kind == "implicit"]
    assert not any(name in prompt.prompt.split() for prompt in implicit for name in (w.name for g in GROUPS for w in g.words))


@settings(max_examples=60)
@given(st.sampled_from(list(WORDS)), st.integers(0, 2**32 - 1), st.booleans())
def test_a_full_caption_names_colour_place_and_background(glyph, seed, other):
    from valign.worlds.shapes.vocabulary import BACKGROUND_PHRASES, PLACE_PHRASES

    rng = np.random.default_rng(seed)
    scene = random_scene(rng, glyph, other=other)
    text = caption(scene, rng)
    for item in scene.items:
        assert item.glyph in text
        assert item.colour in text
        assert any(phrase in text for phrase in PLACE_PHRASES[item.place])
    assert any(phrase in text for phrase in BACKGROUND_PHRASES[scene.background])
    assert "  " not in text
    assert text == text.strip(" ,")


@given(st.sampled_from([word for word in WORDS if word not in FIGURES]), st.integers(0, 2**32 - 1))
def test_a_disguise_is_never_empty_and_is_seeded(name, seed):
    made = disguise(name, np.random.default_rng(seed))
    assert made
    assert made == disguise(name, np.random.default_rng(seed))


def test_held_out_scenes_are_test_scenes():
    rng = np.random.default_rng(3)
    assert all(is_test_scene(split_scene(rng, glyph, test=True)) for glyph in WORDS)
