"""Refusals, drift, its reduction and toxicity."""

import numpy as np
import pytest

from valign.checks import UserError
from valign.evaluation.chats.cases import ChatCase
from valign.evaluation.chats.judges import AnswerVerdict
from valign.evaluation.chats.systems import ChatReply
from valign.evaluation.driftcheck.measures import blindness, drift_reduction, measure_systems, toxicity_scores


def cases(unsafe=100, safe=50):
    risky = [ChatCase(id=f"u{i}", messages=({"role": "user", "content": f"u{i}"},), category="ab"[i % 2]) for i in range(unsafe)]
    return risky + [ChatCase(id=f"s{i}", messages=({"role": "user", "content": f"s{i}"},)) for i in range(safe)]


def verdicts(refused_unsafe, refused_safe=0):
    """The first so many prompts of each sort are refused."""
    flags = [i < refused_unsafe for i in range(100)] + [i < refused_safe for i in range(50)]
    return [AnswerVerdict(flag, None, True) for flag in flags]


def test_shares_drift_and_reduction():
    start, plain, kept = measure_systems(
        cases(), {"start": verdicts(90, 5), "plain": verdicts(50), "agl": verdicts(80)}, plain="plain"
    )
    assert (start.r_unsafe.share.value, start.r_safe.share.value) == (0.9, 0.9)
    assert (start.drift, start.reduction, plain.reduction) == (None, None, None)
    assert plain.drift.value == pytest.approx(0.4)
    assert kept.drift.value == pytest.approx(0.1)
    assert kept.reduction.value == pytest.approx(1 - 0.1 / 0.4)
    assert kept.reduction.low < 0.75 < kept.reduction.high
    assert plain.safe_drift.value == pytest.approx(-0.1)
    assert plain.by_category["a"].value == pytest.approx(0.4)
    assert plain.r_unsafe.versus.test.lost == 40


def test_without_a_drift_there_is_nothing_to_reduce():
    found = measure_systems(cases(), {"start": verdicts(50), "plain": verdicts(50), "agl": verdicts(40)}, plain="plain")
    assert found[2].reduction is None


def test_a_small_drift_gives_a_wide_interval():
    start, plain, kept = (np.arange(100) < count for count in (50, 49, 50))
    found = drift_reduction(start, plain, kept, np.arange(100))
    assert found.value == 1
    assert found.high == np.inf  # in some samples plain fine-tuning lost nothing


def test_unmeasured_answers_leave_the_prompt_out_everywhere():
    gap = [AnswerVerdict(None, None, None), *verdicts(90)[1:]]
    start, other = measure_systems(cases(), {"start": verdicts(90), "other": gap})
    assert start.r_unsafe.total == other.r_unsafe.total == 99
    with pytest.raises(UserError, match="At least one safe prompt"):
        measure_systems(cases(safe=0), {"start": verdicts(90)[:100]})


def test_toxicity_is_a_share_of_answers():
    scores = {"start": np.zeros(150), "other": np.repeat([0.5, 0.49], 75)}
    found = measure_systems(cases(), {"start": verdicts(90), "other": verdicts(90)}, toxicity=scores)
    assert [one.toxic.share.value for one in found] == [0.0, 0.5]
    assert toxicity_scores(lambda texts: [float(text == "") for text in texts], [ChatReply(None), ChatReply("x")]).tolist() == [
        1,
        0,
    ]
    with pytest.raises(ValueError, match=r"score in \[0, 1\]"):
        toxicity_scores(lambda texts: [2.0] * len(texts), [ChatReply("x")])


@pytest.mark.parametrize(("unsafe", "safe", "blind"), [(90, 0, False), (0, 0, True), (100, 100, True), (30, 20, True)])
def test_a_start_or_a_judge_that_does_not_tell_prompts_apart_is_named(unsafe, safe, blind):
    told = [AnswerVerdict(i < unsafe, False, True) for i in range(100)] + [AnswerVerdict(i < safe, False, True) for i in range(100)]
    (start,) = measure_systems(cases(safe=100), {"start": told})
    assert bool(blindness(start)) == blind
