"""Training with a look-ahead on benign fine-tuning: exact where nothing moves, first order on demand, resumed to the byte."""

import json
from dataclasses import replace

import pytest
import torch
from dying import killed_at
from pair_data import small_config
from torch.testing import assert_close

from valign.checks import UserError
from valign.models.diffusion.lora import unload_adapters
from valign.models.files.adapter_files import open_adapter
from valign.objectives import DiffusionDPO
from valign.objectives.robust.look_ahead import LookAhead
from valign.training import train_preference
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.denoiser_adapter import DenoiserAdapter
from valign.training.tasks.preference.look_ahead import LookAheadTask
from valign.training.tasks.preference.pair_step import PairStep

OBJECTIVE = DiffusionDPO(beta=500.0)
SMALL = LookAhead(inner_steps=(2,), inner_rates=(1e-2,), inner_rows=3, inner_batch=2, inner_ranks=(2,))


def train(sd, cache, out, ahead, **changes):
    config = small_config(**{"steps": 2, "retain_weight": 5.0, **changes})
    return train_preference(sd, cache, cache.rows(), out, config, OBJECTIVE, look_ahead=ahead)


def factors(folder):
    return {f"{name}.{part}": getattr(lora, part) for name, lora in open_adapter(folder).items() for part in ("down", "up")}


def equal(left, right):
    return sorted(left) == sorted(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.fixture
def task(sd, cache, tmp_path):
    """Makes the task of a look-ahead, its adapter moved off zero; the model is given back bare."""
    config = small_config(retain_weight=0.0)
    trainable = DenoiserAdapter(sd, config)

    def made(ahead, **changes):
        own = replace(config, **changes)
        trainable.config = own
        trainable.attach()
        step = PairStep(sd, OBJECTIVE, own, start_processes(cpu=True), trainable.off)
        found = LookAheadTask(step, cache, cache.rows(), tmp_path, None, "test", trainable, look_ahead=ahead)
        draws = torch.Generator().manual_seed(0)
        for parameter in found.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=draws)
        return found

    yield made
    unload_adapters(sd)


def grads(task):
    record = task.gradients(0)
    found = torch.cat([parameter.grad.flatten() for parameter in task.parameters()])
    for parameter in task.parameters():
        parameter.grad = None
    return record, found


@pytest.fixture(scope="module")
def straight(sd, cache, tmp_path_factory):
    return train(sd, cache, tmp_path_factory.mktemp("ahead") / "run", SMALL, checkpoint_every=1)


def test_without_inner_steps_it_is_the_plain_objective_exactly(sd, cache, tmp_path):
    plain = train(sd, cache, tmp_path / "plain", None)
    still = train(sd, cache, tmp_path / "still", replace(SMALL, inner_steps=(0,), scenarios=2))
    assert equal(factors(plain.adapter), factors(still.adapter))
    lines = [MetricsLog(result.adapter.parent / "metrics.jsonl").read() for result in (plain, still)]
    for before, after in zip(*lines, strict=True):
        assert after["look_ahead_loss"] == pytest.approx(before["loss"] - 5.0 * before["retention"], rel=1e-5)
        assert {name: after[name] for name in before} == before


def test_it_changes_what_is_learnt_and_says_so(sd, cache, straight, tmp_path):
    plain = train(sd, cache, tmp_path / "plain", None)
    assert not equal(factors(plain.adapter), factors(straight.adapter))
    told = json.loads((straight.adapter / "valign.json").read_text())
    assert told["look_ahead"]["inner_steps"] == [2]
    lines = MetricsLog(straight.adapter.parent / "metrics.jsonl").read()
    assert all(line["look_ahead_loss"] > 0 for line in lines)


def test_a_killed_run_goes_on_with_the_same_bytes(sd, cache, straight, tmp_path, monkeypatch):
    with killed_at(2, monkeypatch):
        train(sd, cache, tmp_path / "run", SMALL, checkpoint_every=1)
    again = train(sd, cache, tmp_path / "run", SMALL, checkpoint_every=1)
    assert equal(factors(again.adapter), factors(straight.adapter))
    with pytest.raises(UserError, match="recipe"):
        train(sd, cache, tmp_path / "run", replace(SMALL, look_ahead_share=0.5), checkpoint_every=1)


def test_settings_are_drawn_by_the_seed(task):
    future = task(replace(SMALL, inner_steps=(1, 2, 3), inner_rates=(1e-4, 1e-3))).future
    drawn = [future.scenario(step, 0) for step in range(20)]
    assert drawn == [future.scenario(step, 0) for step in range(20)]
    for name in ("steps", "rate", "way"):
        assert len({getattr(one, name) for one in drawn}) > 1
    visits = [visit for one in drawn for step in range(one.steps) for visit in one.visits(step, 2)]
    assert len({visit for _, visit in visits}) == sum(one.steps for one in drawn)  # no noise is met twice


def test_to_first_order_it_is_the_objective_at_the_moved_weights(task, sd, cache):
    """The weights are moved by hand, in the base: adapter and reference see the same numbers but for the reference's own."""
    own = task(replace(SMALL, inner_ways=("full",), implicit_steps=0, look_ahead_share=1.0))
    record, found = grads(own)
    future = own.future
    with torch.no_grad():
        step = own.step
        places = own.visits.at(0)
        batch = own.source.visit(places)
        reference = step.errors(batch, reference=True)
    moved = future.reach(future.scenario(0, 0))
    for name, layer in future.offsets.layers.items():
        layer.get_base_layer().weight.data += moved[name].up
    errors = step.backward(batch, reference, share=1 / len(places))
    expected = torch.cat([parameter.grad.flatten() for parameter in own.parameters()])
    for name, layer in future.offsets.layers.items():
        layer.get_base_layer().weight.data -= moved[name].up
    assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert record["look_ahead_loss"] == pytest.approx(float(errors[0]) / len(places), rel=1e-4)


def test_fine_tuning_lowers_the_benign_loss_and_leaves_no_trace(task, sd):
    own = task(replace(SMALL, inner_steps=(8,), inner_ways=("lora",)))
    before = {name: tensor.clone() for name, tensor in sd.denoiser.state_dict().items()}
    scenario = own.future.scenario(0, 0)
    reached = own.future.reach(scenario)
    with torch.no_grad():
        start = own.future.loss(scenario, 0)
        with own.future.offsets.on(reached):
            end = own.future.loss(scenario, 0)
        assert own.future.loss(scenario, 0) == start
    assert end < start
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.denoiser.state_dict().items())
    assert all(parameter.grad is None for parameter in own.parameters())


def test_the_curvature_is_the_hessians_product(task):
    own = task(replace(SMALL, inner_ways=("full",), inner_targets=("attn2.to_k",)))
    scenario = own.future.scenario(0, 0)
    reached = own.future.reach(scenario)
    direction = torch.randn(sum(one.up.numel() for one in own.future.probe().values()))
    products = own.future.curvature(scenario, reached, direction)
    probe = own.future.probe()
    names = [one.up for one in probe.values()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), own.future.offsets.on(reached, probe):
        slopes = torch.autograd.grad(own.future.loss(scenario, 0), names, create_graph=True)
        exact = torch.autograd.grad((torch.cat([one.flatten() for one in slopes]) * direction).sum(), names)
    assert_close(products, torch.cat([one.flatten() for one in exact]), rtol=0.05, atol=0.05 * float(products.abs().max()))


def test_the_implicit_part_is_a_correction_of_the_first_order(task):
    own = task(replace(SMALL, look_ahead_share=1.0))
    whole = grads(own)[1]
    own.ahead = replace(own.ahead, implicit_steps=0)
    first = grads(own)[1]
    own.ahead = replace(own.ahead, implicit_steps=1, proximity=1e-9)
    assert not torch.allclose(whole, first, rtol=1e-3)
    assert_close(grads(own)[1], first)  # an envelope that holds on to theta lets nothing through


def test_what_cannot_be_is_refused(sd, cache, tmp_path):
    with pytest.raises(UserError, match="inner_targets must name linear layers"):
        train(sd, cache, tmp_path / "run", replace(SMALL, inner_targets=("nothing",)))
    with pytest.raises(UserError, match="compile must be off"):
        train(sd, cache, tmp_path / "other", SMALL, compile=True)
