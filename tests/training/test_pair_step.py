from math import log

import pytest
import torch
from pair_data import build_pairs, small_config
from torch.testing import assert_close

from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.objectives import DiffusionDPO, PairErrors, denoising_error, loser_scale
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.pair_step import SUMS, PairStep, weigh

PLACES = [(0, 0), (1, 0), (2, 0), (3, 0)]
OBJECTIVE = DiffusionDPO(beta=500.0)


@pytest.fixture
def make(sd, cache):
    """A step over a model whose B factors are random, so that the policy differs from the reference."""

    def build(*, model=sd, data=cache, noise=0.05, **changes):
        config = small_config(**changes)
        attach_lora(model, rank=4, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(noise * torch.randn(parameter.shape, generator=generator))
        made.append(model)
        source = PairSource(model, data, data.rows(), config)
        return PairStep(model, OBJECTIVE, config, start_processes(cpu=True)), source.visit(PLACES)

    made = []
    yield build
    for model in made:
        unload_adapters(model)


def gradients(step, batch):
    step.model.denoiser.zero_grad()
    sums = step.backward(batch, step.errors(batch, reference=True), share=1 / 4)
    named = {name: p.grad.clone() for name, p in step.model.denoiser.named_parameters() if p.grad is not None}
    return dict(zip(SUMS, sums.tolist(), strict=True)), named


def straight(step, batch, *, sft_weight=0.0, mu=None):
    """The slow, obvious version: one graph from the factors to the mean loss."""
    step.model.denoiser.zero_grad()
    reference = step.errors(batch, reference=True)
    (images,) = batch.pieces(split=False)
    prediction = step.model.predict(images.noisy, images.timesteps, images.conditioning)
    winner, loser = denoising_error(prediction, images.target).chunk(2)
    if mu is not None:
        d_w, d_l = (prediction - images.target).detach().chunk(2)
        scale = loser_scale((d_w * d_w).sum(), (d_w * d_l).sum(), mu=mu)
        assert 0 < scale < 1
        loser = loser.detach() + scale * (loser - loser.detach())
    errors = PairErrors(winner, loser, *reference.chunk(2)).weighted(batch.weight)
    (OBJECTIVE(errors) + sft_weight * errors.policy_w).mean().backward()
    return {name: p.grad.clone() for name, p in step.model.denoiser.named_parameters() if p.grad is not None}


def same(left, right, *, apart=0.0):
    """``apart``: share of a tensor's largest entry by which sums in another order may differ."""
    assert sorted(left) == sorted(right)
    for name in left:
        near = max(1e-6, apart * float(right[name].abs().max()))
        assert_close(left[name], right[name], rtol=1e-5, atol=near, msg=lambda text, name=name: f"{name}: {text}")


def test_a_fresh_adapter_is_the_reference_bit_for_bit(make):
    step, batch = make(noise=0.0)
    assert torch.equal(step.errors(batch, reference=True), step.errors(batch, reference=False))
    sums, named = gradients(step, batch)
    assert_close(sums["loss"] / 4, log(2))
    assert sums["implicit_accuracy"] == 0
    assert all((named[name] == 0).all() for name in named if "lora_A" in name)
    assert all((named[name] != 0).any() for name in named if "lora_B" in name)


def test_retention_is_zero_at_the_base(make, sd, cache):
    step, _ = make(noise=0.0, retain_weight=50.0)
    images = PairSource(sd, cache, cache.rows(), step.config).retained(PLACES)
    assert step.retain(images, share=1 / 4).max() < 1e-9  # two forward passes may differ in the last bit


def test_retention_has_the_gradient_of_the_squared_move(make, sd, cache):
    step, _ = make(retain_weight=50.0)
    images = PairSource(sd, cache, cache.rows(), step.config).retained(PLACES)
    sd.denoiser.zero_grad()
    sums = dict(zip(SUMS, step.retain(images, share=1 / 4).tolist(), strict=True))
    named = {name: p.grad.clone() for name, p in sd.denoiser.named_parameters() if p.grad is not None}
    sd.denoiser.zero_grad()
    base = step.predict(images, reference=True)
    moved = (sd.predict(images.noisy, images.timesteps, images.conditioning) - base).square().mean()
    (50 * moved).backward()
    same(named, {name: p.grad for name, p in sd.denoiser.named_parameters() if p.grad is not None})
    assert_close(sums["retention"] / 4, float(moved.detach()), rtol=1e-4, atol=0)
    assert_close(sums["loss"], 50 * sums["retention"], rtol=1e-5, atol=0)


def test_only_factors_get_a_gradient(make):
    step, batch = make()
    _, named = gradients(step, batch)
    assert named
    assert all("lora_" in name for name in named)


@pytest.mark.parametrize("options", [{}, {"sft_weight": 20.0}, {"min_snr": 5.0, "sft_weight": 1.0}])
def test_gradient_is_that_of_the_mean_loss(make, options):
    step, batch = make(**options)
    same(gradients(step, batch)[1], straight(step, batch, sft_weight=options.get("sft_weight", 0.0)))


def test_safeguard_scales_the_losers_gradient_only(make):
    step, batch = make(winner_safeguard=0.9)
    sums, named = gradients(step, batch)
    same(named, straight(step, batch, mu=0.9))
    assert 0 < sums["loser_scale"] / 4 < 1


@pytest.mark.parametrize("options", [{}, {"winner_safeguard": 0.9, "sft_weight": 3.0, "min_snr": 5.0}])
def test_split_pairs_gives_the_same_gradient(make, options):
    step, batch = make(**options)
    sums, named = gradients(step, batch)
    halves = PairStep(step.model, step.objective, small_config(split_pairs=True, **options), step.accelerator)
    split_sums, split_named = gradients(halves, batch)
    assert_close(split_sums, sums, rtol=1e-5, atol=1e-6)
    same(split_named, named, apart=5e-4)  # float32 times beta; on some processors 2e-4


def test_gradient_checkpointing_gives_the_same_gradient(make):
    step, batch = make()
    _, named = gradients(step, batch)
    step.model.denoiser.enable_gradient_checkpointing()
    try:
        same(gradients(step, batch)[1], named)
    finally:
        step.model.denoiser.disable_gradient_checkpointing()


def test_equal_images_have_no_gradient(make):
    step, batch = make()
    winners = batch.noisy.chunk(2)[0].repeat(2, 1, 1, 1)
    batch = type(batch)(**{**vars(batch), "noisy": winners})
    sums, named = gradients(step, batch)
    assert_close(sums["loss"] / 4, log(2), atol=1e-4, rtol=0)  # a batch row may differ in the last bit from another
    assert all(gradient.abs().max() < 1e-3 for gradient in named.values())


def test_base_weights_stay_as_they_were(make, sd):
    before = {name: p.clone() for name, p in sd.denoiser.named_parameters()}
    step, batch = make()
    gradients(step, batch)
    unload_adapters(sd)
    assert all(torch.equal(before[name], p) for name, p in sd.denoiser.named_parameters())


@pytest.mark.parametrize("kind", ["tiny_sd_v", "tiny_sdxl"])
def test_other_architectures(make, request, tmp_path, kind):
    model = load_model(request.getfixturevalue(kind), device="cpu")
    step, batch = make(model=model, data=build_pairs(model, tmp_path, count=4), noise=0.0)
    sums, named = gradients(step, batch)
    assert_close(sums["loss"] / 4, log(2))
    assert any((gradient != 0).any() for gradient in named.values())
    same(named, straight(step, batch))


def test_half_precision_weights_keep_float32_factors_and_errors(make, tiny_sd, tmp_path):
    model = load_model(tiny_sd, device="cpu", dtype="bfloat16")
    step, batch = make(model=model, data=build_pairs(model, tmp_path, count=4), noise=0.0)
    assert step.errors(batch, reference=True).dtype == torch.float32
    sums, named = gradients(step, batch)
    assert_close(sums["loss"] / 4, log(2))
    assert {gradient.dtype for gradient in named.values()} == {torch.float32}


def test_weigh_needs_no_graph_and_leaves_none():
    errors = PairErrors(*torch.rand(4, 3))
    with torch.no_grad():
        loss, gradient = weigh(errors, OBJECTIVE, weight=torch.ones(3), sft_weight=2.0)
    assert not loss.requires_grad
    expected = torch.sigmoid(-OBJECTIVE.margin(errors)) * OBJECTIVE.beta / 2
    assert_close(gradient, torch.cat([expected + 2, -expected]))
