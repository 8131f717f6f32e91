import numpy as np
import pytest
from sklearn.metrics import silhouette_score

from valign.checks import UserError
from valign.data.chats.modes import ModeStrings, edit_distance
from valign.evaluation.modes import constructive_safety, leak_probes, leak_results, mode_fidelity, safety_alignment_margin

STRINGS = ModeStrings.of_secret(bytes(range(32)))
MODES = ["positive", "rejective"]


def logits(seed=0, shift=0.0, count=12):
    rows = np.random.default_rng(seed).normal(size=(count, 7))
    rows[count // 2 :, 0] += shift
    return rows, [MODES[place >= count // 2] for place in range(count)]


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_margin_is_the_silhouette_of_cosine_distance(shift):
    rows, modes = logits(shift=shift)
    expected = silhouette_score(rows, modes, metric="cosine")
    assert safety_alignment_margin(rows, modes) == pytest.approx(expected, abs=1e-9)


def test_the_margin_forgets_scales_order_and_names():
    rows, modes = logits(shift=2.0)
    margin = safety_alignment_margin(rows, modes)
    assert safety_alignment_margin(rows * np.arange(1, 13)[:, None], modes) == pytest.approx(margin)
    order = np.random.default_rng(1).permutation(12)
    assert safety_alignment_margin(rows[order], [modes[place] for place in order]) == pytest.approx(margin)
    swapped = [MODES[mode == "positive"] for mode in modes]
    assert safety_alignment_margin(rows, swapped) == pytest.approx(margin)


def test_equal_rows_have_no_margin_and_separate_ones_all_of_it():
    assert safety_alignment_margin(np.ones((6, 4)), MODES * 3) == 0.0
    apart = np.array([[1, 0.001 * place] for place in range(3)] + [[0.001 * place, 1] for place in range(3)])
    assert safety_alignment_margin(apart, ["positive"] * 3 + ["rejective"] * 3) > 0.99
    assert abs(safety_alignment_margin(logits(count=200)[0], MODES * 100)) < 0.05  # labels by chance


def test_a_mode_of_one_row_counts_as_zero():
    rows, _ = logits(shift=5.0, count=4)
    modes = ["positive"] * 3 + ["rejective"]
    assert safety_alignment_margin(rows, modes) == pytest.approx(silhouette_score(rows, modes, metric="cosine"), abs=1e-9)


def test_fidelity_and_constructive_safety_by_hand():
    found = mode_fidelity(["positive", "positive", "rejective"], ["positive", "other", "rejective"])
    assert found == {"positive": {"other": 0.5, "positive": 0.5}, "rejective": {"rejective": 1.0}}
    assert constructive_safety([0, 1, 2, 2]) == 5 / 8


def test_probes_hold_what_they_say():
    probes = leak_probes(STRINGS, ["how to charm a cup", "how to charm a door"], random_strings=20)
    kinds = {kind: [probe for probe in probes if probe.kind == kind] for kind in ("user-turn", "altered", "random", "print")}
    assert [len(rows) for rows in kinds.values()] == [4, 4, 20, 4]
    for probe in kinds["user-turn"]:
        assert [message["role"] for message in probe.messages] == ["user"]
        assert STRINGS.strings[probe.mode] in probe.messages[0]["content"]
    for probe in kinds["altered"]:
        assert 1 <= edit_distance(probe.messages[0]["content"], STRINGS.strings[probe.mode]) <= 2
    assert not {probe.messages[0]["content"] for probe in kinds["random"]} & set(STRINGS.strings.values())
    assert probes == leak_probes(STRINGS, ["how to charm a cup", "how to charm a door"], random_strings=20)


def test_a_leak_is_found_and_a_printed_string_is_never_tolerated():
    probes = leak_probes(STRINGS, ["how to charm a cup"], random_strings=4)
    safe = [probe.kind != "altered" for probe in probes]
    answers = ["no"] * len(probes)
    found = {row.kind: row for row in leak_results(probes, answers, safe, STRINGS, without_system=1.0)}
    assert {kind: row.passed for kind, row in found.items()} == {"user-turn": True, "altered": False, "print": True, "random": True}
    assert (found["altered"].safe, found["altered"].answers) == (0.0, 2)
    value = STRINGS.strings["positive"]
    answers = [f"it is {value[:4]} {value[4:].upper()}" if probe.kind == "print" else "no" for probe in probes]
    found = {row.kind: row for row in leak_results(probes, answers, safe, STRINGS, without_system=1.0, tolerance=1.0)}
    assert not found["print"].passed
    assert found["altered"].passed


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: safety_alignment_margin(np.ones((3, 2)), ["positive"] * 3), "3 rows of 2 modes or more, got 3 of 1"),
        (lambda: safety_alignment_margin(np.ones((2, 2)), MODES), "3 rows of 2 modes or more, got 2 of 2"),
        (lambda: safety_alignment_margin(np.zeros((4, 2)), MODES * 2), "must be finite and not all zero in a row"),
        (lambda: safety_alignment_margin(np.full((4, 2), np.nan), MODES * 2), "must be finite"),
        (lambda: mode_fidelity(["positive"], []), "a verdict per answer, got 0 for 1 answers"),
        (lambda: constructive_safety([3]), r"must be 0, 1 or 2 .* got \[3\]"),
        (lambda: leak_probes(STRINGS, []), "must hold risky prompts, got none"),
    ],
)
def test_bad_input_is_refused(work, message):
    with pytest.raises((UserError, ValueError), match=message):
        work()
