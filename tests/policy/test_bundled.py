"""The policies that come with the package."""

import pytest

from valign.policy import CATEGORY_IDS, load_policy
from valign.worlds.chat.vocabulary import TOPICS, Pair


@pytest.mark.parametrize("name", ["default", "shapes", "german"])
def test_bundled_policy_has_the_seven_categories(name):
    policy = load_policy(name)
    assert (policy.id, policy.category_ids()) == (name, CATEGORY_IDS)
    for category in policy.categories:
        assert category.concepts[0].safe != category.concepts[0].name
        assert any(concept.held_out for concept in category.concepts) == (name != "shapes")  # its world holds out, unnamed here
        assert not all(concept.held_out for concept in category.concepts)


def test_chat_names_every_act_of_the_chat_worlds_topics():
    policy = load_policy("chat")
    assert (policy.id, policy.category_ids()) == ("chat", CATEGORY_IDS)
    for topic in TOPICS:
        assert [concept.id for concept in policy.category(topic.category).concepts] == [act.verb for act in topic.acts]
        terms = {term for concept in policy.category(topic.category).concepts for term in concept.terms}
        assert terms == {Pair(act.verb, thing).words for act in topic.acts for thing in topic.things}


def test_default_policy_is_complete():
    policy = load_policy("default")
    assert all(8 <= len(category.concepts) <= 12 for category in policy.categories)
    assert (len(policy.norms), len(policy.guidelines)) == (12, 62)
    assert {rewriter.id for rewriter in policy.rewriters} == {"harm", "values", "sign"}
    assert policy.principles
    assert policy.safe_styles


def test_minors_are_only_named_where_they_are_protected():
    policy = load_policy("default")
    (rule,) = policy.always_block
    protected, _ = rule.every
    words = {
        word.strip(".,").lower()
        for concept in policy.category("sexual").concepts
        for text in (concept.name, *concept.paraphrases, *concept.terms)
        for word in text.split()
    }
    assert not words & set(protected)


def test_german_adds_words_and_a_block_rule_of_its_own():
    german, default = load_policy("german"), load_policy("default")
    assert german.category_ids() == default.category_ids()
    assert all(category.terms for category in german.categories)
    assert [rule.id for rule in german.always_block] == ["minors-sexual", "minors-sexual-german"]
    assert {norm.id for norm in german.norms} > {norm.id for norm in default.norms}
