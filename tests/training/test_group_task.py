"""The contract of trl's GRPOTrainer as our engine uses it, and of the methods that it runs."""

import json
from pathlib import Path

import pytest
import torch
from reinforce_data import PROMPTS, first_letter, full, tiny_chat, tiny_config
from torch.testing import assert_close

from valign.objectives.rewards.groups import standardized
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.tasks.reinforce.alphaalign import AlphaAlignMethod
from valign.training.tasks.reinforce.group_task import GroupTask
from valign.training.tasks.reinforce.plain import PlainMethod


def task(tmp_path, method=None, prompts=PROMPTS, **changes):
    config = tiny_config(**changes)
    return GroupTask(tiny_chat(), prompts, method or PlainMethod(first_letter), full(), config, start_processes(cpu=True), tmp_path)


def gradient(task, step=0):
    record = task.gradients(step)
    found = torch.cat([parameter.grad.flatten() for parameter in task.policy.trained])
    return record, found


def test_at_the_first_step_nothing_diverges_and_the_gradient_is_that_of_the_advantages(tmp_path):
    one = task(tmp_path)
    record, found = gradient(one)
    assert record["kl"] == pytest.approx(0.0, abs=1e-7)
    assert record["clipped"] == 0.0  # every ratio is 1
    assert record["loss"] == pytest.approx(0.0, abs=1e-5)  # minus the mean advantage
    batch = one.trainer._buffered_inputs[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    one.policy.network.zero_grad()
    logits = one.policy.network(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    tokens = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0][:, -batch["completion_ids"].shape[1] :]
    wanted = batch["completion_mask"]
    loss = -((tokens * wanted).sum(1) / wanted.sum(1) * batch["advantages"]).mean()
    loss.backward()
    again = torch.cat([parameter.grad.flatten() for parameter in one.policy.trained])
    assert_close(found, again, rtol=1e-3, atol=1e-6)


def test_four_micro_batches_have_the_gradient_of_one(tmp_path):
    (_, one), (_, four) = gradient(task(tmp_path)), gradient(task(tmp_path, accumulation=4))
    assert_close(one, four, rtol=1e-4, atol=1e-7)


def test_weights_change_and_a_killed_run_resumes_to_the_same_bytes(tmp_path):
    whole, first = task(tmp_path / "a"), task(tmp_path / "b", steps=2)
    accelerator = start_processes(cpu=True)
    TrainingLoop(whole, accelerator, out=tmp_path / "a").run()
    assert whole.policy.moved()
    first.loop = first.loop.__class__(**{**vars(first.loop), "steps": 1})
    TrainingLoop(first, accelerator, out=tmp_path / "b").run()
    second = task(tmp_path / "b")
    TrainingLoop(second, accelerator, out=tmp_path / "b").run()
    for name, tensor in whole.tensors().items():
        assert torch.equal(tensor, second.tensors()[name]), name
    lines = [[json.loads(line) for line in Path(tmp_path / run / "metrics.jsonl").read_text().splitlines()] for run in "ab"]
    assert lines[0] == lines[1]


def test_rewards_are_standardized_as_the_closed_form_says(tmp_path):
    one = task(tmp_path)
    one.gradients(0)
    batch = one.trainer._buffered_inputs[0]
    wanted = standardized(one.trainer.scores[:, 0], 4)
    assert_close(batch["advantages"].sort().values, wanted.sort().values, rtol=1e-4, atol=1e-5)


class Fixed:
    """Scores by place in the step."""

    def __init__(self, values):
        self.values, self.asked = values, []

    def __call__(self, prompts, outputs):
        self.asked += [prompt.query for prompt in prompts]
        return torch.tensor([self.values[place % len(self.values)] for place in range(len(prompts))])


def test_helpfulness_is_asked_of_benign_prompts_alone_and_normalized_in_the_group(tmp_path):
    helpful = Fixed([0.0, 1.0, 2.0, 5.0])
    one = task(tmp_path, AlphaAlignMethod(helpful, template="Q: {query}"), PROMPTS[:2])  # one harmful, one benign
    one.gradients(0)
    asked = set(helpful.asked)
    places = [place for place, _ in one.visits.at(0)]
    assert asked == {PROMPTS[place].query for place in places if not PROMPTS[place].harmful}
    for group, place in enumerate(places):
        scores = one.trainer.scores[4 * group : 4 * group + 4]
        if PROMPTS[place].harmful:
            assert (scores[:, 1] == 0).all()
        else:  # mean 2, sample standard deviation sqrt(14 / 3); random models do not refuse
            assert_close(scores[:, 1], torch.tensor([0.0, 0.0, 0.0, 3 / (14 / 3) ** 0.5]))
    assert one.chats[0][-1]["content"] == "Q: say ash"


def test_a_reward_that_is_not_finite_stops_the_training_and_names_the_prompt(tmp_path):
    with pytest.raises(ValueError, match=r"The reward score must be finite, got nan for an answer to 'say .*' \(4 of 8 answers\)"):
        task(tmp_path, PlainMethod(Fixed([0.0, float("nan")]))).gradients(0)
    with pytest.raises(ValueError, match=r"must be one number per answer, got \(1,\) for 8 answers"):
        task(tmp_path, PlainMethod(lambda prompts, outputs: torch.zeros(1))).gradients(0)


def test_bad_data_and_options_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"ReinforceConfig\.group must be in \[2, inf\), got 1"):
        tiny_config(group=1)
    with pytest.raises(ValueError, match="accumulation must divide the 8 answers of a step, got 3"):
        tiny_config(accumulation=3)
    unlabelled = [PROMPTS[0].__class__(PROMPTS[0].turns)]
    with pytest.raises(ValueError, match="alphaalign must have harmful for every prompt, got none in row 1"):
        task(tmp_path, AlphaAlignMethod(None), unlabelled)
    with pytest.raises(ValueError, match="must leave room for 120 tokens"):
        task(tmp_path, answer_tokens=120)
    with pytest.raises(ValueError, match="at least one prompt, got 0"):
        task(tmp_path, prompts=[])
