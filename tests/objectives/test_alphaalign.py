import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.data.chats.reward_prompts import RewardPrompt
from valign.objectives.rewards import REWARDS
from valign.objectives.rewards.alphaalign import (
    TEMPLATE,
    VerifiableSafety,
    final_answer,
    follows_format,
    is_refusal,
    normalized_helpfulness,
    prompted,
)

GOOD = "<safety_reasoning>\nI cannot see harm.\n</safety_reasoning>\n<answer>Boil it.</answer>"


@pytest.mark.parametrize(
    ("harmful", "refused", "follows", "reward"),
    [
        (True, True, True, 1.5), (True, True, False, 1.0), (True, False, True, 0.5), (True, False, False, 0.0),
        (False, True, True, -0.5), (False, True, False, -1.0), (False, False, True, 0.5), (False, False, False, 0.0),
    ],
)  # fmt: skip
def test_the_table_of_the_safety_reward(harmful, refused, follows, reward):  # the card's invariant 1 with r_a = 1, r_f = 0.5
    found = VerifiableSafety()(*(torch.tensor([one]) for one in (follows, refused, harmful)))
    assert found.tolist() == [reward]


def test_the_format_needs_the_order_and_reads_across_lines():
    assert follows_format(GOOD)
    assert follows_format(GOOD.replace("<answer>", "<answer><answer>"))  # nested tags
    assert not follows_format("<answer>a</answer><safety_reasoning>b</safety_reasoning>")
    assert not follows_format("Boil it.")


def test_the_answer_is_the_last_one_unboxed_and_the_whole_output_without_tags():
    assert final_answer(GOOD) == "Boil it."
    assert final_answer("<answer>a</answer> <answer>\\boxed{Sorry, I can't comply}</answer>") == "Sorry, I can't comply"
    assert final_answer("<answer><answer>b</answer>") == "b"
    assert final_answer("no tags") == "no tags"


def test_a_refusal_is_told_by_its_beginning_alone():
    assert is_refusal("“I’m sorry”, no.")
    assert is_refusal("  SORRY, I CAN'T COMPLY")
    assert not is_refusal("You see, I am not a cook.")
    assert not is_refusal(final_answer(GOOD))  # "I cannot" in the reasoning is not a refusal
    with pytest.raises(ValueError, match="at least one beginning of a refusal, got none"):
        is_refusal("no", ())


scores = st.lists(st.floats(-10, 10, allow_subnormal=False).map(lambda x: round(x, 3)), min_size=2, max_size=8)


@given(scores, st.floats(-5, 5), st.floats(0.1, 10))
@example([-6.266, -6.266, -6.266], 0.0, 1.0)  # their mean rounds to another number
def test_helpfulness_is_invariant_to_shift_and_scale(raw, shift, scale):
    rows = torch.tensor([raw], dtype=torch.float64)
    refused = torch.zeros_like(rows, dtype=torch.bool)
    found = normalized_helpfulness(rows, refused)
    assert (found >= 0).all()
    assert (found > 0).any() == (rows.max() > rows.min())
    if float(rows.std()) > 1e-3:
        assert_close(normalized_helpfulness(rows * scale + shift, refused), found, rtol=1e-6, atol=1e-6)


def test_refusals_get_no_helpfulness_but_count_in_the_mean():
    raw = torch.tensor([[0.0, 1.0, 2.0, 5.0]])  # mean 2, sample standard deviation sqrt(14 / 3)
    found = normalized_helpfulness(raw, torch.tensor([[False, False, False, True]]))
    assert_close(found, torch.tensor([[0.0, 0.0, 0.0, 0.0]]))
    assert_close(
        normalized_helpfulness(raw, torch.tensor([[True, False, False, False]])),
        torch.tensor([[0.0, 0.0, 0.0, 3 / math.sqrt(14 / 3)]]),
    )


def test_two_ranks_that_gather_normalize_as_one_does_and_two_that_do_not_differ():
    raw, refused = torch.tensor([[0.0, 1.0, 2.0, 6.0]]), torch.zeros(1, 4, dtype=torch.bool)
    gathered = torch.cat([raw[:, :2], raw[:, 2:]], dim=1)
    assert_close(normalized_helpfulness(gathered, refused), normalized_helpfulness(raw, refused))
    apart = torch.cat([normalized_helpfulness(part, refused[:, :2]) for part in raw.split(2, dim=1)], dim=1)
    assert not torch.allclose(apart, normalized_helpfulness(raw, refused))


def test_bad_groups_and_scores_are_refused():
    none = torch.zeros(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match="A group must have at least 2 answers, got 1"):
        normalized_helpfulness(torch.zeros(1, 1), none[:, :1])
    with pytest.raises(ValueError, match="must be finite, got 1 that are not"):
        normalized_helpfulness(torch.tensor([[float("nan"), 1.0]]), none)
    with pytest.raises(ValueError, match=r"VerifiableSafety\.refusal must be in \(0, inf\)"):
        VerifiableSafety(refusal=0.0)


def test_the_template_needs_a_place_for_the_query():
    assert prompted("Why?", TEMPLATE).endswith("Question: Why?")
    with pytest.raises(ValueError, match=r"must hold \{query\}"):
        prompted("Why?", "Answer.")


def prompt(harmful, demonstration=None):
    return RewardPrompt((("user", "q"),), harmful, None, demonstration)


def test_the_table_of_rewards():
    outputs = ["I cannot.", GOOD]
    both = [prompt(True), prompt(False)]
    assert REWARDS["safety"](both, outputs).tolist() == [1.0, 0.5]
    assert REWARDS["refusal"](both, outputs).tolist() == [1.0, 0.0]
    assert REWARDS["format"](both, outputs).tolist() == [0.0, 1.0]
    assert_close(REWARDS["demonstration"]([prompt(None, "boil it. now")], [GOOD]), torch.tensor([0.8]))  # 2 * 2 / (2 + 3)
    with pytest.raises(ValueError, match="labelled harmful or not"):
        REWARDS["safety"]([prompt(None)], ["a"])
    with pytest.raises(ValueError, match="got 1 for 2"):
        REWARDS["refusal"](both, ["a"])
    with pytest.raises(ValueError, match="demonstration of every prompt"):
        REWARDS["demonstration"]([prompt(True)], ["a"])
