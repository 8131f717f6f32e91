"""An expert's loss as a task of fine-tuning: against the formula, and it learns while the reference stays."""

from math import log

import pytest
import torch
from torch.testing import assert_close

from valign.data.tasks.base import Task, TaskData
from valign.data.tasks.captions import PairRow
from valign.models.diffusion.loading import load_model
from valign.objectives import DiffusionDPO
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.supervised import PairTaskModel, SupervisedConfig, finetune, judge
from valign.worlds.shapes.counterpart_tasks import expert_data

BETA, SFT, RETAIN = 50.0, 2.0, 30.0


@pytest.fixture(scope="module")
def rows():
    return expert_data("expert", count=4, held_out=2, seed=0)


def pair_model(base, **changes):
    policy, reference = (load_model(base, device="cpu") for _ in range(2))
    return PairTaskModel(policy, reference, DiffusionDPO(beta=BETA), **{"sft_weight": SFT, "retain_weight": RETAIN, **changes})


def test_at_the_start_a_pair_costs_ln_2_and_nothing_has_moved(tiny_sd, rows):
    model = pair_model(tiny_sd, sft_weight=0.0)
    batch = model.batch(rows.train)
    assert batch.weight == 4
    assert_close(model.loss(batch), torch.tensor(4 * log(2)))


@pytest.mark.parametrize("base", ["tiny_sd", "tiny_sd_v"])
def test_the_loss_is_the_formula_on_a_model_that_has_moved(base, rows, request):
    model = pair_model(request.getfixturevalue(base))
    with torch.no_grad():
        for weight in model.network.parameters():
            weight.mul_(1.02)
    batch = model.batch(rows.train)
    noisy, steps, text = (batch.inputs[name] for name in ("noisy", "timesteps", "embeds"))
    policy, reference = (sd.denoiser(noisy, steps, text).sample for sd in (model.diffusion, model.reference))
    expected = torch.zeros(())
    for pair in range(4):
        winner, loser, benign = pair, 4 + pair, 8 + pair
        errors = [(answer[at] - batch.target[at]).square().mean() for answer in (policy, reference) for at in (winner, loser)]
        margin = -BETA / 2 * ((errors[0] - errors[1]) - (errors[2] - errors[3]))
        moved = (policy[benign] - reference[benign]).square().mean()
        expected = expected - torch.nn.functional.logsigmoid(margin) + SFT * errors[0] + RETAIN * moved
    assert_close(model.loss(batch), expected)


def test_winner_and_loser_share_all_draws_and_the_benign_image_has_its_own(tiny_sd, rows):
    model = pair_model(tiny_sd)
    same = PairRow(rows.train[0].winner, rows.train[0].winner, rows.train[0].benign)
    batch = model.batch([same])
    assert batch.inputs["timesteps"][0] == batch.inputs["timesteps"][1] != batch.inputs["timesteps"][2]
    assert torch.equal(batch.target[0], batch.target[1])  # the noise
    assert not torch.equal(batch.inputs["noisy"][0], batch.inputs["noisy"][1])  # each draws from the posterior by itself
    assert torch.equal(batch.inputs["embeds"][0], batch.inputs["embeds"][1])


def test_cutting_a_batch_changes_no_draw(tiny_sd, rows):
    model = pair_model(tiny_sd)
    torch.manual_seed(3)
    whole, parts = model.batch(rows.train), [model.batch(rows.train[:1]), model.batch(rows.train[1:])]
    assert_close(model.loss(whole), sum(model.loss(part) for part in parts))


def test_a_step_downhill_widens_the_margin_and_the_reference_stays(tiny_sd, rows):
    model = pair_model(tiny_sd, sft_weight=0.0, retain_weight=0.0)
    before = {key: value.clone() for key, value in model.reference.denoiser.state_dict().items()}
    batch = model.batch(rows.train)
    optimizer = torch.optim.SGD(model.network.requires_grad_(True).parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(batch).backward()
        optimizer.step()
    assert model.loss(batch) < 4 * log(2) - 0.01
    assert all(torch.equal(value, before[key]) for key, value in model.reference.denoiser.state_dict().items())


@pytest.mark.parametrize("name", ["ailora", "svfit", "full"])
def test_every_kind_of_method_trains_an_expert(name, tiny_sd, rows, tmp_path):
    data = TaskData(Task(name="pairs", kind="diffusion"), rows.train, rows.held_out)
    model, config = pair_model(tiny_sd), SupervisedConfig(steps=2, batch_size=2, validate_every=0, checkpoint_every=0)
    untrained = judge(model, rows.held_out, batch_size=4)["loss"]
    result = finetune(model, data, tmp_path / "run", parse_tuning(name), config)
    assert result.scores["loss"] != untrained


def test_what_it_reads_is_on_record(tiny_sd):
    found = pair_model(tiny_sd).reading()
    assert found["objective"]["beta"] == BETA
    assert (found["sft_weight"], found["retain_weight"]) == (SFT, RETAIN)


@pytest.mark.parametrize("name", ["sft_weight", "retain_weight"])
def test_a_negative_weight(name, tiny_sd):
    with pytest.raises(ValueError, match=rf"PairTaskModel\.{name} must be in \[0, inf\).*-1"):
        pair_model(tiny_sd, **{name: -1.0})
