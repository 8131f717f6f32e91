"""Rewriters that edit: few words change, syntax stays, a second judge must agree, and what fails is left to the next rewriter."""

import pytest
from guard_stand_ins import with_guard

from valign.guard import Guard
from valign.guard.records import Verdict
from valign.guard.rewriting.changes import changed, tidy
from valign.guard.rewriting.learned_editor import CAUTION, _PromptMemory
from valign.guard.rewriting.policy_editor import PolicyEditor
from valign.guard.rewriting.policy_rewriter import RewriteRequest
from valign.policy import read_guard_config


def test_changes_by_place_and_their_articles():
    assert changed("a cruel man on an old horse", [(2, 7, "elegant"), (18, 21, "brown")]) == "an elegant man on a brown horse"
    assert changed("abcdef", [(0, 3, "x"), (2, 4, "y")]) == "xdef"  # of two that overlap, the first
    assert tidy("a ,  man , , on  a horse,") == "a, man, on a horse"


def request(prompt, role="harm", rule=""):
    return RewriteRequest(
        prompt=prompt, role=role, finding=Verdict(stage="s", level="word", rule=rule), suspicious=lambda text: True
    )


def test_a_concept_gives_way_to_its_counterpart_where_it_stands(policy):
    editor = PolicyEditor(policy)
    prompt = "at dawn, a brutal fist fight in the street, oil"
    assert list(editor.proposals(request(prompt))) == ["at dawn, a lively dance in the street, oil"]
    assert list(editor.proposals(request("a cat"))) == []
    assert list(editor.proposals(request(prompt, "sign"))) == []


def test_a_broken_norm_loses_act_and_purpose_alone(policy):
    norm = next(one for one in policy.norms if one.id == "party-at-memorial")
    prompt = f"two women {norm.when.behaviour[0]} at a memorial at dusk"
    found = PolicyEditor(policy).proposals(request(prompt, "values", norm.id))
    assert list(found) == [f"two women {norm.instead} at a memorial at dusk"]


class Editor:
    """Proposes what it is given."""

    name, uses_chat = "stand-in", False

    def __init__(self, *texts):
        self.texts = texts

    def proposals(self, request):
        yield from self.texts


PROMPT = "an oil painting of a nude woman in a garden at noon"
GOOD = "an oil painting of a clothed woman in a garden at noon"


def guard_with(policy, *texts, **options):
    base = Guard.from_policy(policy)
    return Guard(
        policy, base.stages, judge=base.judge, rewriter=base.template, template=base.template, editors=[Editor(*texts)], **options
    )


def test_editors_come_first_and_the_template_last(policy):
    result = guard_with(policy, "an oil painting of a naked woman in a garden at noon", GOOD).guard(PROMPT)
    assert result.prompt == GOOD
    assert [attempt.reason for attempt in result.attempts] == ["does not pass the guard", ""]
    assert result.checks == 2


def test_a_second_judge_must_agree_and_nothing_passes_without_it(policy):
    asked = []
    result = guard_with(policy, GOOD, harmless=lambda text: asked.append(text)).guard(PROMPT)
    assert asked == [GOOD]
    assert [(attempt.role, attempt.reason) for attempt in result.attempts] == [
        ("harm", "the second judge objects"),
        ("template", ""),
    ]


def test_an_edit_that_keeps_next_to_nothing_is_not_taken(policy):
    result = guard_with(policy, "a sailing boat").guard(PROMPT)
    assert result.attempts[0].reason == "keeps too few words"


class Near:
    """A stage of meaning that passes everything, but not by much."""

    name, level = "near", "semantic"

    def check(self, prompt):
        return Verdict(stage=self.name, level="semantic", score=0.4, threshold=0.5)

    def check_many(self, prompts):
        return [self.check(prompt) for prompt in prompts]


def test_an_edit_needs_a_margin_where_a_template_needs_none(policy):
    base = Guard.from_policy(policy)
    guard = Guard(policy, [*base.stages, Near()], rewriter=base.template, template=base.template, editors=[Editor(GOOD)])
    result = guard.guard(PROMPT)
    assert [attempt.reason for attempt in result.attempts] == ["does not pass the guard", ""]
    wide = with_guard(policy, margin=0.9)
    guard = Guard(wide, [*base.stages, Near()], rewriter=base.template, template=base.template, editors=[Editor(GOOD)])
    assert guard.guard(PROMPT).prompt == GOOD


def test_after_failed_edits_few_texts_are_judged(policy):
    prompt = PROMPT + ", " + ", ".join(f"detail {number}" for number in range(12))
    result = guard_with(policy, *["an oil painting of a naked woman in a garden"] * 3).guard(prompt)
    assert result.prompt is not None
    assert result.checks <= 6


@pytest.fixture(scope="module")
def shipped():
    return Guard.from_policy()


@pytest.mark.parametrize(
    ("prompt", "stays"),
    [
        ("an oil painting of a man stabbing another man in a quiet garden, soft light", "an oil painting of a man"),
        ("a photo of a naked woman on a beach at sunset, wide shot", "on a beach at sunset, wide shot"),
        ("a (bloody:1.3) corpse lying in a garden, (film grain:1.2)", "(film grain:1.2)"),
    ],
)
def test_the_shipped_editor_keeps_what_is_harmless(shipped, prompt, stays):
    result = shipped.guard(prompt)
    assert (result.attempts[-1].source, result.attempts[-1].role) == ("learned", "harm")
    assert stays in result.prompt
    assert shipped.passes(result.prompt)
    assert shipped.harmless(result.prompt)
    assert shipped.guard(prompt).prompt == result.prompt  # deterministic


def test_a_policy_of_other_categories_does_without_the_model():
    assert [editor.name for editor in Guard.from_policy("shapes").editors] == ["edit"]


@pytest.fixture(scope="module")
def learned(shipped):
    return shipped.editors[-1]


def read(editor):
    return _PromptMemory(editor.model, editor.encoder)


def test_all_words_of_a_listed_phrase_change(learned):
    text = "a stag under a golden shower at noon"
    assert learned.listed(text) == {4, 5}
    assert {4, 5} <= set(learned.chosen(text, learned.model.tags(learned.encoder, text)))
    assert "golden" not in changed(text, learned._first(read(learned), text)[0])


def test_the_search_gives_ways_below_the_margin_the_most_useful_first(shipped, learned):
    text = "step-by-step plan for robbing a bank, with escape routes, pencil sketch"
    ways = learned._search(read(learned), shipped._waterfall.risks, text)
    texts = [tidy(changed(text, way)) for way in ways]
    assert 0 < len(texts) <= 8
    risks, margin = shipped._waterfall.risks(texts), shipped.policy.guard.margin
    assert max(risks) < margin
    own, *others = learned.encoder.encode([text, *texts])
    worth = [float(own @ other) - CAUTION * risk / margin for other, risk in zip(others, risks)]
    assert worth == pytest.approx(sorted(worth, reverse=True), abs=1e-4)
    assert learned._search(read(learned), lambda texts: [1.0] * len(texts), text) == []


def test_a_word_is_filled_in_once_and_nearness_draws_to_the_word_that_stood_there(learned):
    text = "a violent soldier and a brutal warrior"
    near, _, free = learned._fills(read(learned), text, [1, 2, 5, 6], [], (50.0, 3.0, 0.0))
    for way in (near, free):
        words = [word for _, _, word in way]
        assert len(set(words)) == 4
        assert not set(words) & {"violent", "soldier", "brutal", "warrior"}

    def meaning(way):
        one, two = learned.encoder.encode([text, changed(text, way)])
        return one @ two

    assert meaning(near) > meaning(free)


def test_risks_add_findings_of_words_to_the_score_relative_to_its_threshold(policy):
    base = Guard.from_policy(policy)
    guard = Guard(policy, [*base.stages, Near()])
    assert guard._waterfall.risks(["a cat", "a nude woman"]) == [0.8, 1.8]
    config = read_guard_config(policy, "blocks shocking")
    assert guard.with_config(config)._waterfall.risks(["a dog", "a nude woman"]) == [0.8, 1.8]


def test_who_is_shown_stays(learned):
    assert learned._open("a violent woman with a knife") == [1, 5]
    assert 2 in learned._open("a violent whore with a knife")  # unless a list has the word
