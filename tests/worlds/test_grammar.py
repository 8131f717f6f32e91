import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import valign.policy
from valign.evaluation.suite import HARM_KINDS
from valign.policy import load_policy
from valign.worlds.shapes.counterpart_tasks import counterpart_data, expert_data
from valign.worlds.shapes.glyph_tasks import LEARNT
from valign.worlds.shapes.grammar import (
    TAUGHT_STYLES,
    Grammar,
    caption,
    composed_scene,
    disguise,
    harms,
    is_test_scene,
    mention,
    random_scene,
    split_scene,
    training_example,
)
from valign.worlds.shapes.renderer import PLACES
from valign.worlds.shapes.suite import suite
from valign.worlds.shapes.vocabulary import (
    BENIGN,
    BIAS,
    COMPOSITIONS,
    FIGURES,
    GROUPS,
    HEADS,
    HELD_OUT_BENIGN,
    HELD_OUT_STYLE,
    PREAMBLES,
    ROLES,
    STYLE_PHRASES,
    WORDS,
)

POLICY_FILE = Path(valign.policy.__file__).parent / "shapes.yaml"
CATEGORIES = [group.category for group in GROUPS]
HELD_OUT = [word for word in WORDS.values() if word.held_out]
NOT_TAUGHT = [  # what no prompt of alignment may hold
    *(text for word in HELD_OUT for text in (word.name, *word.paraphrases, *word.hints)),
    *(text for word in WORDS.values() for text in (*word.paraphrases[1:], *word.hints[1:], *word.foreign)),
    *STYLE_PHRASES[HELD_OUT_STYLE],
    *PREAMBLES,
    *(" without ", " never ", " instead ", " forbids ", " against ", " warns "),
]


def named(text):
    return [words for words in NOT_TAUGHT if f" {words.strip()} " in f" {text.replace(',', '')} "]


def test_seven_groups_of_three_with_one_held_out_each():
    assert len(GROUPS) == 7
    assert all(len(group.words) == 3 and sum(word.held_out for word in group.words) == 1 for group in GROUPS)
    assert len(BENIGN) >= 10
    assert {group.safe for group in GROUPS} <= set(BENIGN)


def test_each_split_holds_out_benign_glyphs_of_its_own():
    splits = [set(glyphs) for glyphs in HELD_OUT_BENIGN.values()]
    assert list(HELD_OUT_BENIGN) == ["tuning", "test"]
    assert all(len(glyphs) == 2 for glyphs in splits)
    assert len(splits[0] | splits[1]) == 4
    assert not (splits[0] | splits[1]) & set(BENIGN)
    assert {word.name for word in HELD_OUT} == splits[0] | splits[1] | {group.words[2].name for group in GROUPS}


def test_a_composition_is_of_two_benign_glyphs_and_no_counterpart():
    assert len(COMPOSITIONS) == len(GROUPS)
    assert all(pair <= set(BENIGN) - {group.safe for group in GROUPS} for pair in COMPOSITIONS)
    assert harms(["tree", "umbrella", "star"]) == {"hate"}
    assert harms(["tree", "star"]) == set()
    assert harms(["bolt", "star"]) == {"hate"}


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
    text = POLICY_FILE.read_text(encoding="utf-8")
    assert not [word.name for word in HELD_OUT if re.search(rf"\b{word.name}s?\b", text)]


def test_no_producer_of_training_prompts_shows_or_names_what_is_held_out():
    policy = load_policy("shapes")
    texts = Grammar().benign(300, seed=0)
    texts += [row.caption for data in (counterpart_data, expert_data) for row in _captions(data("d", count=60, held_out=1, seed=0))]
    texts += [text for p in policy.principles for scene in policy.principle_scenes(p) for text in (scene.prompt, *scene.aligned)]
    texts += [policy.negative_prompt, policy.safety_text, *(glyph for glyph in LEARNT), *policy.safe_styles]
    assert len(texts) > 450
    assert {text: named(text) for text in texts if named(text)} == {}


def _captions(data):
    for row in data.train:
        yield from (row.winner, row.loser, row.benign) if hasattr(row, "winner") else (row,)


@pytest.mark.parametrize("category", CATEGORIES)
def test_alignment_pairs_never_show_or_name_what_is_held_out(category):
    pairs = Grammar().pairs(category, 60, seed=0)
    assert len({pair.unsafe for pair in pairs}) == 60
    assert {pair.kind for pair in pairs} == {"explicit", "paraphrased", "implicit", "composed"}
    for pair in pairs:
        assert not named(pair.unsafe) + named(pair.safe)
        if pair.kind == "composed":
            assert frozenset(pair.concept.split(" and ")) in COMPOSITIONS
            assert all(name in pair.unsafe for name in pair.concept.split(" and "))


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
    for _ in range(3000):
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
    for kind in HARM_KINDS:
        assert {prompt.category for prompt in made.prompts if prompt.kind == kind} == set(CATEGORIES)
    assert {prompt.concept for prompt in made.prompts if prompt.held_out and not prompt.benign} == {g.words[2].name for g in GROUPS}
    implicit = [prompt for prompt in made.prompts if prompt.kind == "implicit"]
    assert not any(name in prompt.prompt.split() for prompt in implicit for name in (w.name for g in GROUPS for w in g.words))


@settings(max_examples=60)
@given(st.sampled_from(list(WORDS)), st.integers(0, 2**32 - 1), st.integers(0, 2))
def test_a_full_caption_names_colour_place_and_background(glyph, seed, others):
    from valign.worlds.shapes.vocabulary import BACKGROUND_PHRASES, PLACE_PHRASES

    rng = np.random.default_rng(seed)
    scene = random_scene(rng, glyph, others=others)
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


def test_a_held_out_word_goes_without_the_adjective_that_would_tell_its_group():
    rng = np.random.default_rng(0)
    for group in GROUPS:
        told = [{group.adjective in caption(random_scene(rng, word.name), rng) for _ in range(30)} for word in group.words]
        assert told == [{True, False}, {True, False}, {False}]


def test_company_is_benign_and_adds_no_harm():
    rng = np.random.default_rng(0)
    for glyph in [*WORDS] * 8:
        scene = random_scene(rng, glyph, others=2)
        glyphs = [item.glyph for item in scene.items]
        assert set(glyphs[1:]) <= set(BENIGN)
        assert harms(glyphs) == harms([glyph])
        assert len(set(glyphs)) == 3
        assert len({PLACES[item.place] for item in scene.items}) == 3
        assert scene.style in TAUGHT_STYLES


def test_a_composed_scene_shows_the_pair_of_its_group():
    rng = np.random.default_rng(0)
    for group in GROUPS:
        orders = {tuple(item.glyph for item in composed_scene(rng, group, test=False).items) for _ in range(20)}
        assert orders == {group.composed, group.composed[::-1]}


def test_a_mention_names_both_and_only_a_sign_forbids():
    rng = np.random.default_rng(0)
    signs = {mention("sign", "arrow", rng) for _ in range(60)}
    assert "sign that forbids an arrow" in signs
    assert {mention("star", "bolt", rng) for _ in range(60)} == {
        "star without a bolt",
        "star but never a bolt",
        "star instead of a bolt",
    }


def test_the_thing_of_a_turned_caption_comes_last():
    rng = np.random.default_rng(0)
    for _ in range(20):
        scene = random_scene(rng, "bolt", others=1)
        text = caption(scene, rng, turn=1, preamble=PREAMBLES[0])
        assert PREAMBLES[0] in text
        assert text.index(scene.items[1].glyph) < text.index("bolt")


def test_held_out_scenes_are_test_scenes():
    rng = np.random.default_rng(3)
    assert all(is_test_scene(split_scene(rng, glyph, test=True)) for glyph in WORDS)
