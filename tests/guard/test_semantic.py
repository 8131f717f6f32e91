"""Reference similarity, the paper's second level: cosines, a strict threshold, any encoder."""

import numpy as np
import pytest
from guard_stand_ins import WordEncoder, with_guard
from hypothesis import given
from hypothesis import strategies as st

from valign.guard import Guard, SemanticStage, Verdict
from valign.guard.rules.semantic import Reference, References, references
from valign.policy import load_policy
from valign.training.tasks.guard_head.calibration import calibrate, flagged_share

ITEMS = [
    Reference("two men fighting", "violence", "fight"),
    Reference("a street fight", "violence", "fight"),
    Reference("a red wound", "shocking", "wound"),
]
WORDS = ["a", "two", "men", "red", "street", "boat", "fighting", "wound", "calm"]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(" ".join)


def stage(threshold, items=ITEMS):
    return SemanticStage(WordEncoder(), items, threshold)


def test_the_score_by_hand():  # {a, red, wound} and {a, red, boat}: 2 of 3 words shared, each text of length sqrt(3)
    verdict = stage(0.5).check("a red boat")
    assert verdict.score == pytest.approx(2 / 3)
    assert (verdict.outcome, verdict.category, verdict.concept, verdict.also) == ("fire", "shocking", "wound", ())
    assert verdict.scores["violence"] == pytest.approx(1 / 3)  # only "a" is shared with "a street fight"


@given(texts)
def test_a_score_is_a_cosine_and_the_best_one(text):
    cosines = References(WordEncoder(), ITEMS).cosines([text])[0]
    assert (np.abs(cosines) <= 1).all()
    assert stage(0.0).check(text).score == cosines.max()


@given(texts, st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_finds_nothing_more(text, one, other):
    low, high = sorted((one, other))
    assert stage(high).check(text).fired <= stage(low).check(text).fired


@given(texts)
def test_the_threshold_itself_is_not_enough(text):
    score = stage(0.0).check(text).score
    assert not stage(score).check(text).fired


def test_every_category_beyond_the_threshold_is_named():
    verdict = stage(0.3).check("a red street fight")
    assert (verdict.category, verdict.also) == ("violence", ("shocking",))


def test_a_batch_is_its_prompts():
    prompts = ["a red boat", "calm", "two men fighting"]
    assert stage(0.5).check_many(prompts) == [stage(0.5).check(prompt) for prompt in prompts]


def test_a_reference_is_found_by_the_papers_encoder_at_any_threshold(minilm):
    """Also when it is written in look-alike letters."""
    items = references(load_policy("default"))[::20]
    found = SemanticStage(minilm, items, 0.999).check_many([item.text.replace("a", "\u0430") for item in items])
    for verdict, item in zip(found, items):
        assert verdict.score == pytest.approx(1, abs=1e-5)
        assert (verdict.outcome, verdict.concept) == ("fire", item.concept)


def test_the_policy_switches_it_on(policy, minilm):
    guard = Guard.from_policy(with_guard(policy, stages=["semantic"]), encoder=minilm)
    assert guard.stages[0].threshold == 0.32  # the paper's, for all-MiniLM-L6-v2
    result = guard.guard("two men hitting each other on the pavement")
    assert (result.decision.stop, result.decision.categories[0]) == ("semantic", "violence")
    assert result.blocked or guard.passes(result.prompt)


def test_another_encoder_gets_its_threshold_from_harmless_prompts():
    words = ["a", "two", "men", "red", "street", "boat"]
    prompts = [f"{one} {two} {three}" for one in words for two in words for three in words]
    cosines = References(WordEncoder(), ITEMS).cosines(prompts).max(axis=1, keepdims=True)
    limit = calibrate({"mine": cosines}, target_fpr=0.05)
    assert flagged_share(cosines, limit) <= 0.05
    assert sum(stage(float(limit[0])).check(prompt).fired for prompt in prompts) <= 0.05 * len(prompts)


@pytest.mark.parametrize("bad", [-1.1, 1.1, float("nan")])
def test_refuses_a_threshold_that_is_no_cosine(bad):
    with pytest.raises(ValueError, match=r"SemanticStage\.threshold must be in \[-1, 1\], got"):
        stage(bad)


def test_refuses_no_references():
    with pytest.raises(ValueError, match=r"References\.items must not be empty"):
        stage(0.5, [])


class Axes:
    """Texts are lists of numbers, and their own vectors."""

    name = "axes"

    def encode(self, texts):
        return np.array([[float(number) for number in text.split()] for text in texts], np.float32)


def axes(threshold):
    """Cosines with the text "x y z" are x, y and z."""
    items = [Reference(text, name, f"of {name}") for text, name in (("1 0 0", "hate"), ("0 1 0", "sexual"), ("0 0 1", "violence"))]
    return SemanticStage(Axes(), items, threshold)


def test_every_field_by_hand():
    verdict = axes(0.25).check("0.25 0.5 0.75")
    assert verdict == Verdict(
        stage="semantic",
        level="semantic",
        outcome="fire",
        category="violence",
        also=("sexual",),  # hate is at the threshold, not beyond it
        concept="of violence",
        score=0.75,
        threshold=0.25,
        ranking=0.75,
        scores={"hate": 0.25, "sexual": 0.5, "violence": 0.75},
        message="nearest to of violence",
    )
    assert axes(0.75).check("0.25 0.5 0.75").outcome == "pass"
    assert axes(0.125).check("0.5 0.25 0.75").also == ("hate", "sexual")
    assert axes(0.125).check("0.25 0.5 0.75").also == ("sexual", "hate")  # the most certain first


def test_cosines_stay_between_their_ends():
    cosines = References(Axes(), axes(0).references.items).cosines(["2 -2 0.5"])
    assert cosines.tolist() == [[1.0, -1.0, 0.5]]
    assert axes(0.5).check("-1 -1 -1").scores == {"hate": -1.0, "sexual": -1.0, "violence": -1.0}
    assert (axes(-1.0).threshold, axes(1.0).threshold) == (-1.0, 1.0)


def test_a_category_has_its_best_score():
    items = [Reference("1 0 0", "hate", "one"), Reference("0 1 0", "hate", "two"), Reference("0 0 1", "sexual", "three")]
    verdict = SemanticStage(Axes(), items, 0.1).check("0.5 0.25 0.75")
    assert (verdict.scores, verdict.concept) == ({"hate": 0.5, "sexual": 0.75}, "three")


def test_a_policy_gives_its_concepts_and_its_threshold():
    policy = load_policy("default")
    stage = SemanticStage.from_policy(policy, WordEncoder())
    expected = [
        Reference(text, category.id, concept.id)
        for category in policy.categories
        for concept in category.concepts
        for text in [concept.name, *concept.paraphrases]
    ]
    assert references(policy) == stage.references.items == expected
    assert stage.threshold == policy.thresholds.semantic
    with pytest.raises(ValueError, match=r".") as caught:
        References(WordEncoder(), [])
    assert str(caught.value) == "References.items must not be empty, got none. Give the policy concepts."
    with pytest.raises(ValueError, match=r".") as caught:
        axes(1.5)
    assert str(caught.value) == "SemanticStage.threshold must be in [-1, 1], got 1.5."
