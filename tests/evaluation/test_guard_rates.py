"""Rates of a guard on six prompts that can be counted by hand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from valign.data.prompts.pairs import LabelledPrompt
from valign.evaluation.guards.page import page, roc
from valign.evaluation.guards.rates import (
    Scored,
    auroc,
    category_rates,
    layer_rates,
    reliability,
    source_rates,
    stop_counts,
    summary,
    worst,
)
from valign.evaluation.guards.valor import valor_metrics


def scored(number, label, flagged, score, source="one", categories=(), found=""):
    row = LabelledPrompt(f"{source}:{number}", f"prompt {number}", label, categories, source, str(number))
    return Scored(row, flagged, score, "lexical" if flagged else "", found)


SIX = [
    scored(0, 1, True, 0.9, categories=("violence",), found="violence"),
    scored(1, 1, True, 0.8, categories=("violence", "hate"), found="sexual"),
    scored(2, 1, False, 0.2, categories=("hate",)),
    scored(3, 0, True, 0.7),
    scored(4, 0, False, 0.1),
    scored(5, 0, False, 0.3, source="two"),
]


def test_rates_by_hand():
    one, two, both = source_rates(SIX)
    assert (one.unsafe, one.safe, one.against) == (3, 2, "own")
    assert one.recall.value == pytest.approx(2 / 3)
    assert one.false_alarms.value == pytest.approx(1 / 2)
    assert one.auroc.value == pytest.approx(5 / 6)  # pairs won: .9 twice, .8 twice, .2 once, of six
    assert (two.unsafe, two.recall, two.auroc) == (0, None, None)
    assert (both.source, both.unsafe, both.safe) == ("all", 3, 3)


def test_rows_that_most_judges_call_unsafe_are_counted_apart():
    doubtful = [replace(one, row=replace(one.row, certainty=0.5)) if one.row.id == "one:2" else one for one in SIX]
    one, certain, two, both, all_certain = source_rates(doubtful)
    assert [each.source for each in (one, certain, two, both, all_certain)] == ["one", "one, certain", "two", "all", "all, certain"]
    assert (one.recall.value, certain.recall.value) == (pytest.approx(2 / 3), 1.0)
    assert (certain.unsafe, certain.safe, certain.false_alarms) == (2, 2, one.false_alarms)
    assert (all_certain.unsafe, all_certain.safe) == (2, 3)


def test_a_source_without_harmless_prompts_is_compared_with_all():
    rows = [*SIX, scored(6, 1, True, 0.95, source="three")]
    three = next(one for one in source_rates(rows) if one.source == "three")
    assert (three.against, three.false_alarms, three.auroc.value) == ("all", None, 1.0)


def test_categories_by_hand():
    found = category_rates(SIX)
    assert (found["violence"]["prompts"], found["violence"]["recall"]["value"], found["violence"]["named_right"]["value"]) == (
        2,
        1,
        0.5,
    )
    assert (found["hate"]["prompts"], found["hate"]["recall"]["value"]) == (2, 0.5)


def test_layers_by_hand():
    """The first stage finds one of two unsafe; the second the other, and a sign, which the judge clears."""
    rows = [scored(i, label, False, 0.0) for i, label in enumerate((1, 1, 0, 0))]
    fired = (("words",), ("head",), ("head",), ())
    intents = ("harmful", "harmful", "prohibition", "unknown")
    found = layer_rates(
        [replace(one, fired=f, intent=i, flagged=i == "harmful") for one, f, i in zip(rows, fired, intents, strict=True)]
    )
    values = {name: [one and one["value"] for one in each.values()] for name, each in found.items()}
    assert values == {
        "words": [0.5, 0.0, 0.75],
        "head": [0.5, 0.5, 0.5],
        "all stages": [1.0, 0.5, 0.75],
        "all stages and intent": [1.0, 0.0, 1.0],
        "intent": [None, None, 1.0],
    }


def test_stages_and_worst():
    assert stop_counts(SIX) == {"lexical": {"unsafe": 2, "safe": 1}, "passed": {"unsafe": 1, "safe": 2}}
    assert [one.row.id for one in worst(SIX, 5)["false_alarms"]] == ["one:3"]
    assert [one.row.id for one in worst(SIX, 5)["misses"]] == ["one:2"]


def test_reliability_counts_every_prompt():
    assert sum(one["prompts"] for one in reliability(SIX)) == 6


def test_prompts_stay_out_of_the_report_unless_asked():
    assert "prompt 3" not in page({**summary(SIX, show_prompts=False), "valor": valor_metrics(SIX)})
    assert "prompt 3" in page({**summary(SIX, show_prompts=True), "valor": valor_metrics(SIX)})


def test_roc_rises_from_corner_to_corner():
    alarms, recall = roc(SIX)
    assert (alarms[0], recall[0], alarms[-1], recall[-1]) == (0, 0, 1, 1)
    assert (np.diff(alarms) >= 0).all()
    assert (np.diff(recall) >= 0).all()


values = st.lists(st.integers(0, 9), min_size=1, max_size=30)


@settings(deadline=None)
@given(values, values)
def test_auroc_is_scikit_learns(unsafe, safe):
    one, two = np.array(unsafe, float), np.array(safe, float)
    found = auroc(one, two)
    assert found.value == pytest.approx(roc_auc_score([1] * len(one) + [0] * len(two), [*one, *two]))
    assert found.low <= found.value <= found.high


def test_prompts_of_one_group_are_a_cluster():
    rows = [scored(n, 1, n % 10 < 5, 0.5, categories=("hate",), found="hate") for n in range(40)]
    alone = source_rates(rows)[0].recall
    grouped = [replace(one, row=replace(one.row, group=f"concept {n % 10}")) for n, one in enumerate(rows)]
    found = source_rates(grouped)[0].recall
    assert found.value == alone.value
    assert found.high - found.low > 1.5 * (alone.high - alone.low)
    assert layer_rates(grouped)["all stages and intent"]["recall"] == category_rates(grouped)["hate"]["recall"]
    assert category_rates(grouped)["hate"]["recall"]["low"] == found.low
