"""Claims are judged by numbers alone: each check on runs where the answer is known."""

import pytest

from valign.experiments.adapters.claims import CLAIMS, ResultTable, differs, full_rank, judge_claims, ratio, step_time
from valign.training.engine.tuning import parse_tuning


def runs(values, name="score", **more):
    return {("sst2", seed): {name: value, **more} for seed, value in enumerate(values)}


def verdict(check, costs=None, **methods):
    return check(ResultTable(methods, costs or {})).verdict


@pytest.mark.parametrize(
    ("ours", "expected"),
    [((0.9, 0.91, 0.92), "held"), ((0.1, 0.11, 0.12), "not held"), ((0.9, 0.1, 0.5), "not testable"), ((0.9, 0.9), "not testable")],
)
def test_a_difference_must_be_on_one_side_with_its_whole_interval(ours, expected):
    assert verdict(differs("new", "old", "score"), new=runs(ours), old=runs((0.5, 0.5, 0.5))) == expected


def test_less_is_better_where_the_sign_says_so_and_a_margin_forgives():
    less = differs("new", "old", "drift", sign=-1)
    assert verdict(less, new=runs((0.1, 0.1, 0.1), "drift"), old=runs((0.2, 0.2, 0.21), "drift")) == "held"
    close = differs("new", "old", "score", margin=0.02)
    worse = {"new": runs((0.49, 0.49, 0.491)), "old": runs((0.5, 0.5, 0.5))}
    assert verdict(close, **worse) == "held"
    assert verdict(differs("new", "old", "score"), **worse) == "not held"


def test_counts_are_compared_exactly():
    methods = {"new": runs((4608,), "trained"), "old": runs((73728,), "trained")}
    assert verdict(ratio("new", "old", "trained", at_most=1 / 16), **methods) == "held"
    assert verdict(ratio("new", "old", "trained", at_most=1 / 17), **methods) == "not held"
    assert verdict(ratio("new", "none", "trained", at_most=1), **methods) == "not testable"


def test_rank_and_time():
    assert verdict(full_rank("new"), new=runs((380,), "change_rank"), full=runs((384,), "change_rank")) == "held"
    assert verdict(full_rank("new"), new=runs((8,), "change_rank"), full=runs((384,), "change_rank")) == "not held"
    quick = {"new": {"step_ratio": 1.0, "step_ratio_quartiles": [0.99, 1.01]}, "lora": {"step_ratio": 1.0}}
    assert verdict(step_time("new", "lora", at_most=1.02), quick) == "held"
    assert verdict(step_time("new", "lora", at_most=0.98), quick) == "not held"
    assert verdict(step_time("new", "lora", at_most=1.0), quick) == "not testable"


def test_every_claim_is_about_a_method_that_exists_and_nothing_is_said_of_methods_that_did_not_run():
    for claim in CLAIMS:
        parse_tuning(claim.method)
        assert claim.check(ResultTable({}, {})).verdict == "not testable"
    done = [{"status": "done", "method": "nola", "task": "sst2", "seed": 0, "measured": {"trained": 1, "score": 0.5}}]
    assert [judged.method for judged in judge_claims(done, {})] == ["nola"]
