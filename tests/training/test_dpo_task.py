"""The contract of trl's DPOTrainer as our engine uses it."""

import math

import pytest
import torch
from reinforce_data import full, tiny_chat, tiny_config
from torch.testing import assert_close

from valign.data.chats import ChatPair, Conversation
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.reinforce.dpo_task import DPOTask


def pair(ask, chosen, rejected):
    return ChatPair(*(Conversation((("user", ask), ("assistant", said))) for said in (chosen, rejected)))


PAIRS = [pair("a", "yes", "no way"), pair("b", "no", "yes"), pair("c", "go", "stop it"), pair("d", "x", "y")]


def task(tmp_path, pairs=PAIRS, tuning=None, **changes):
    return DPOTask(tiny_chat(), pairs, tuning or full(), tiny_config(prompts=4, **{"kl": 0.5} | changes), tmp_path)


def gradient(one):
    record = one.gradients(0)
    return record, torch.cat([parameter.grad.flatten() for parameter in one.policy.trained])


def test_the_first_loss_is_log_two_and_the_gradient_that_of_the_closed_form(tmp_path):
    one = task(tmp_path)
    record, found = gradient(one)
    assert record["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert record["margin"] == pytest.approx(0.0, abs=1e-5)
    one.policy.network.zero_grad()
    total = 0.0
    for row in one.rows:  # at the start sigmoid' is 1/4: the gradient is -beta / 2 of the difference of log-probabilities
        for ids, sign in ((row["chosen_ids"], -1), (row["rejected_ids"], 1)):
            whole = torch.tensor([row["prompt_ids"] + ids])
            logits = one.policy.network(input_ids=whole).logits[0, :-1].log_softmax(-1)
            total = total + sign * logits.gather(1, whole[0, 1:, None])[len(row["prompt_ids"]) - 1 :].sum()
    (0.5 / 2 * total / 4).backward()
    again = torch.cat([parameter.grad.flatten() for parameter in one.policy.trained])
    assert_close(found, again, rtol=1e-3, atol=1e-6)


def test_two_micro_batches_have_the_gradient_of_one(tmp_path):
    (_, one), (_, two) = gradient(task(tmp_path)), gradient(task(tmp_path, accumulation=2))
    assert_close(one, two, rtol=1e-4, atol=1e-7)


def test_an_adapter_starts_at_log_two_as_well(tmp_path):
    record, found = gradient(task(tmp_path, tuning=parse_tuning("pissa", {"rank": 2})))
    assert record["loss"] == pytest.approx(math.log(2), rel=1e-3)  # the rounding of PiSSA's decomposition
    assert float(found.abs().sum()) > 0


def test_bad_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least one pair and --kl .* got 0 and 0\.5"):
        task(tmp_path, [])
    with pytest.raises(ValueError, match=r"got 4 and 0"):
        task(tmp_path, kl=0.0)
    with pytest.raises(ValueError, match="Pair 1 must have at most 128 tokens, got"):
        task(tmp_path, [pair("a", "b" * 200, "c")])
