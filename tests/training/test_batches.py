import pytest
import torch
from diffusers import DDPMScheduler
from pair_data import small_config
from torch.testing import assert_close

from valign.training.tasks.preference.batches import PairSource, split_rows


def source(sd, cache, **changes):
    return PairSource(sd, cache, cache.rows(), small_config(**changes))


def test_winner_and_loser_share_timestep_noise_and_caption(sd, cache):
    batch = source(sd, cache).visit([(0, 0), (1, 0), (2, 0)])
    winners, losers = batch.target.chunk(2)  # epsilon prediction: the target is the noise
    assert_close(winners, losers, rtol=0, atol=0)
    assert not torch.equal(winners[0], winners[1])
    (both,) = batch.pieces(split=False)
    assert torch.equal(*both.timesteps.chunk(2))
    assert torch.equal(*both.conditioning.embeds.chunk(2))


def test_a_pair_draws_the_same_in_any_batch(sd, cache):
    alone, among = source(sd, cache).visit([(3, 1)]), source(sd, cache).visit([(7, 0), (3, 1)])
    assert alone.timesteps[0] == among.timesteps[1]
    assert_close(alone.noisy[1], among.noisy[3], rtol=0, atol=0)  # the loser
    assert not torch.equal(alone.noisy, source(sd, cache).visit([(3, 2)]).noisy)


def test_latents_are_samples_of_the_cached_posterior(sd, cache):
    batch = source(sd, cache, flip=False).visit([(0, visit) for visit in range(200)])
    kept = DDPMScheduler.from_config(sd.pipe.scheduler.config).alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    latents = (batch.noisy[:200] - (1 - kept).sqrt() * batch.target[:200]) / kept.sqrt()
    clean = batch.timesteps < 500  # where dividing by sqrt(alpha_bar) does not blow rounding up
    stored = cache.batch(torch.tensor([0]))
    assert_close(
        latents[clean].mean(0), stored.winner_mean[0], rtol=0, atol=float(6 * stored.winner_std.max() / clean.sum() ** 0.5)
    )


def test_dropping_takes_the_empty_prompt_for_both(sd, cache):
    batch = source(sd, cache, empty_prompt_prob=1.0).visit([(0, 0), (1, 0)])
    assert_close(batch.conditioning.embeds[0], sd.encode_prompts([""]).embeds[0])
    assert torch.equal(*batch.conditioning.embeds)


def test_captions_are_the_unsafe_prompt_or_its_safe_twin(sd, cache):
    made = source(sd, cache, empty_prompt_prob=0.0)
    assert_close(made.visit([(5, 0)]).conditioning.embeds, sd.encode_prompts(["red 5"]).embeds)
    assert_close(made.visit([(5, 0)], safe_caption=True).conditioning.embeds, sd.encode_prompts(["blue 5"]).embeds)


def test_halves_are_winners_then_losers(sd, cache):
    batch = source(sd, cache).visit([(0, 0), (1, 0)])
    winners, losers = batch.pieces(split=True)
    assert torch.equal(torch.cat([winners.noisy, losers.noisy]), batch.noisy)
    assert len(winners.conditioning) == len(winners.timesteps) == 2


def test_min_snr_weights_come_from_the_schedule(sd, cache):
    batch = source(sd, cache, min_snr=5.0).visit([(0, visit) for visit in range(8)])
    kept = DDPMScheduler.from_config(sd.pipe.scheduler.config).alphas_cumprod[batch.timesteps]
    assert_close(batch.weight, (5 * (1 - kept) / kept).clamp(max=1), rtol=1e-4, atol=1e-6)
    assert (source(sd, cache).visit([(0, 0)]).weight == 1).all()


def test_validation_draws_do_not_drop_flip_or_change(sd, cache):
    made = source(sd, cache, empty_prompt_prob=1.0)
    batch = made.validation([(0, 0), (0, 1)], 2)
    assert batch.timesteps[0] < 500 <= batch.timesteps[1]
    assert_close(batch.conditioning.embeds[:1], sd.encode_prompts(["red 0"]).embeds)
    assert torch.equal(batch.noisy, made.validation([(0, 0), (0, 1)], 2).noisy)


@pytest.mark.parametrize(("fraction", "held"), [(0.0, 0), (0.01, 1), (0.25, 3), (0.5, 6)])
def test_the_held_out_pairs_are_a_stable_part(cache, fraction, held):
    train, held_out = split_rows(cache, cache.rows(), fraction)
    assert len(held_out) == held
    assert sorted([*train.tolist(), *held_out.tolist()]) == list(range(12))
    assert train.tolist() == sorted(train.tolist())
    again = split_rows(cache, cache.rows().flip(0), fraction)[1]
    assert set(again.tolist()) == set(held_out.tolist())  # by id, not by place


def test_one_pair_is_never_held_out(cache):
    assert [len(part) for part in split_rows(cache, cache.rows()[:1], 0.5)] == [1, 0]


def test_retained_captions_are_benign_and_sometimes_empty(sd, cache):
    images = source(sd, cache, empty_prompt_prob=1.0).retained([(0, visit) for visit in range(100)])
    known = sd.encode_prompts(["", *(f"blue {i}" for i in range(12))]).embeds
    distance = (images.conditioning.embeds[:, None] - known[None]).abs().amax(dim=(2, 3))
    assert (distance.min(dim=1).values < 1e-5).all()
    assert 1 <= (distance.argmin(dim=1) == 0).sum() <= 25  # a tenth
    assert distance.argmin(dim=1).unique().numel() > 6
    again = source(sd, cache, empty_prompt_prob=1.0).retained([(0, 7)])
    assert_close(again.noisy[0], images.noisy[7], rtol=0, atol=0)
