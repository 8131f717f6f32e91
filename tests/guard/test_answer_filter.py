import pytest

from valign.guard.answer_filter import REFUSAL, AnswerFilter, SeverityVerdict, severity_of_cost


def judge(question, answer, image=None):
    """The level is the answer's first word; of a question, its last."""
    level = question.split()[-1] if answer is None else answer.split()[0]
    return SeverityVerdict(level if level in ("safe", "minor", "moderate", "severe") else "safe", "violence")


def samples(*texts):
    asked = []

    def generate(number, warning):
        asked.append((number, warning))
        return texts[number]

    return generate, asked


def test_a_safe_first_answer_is_generated_once():
    generate, asked = samples("safe one")
    found = AnswerFilter(judge=judge)("how?", generate)
    assert (found.text, found.action, len(asked)) == ("safe one", "answered", 1)


def test_an_answer_that_is_never_safe_is_refused_after_five_rounds():
    generate, asked = samples(*["severe x"] * 9)
    found = AnswerFilter(judge=judge)("how?", generate)
    assert (found.text, found.action, len(asked)) == (REFUSAL, "refused", 5)
    assert [verdict.level for verdict in found.verdicts] == ["severe"] * 5


def test_levels_up_to_the_allowed_one_pass_and_a_warning_names_the_category():
    generate, asked = samples("severe x", "moderate y", "minor z")
    found = AnswerFilter(judge=judge, allowed="minor", warned=True)("how?", generate)
    assert (found.text, found.action) == ("minor z", "regenerated")
    assert asked[0] == (0, "")
    assert "violence" in asked[1][1]


def test_a_severe_question_is_blocked_before_anything_is_generated():
    generate, asked = samples()
    found = AnswerFilter(judge=judge)("do it severe", generate)
    assert (found.text, found.action, asked, found.verdicts) == (REFUSAL, "blocked", [], ())
    assert AnswerFilter(judge=judge)("do it minor", samples("safe")[0]).action == "answered"


def test_a_judge_that_fails_lets_nothing_through():
    def broken(question, answer, image=None):
        if answer is None:
            return SeverityVerdict("safe")
        raise RuntimeError("no memory")

    found = AnswerFilter(judge=broken, rounds=2)("how?", samples("a", "b")[0])
    assert found.action == "refused"
    assert found.verdicts[0].reason == "the judge failed: RuntimeError: no memory"
    assert AnswerFilter(judge=lambda *_: None)("how?", samples()[0]).action == "blocked"


def test_costs_become_levels_and_bad_options_are_refused():
    assert [severity_of_cost(cost) for cost in (-1.0, 0.0, 0.5, 1.5, 9.0, float("nan"))] == [
        "safe", "safe", "minor", "moderate", "severe", "severe",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"AnswerFilter\.rounds must be in \[1"):
        AnswerFilter(judge=judge, rounds=0)
    with pytest.raises(ValueError, match=r"AnswerFilter\.block must be one of minor, moderate, severe"):
        AnswerFilter(judge=judge, block="safe")
