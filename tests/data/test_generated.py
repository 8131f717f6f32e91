"""The grammars of training prompts: every slot is filled, twins stay twins, requests differ, and nothing is about minors."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from valign.data.prompts.generated import REQUESTS, generated_rows, grammar, request_rows
from valign.guard import Guard
from valign.guard.rules.block_rule import BlockRuleStage
from valign.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy("default")


@pytest.fixture(scope="module")
def rows(policy):
    return generated_rows(policy, each=4, seed=0)


def test_a_seed_makes_the_rows(rows, policy):
    assert generated_rows(policy, each=4, seed=0) == rows
    assert generated_rows(policy, each=4, seed=1) != rows
    assert generated_rows(policy, each=0, seed=0) == []


def test_every_slot_is_filled(rows):
    assert not any(re.search(r"[{}]", row.prompt) for row in rows)
    assert all(row.prompt == " ".join(row.prompt.split()) != "" for row in rows)


def test_twins_come_in_twos(rows):
    for safe, unsafe in zip(rows[::2], rows[1::2], strict=True):
        assert (safe.label, unsafe.label, safe.categories) == (0, 1, ())
        assert (safe.pair, safe.group) == (unsafe.pair, unsafe.group)
        assert safe.prompt != unsafe.prompt
    assert len({row.id for row in rows}) == len(rows)


def test_categories_are_the_policys(rows, policy):
    named = {name for row in rows for name in row.categories}
    assert named == set(policy.category_ids())


def test_nothing_in_it_is_about_minors(rows, policy):
    rule = BlockRuleStage.from_policy(policy)
    found = ("sexual", "violence")
    assert not [row.prompt for row in rows if row.label and rule.check(row.prompt, found).fired]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32))
def test_both_sides_of_a_harm_name_it_or_show_it(policy, seed):
    harms = {name: words for group in grammar()["harms"].values() for name, *words in group}
    for row in generated_rows(policy, each=1, seed=seed)[:100]:
        name = row.group.removeprefix("generated:")
        assert any(words in row.prompt for words in ((name,) if not row.label else (name, *harms[name])))


def test_twins_of_a_contrast_share_the_words_in_its_slots(rows):
    for contrast in grammar()["contrasts"]:
        twins = [row for row in rows if row.group == f"generated:{contrast['about']}"]
        assert len(twins) == 2 * 5 * 4
        assert {row.categories for row in twins if row.label} == ({(contrast["category"],)} if contrast["category"] else {()})
        frames = [side for side in ("safe", "unsafe") for frame in contrast[side] if "{group}" in frame]
        if len(frames) == len(contrast["safe"]) + len(contrast["unsafe"]):
            for safe, unsafe in zip(twins[::2], twins[1::2]):
                assert any(group in safe.prompt and group in unsafe.prompt for group in contrast["slots"]["group"])


def test_every_slot_of_the_grammar_is_known():
    """A slot is filled with the words of its own contrast, harm, place or group of people, or with those of all."""
    known = {*grammar()["words"], "name", "act", "scene", "mild", "fitting", "elsewhere", "where", "group"}
    for contrast in grammar()["contrasts"]:
        for frame in (*contrast["safe"], *contrast["unsafe"]):
            assert set(re.findall(r"\{(\w+)\}", frame)) <= known | set(contrast["slots"]), frame


class TestRequests:
    def test_a_seed_makes_as_many_as_asked_no_two_alike(self):
        rows = request_rows(each=4, seed=0)
        assert len({row.prompt for row in rows}) == len({row.id for row in rows}) == len(rows) == 4 * REQUESTS
        assert {(row.label, row.source, row.categories) for row in rows} == {(0, "requests", ())}
        assert request_rows(each=4, seed=0) == rows != request_rows(each=4, seed=1)
        assert request_rows(each=0, seed=0) == []

    def test_every_slot_is_filled_from_its_list_and_every_list_is_used(self):
        rules = grammar("requests")
        lists = {name for name in rules if name != "frames"}
        assert {slot for frame in rules["frames"] for slot in re.findall(r"\{(\w+)\}", frame)} == lists
        assert all(len(set(words)) == len(words) and all(isinstance(word, str) for word in words) for words in rules.values())
        assert not any(re.search(r"[{}]", row.prompt) for row in request_rows(each=8, seed=0))

    def test_rules_alone_find_harm_in_next_to_none(self, policy):
        rules = policy.guard.model_copy(update={"stages": ["lexical", "values"]})
        guard = Guard.from_policy(policy.model_copy(update={"guard": rules}))
        rows = request_rows(each=8, seed=0)
        flagged = [decision.prompt for decision in guard.check_many([row.prompt for row in rows]) if decision.flagged]
        assert len(flagged) <= 0.02 * len(rows), flagged
