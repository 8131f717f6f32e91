"""Labelled prompts: rows of files in the policy's categories, certainty, repeats, caps."""

import pytest

from valign.checks import UserError
from valign.data.prompts.labelled import capped, policy_rows, read_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt
from valign.policy import load_policy


@pytest.fixture(scope="module")
def policy():
    return load_policy("default")


def row(number, prompt, label, source="toy", pair=""):
    return LabelledPrompt(f"{source}:{number}", prompt, label, (), source, pair or f"{source}:{number}", pair)


def test_rows_of_files(tmp_path, policy):
    (tmp_path / "one.jsonl").write_text(
        '{"id": "a", "prompt": "a furious lamp", "label": 1, "category": "Violence--Weapons; nonsense", "pair_id": "7"}\n'
        '{"id": "b", "prompt": "a quiet lamp", "label": 0, "category": "Violence", "pair_id": "7"}\n'
        '{"id": "c", "prompt": "a logo", "label": 1, "category": "Copyright_Infringement--LOGO"}\n'
    )
    unsafe, safe = read_rows([tmp_path], policy)
    assert (unsafe.categories, unsafe.pair, unsafe.source) == (("violence",), "one:7", "one")
    assert (safe.categories, safe.fold) == ((), unsafe.fold)
    (tmp_path / "two.jsonl").write_text('{"prompt": "a lamp", "label": "maybe"}\n')
    with pytest.raises(UserError, match="row 1: label must be 0"):
        read_rows([tmp_path / "two.jsonl"], policy)


@pytest.mark.parametrize(
    ("columns", "certainty"),
    [
        ("", 1.0),
        (', "certainty": 0.3', 0.3),
        (', "votes": 5, "image_unsafe_votes": 1, "text_unsafe_votes": 4', 0.8),
        (', "votes": 5, "image_unsafe_votes": 0, "text_unsafe_votes": null', 0.0),
        (', "inappropriate_percentage": 37.5', 0.375),
        (', "votes": 12', 1.0),  # votes about something else
    ],
)
def test_certainty_is_the_share_of_judges_or_images(tmp_path, policy, columns, certainty):
    rows = [f'{{"prompt": "a {label} lamp", "label": {label}{columns}}}' for label in (1, 0)]
    (tmp_path / "one.jsonl").write_text("\n".join(rows))
    assert [one.certainty for one in read_rows([tmp_path], policy)] == [certainty, 1.0]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ('"certainty": 1.5', r"must be in \[0, 1\], got 1\.5"),
        ('"votes": "five", "image_unsafe_votes": 1', "row 1: votes must be a number, got .five."),
    ],
)
def test_refuses_a_certainty_that_is_no_share(tmp_path, policy, columns, says):
    (tmp_path / "one.jsonl").write_text(f'{{"prompt": "a lamp", "label": 1, {columns}}}')
    with pytest.raises(UserError, match=says):
        read_rows([tmp_path], policy)


def test_repeats_and_contradictions_are_left_out():
    rows = [row(0, "A lamp", 0), row(1, "a  lamp", 0), row(2, "a boat", 0), row(3, "a boat", 1)]
    assert [one.id for one in without_repeats(rows)] == ["toy:0"]


def test_a_cap_keeps_pairs_whole():
    rows = [row(2 * i + side, f"lamp {i}", side, pair=f"p{i}") for i in range(32) for side in (0, 1)]
    kept = capped(rows, 5, seed=1)
    assert len(kept) == 10
    assert {one.pair for one in kept if one.label} == {one.pair for one in kept if not one.label}


def test_a_cap_follows_the_weight_of_a_source():
    rows = [row(i, str(i), 0) for i in range(20)] + [row(i, f"t{i}", 0, source="traffic") for i in range(20)]
    kept = capped(rows, 5, seed=0, factors={"traffic": 2.0})
    assert [sum(one.source == name for one in kept) for name in ("toy", "traffic")] == [5, 10]


def test_policy_rows_leave_held_out_concepts_alone(policy):
    held_out = {concept.name for category in policy.categories for concept in category.concepts if concept.held_out}
    prompts = " ".join(one.prompt for one in policy_rows(policy))
    assert held_out
    assert not any(name in prompts for name in held_out)
