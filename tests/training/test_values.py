import json
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from value_data import build_value_data, small_value_config

from valign.checks import UserError
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.models.diffusion.value_encoder import ValueText, copy_encoder, load_value_encoder
from valign.objectives import DiffusionDPO, LiVO, PairErrors, denoising_error
from valign.randomness import generator_for
from valign.training.engine.draws import draw_pair
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.pair_step import SUMS, PairStep
from valign.training.tasks.preference.values import ValueSource, ValueTokens, train_values

PLACES = [(0, 0), (5, 0), (7, 1), (11, 2)]
RUN = {"steps": 6, "checkpoint_every": 2, "validate_every": 3}
RESULT = ("values/value_encoder.safetensors", "metrics.jsonl", "checkpoints/step-000006/optimizer.safetensors")


@pytest.fixture(scope="module")
def data(sd, tmp_path_factory):
    return build_value_data(sd, tmp_path_factory.mktemp("values"))


def known(cache):
    return list(map(ValueText.read, cache.principles))


def make(model, cache, *, objective=None, lora_rank=None, **changes):
    encoder = copy_encoder(model, known(cache), lora_rank=lora_rank)
    config = small_value_config(**changes)
    tokens = ValueTokens(model, encoder)
    step = PairStep(model, objective or LiVO(), config, start_processes(cpu=True), tokens.off)
    return step, ValueSource(model, cache, cache.rows(), config, encoder), encoder


def weights(model):
    parts = {"unet": model.denoiser, "vae": model.pipe.vae, "text": model.pipe.text_encoder}
    return {f"{name}.{key}": value.clone() for name, part in parts.items() for key, value in part.state_dict().items()}


def gradients(step, batch, encoder):
    encoder.zero_grad()
    step.backward(batch, step.errors(batch, reference=True), share=1 / len(batch.ids))
    return {name: p.grad.clone() for name, p in encoder.trained().items()}


def test_the_reference_is_the_bare_model_and_the_policy_has_the_token(sd, data):
    step, source, _ = make(sd, data)
    batch = source.visit(PLACES)
    (images,) = batch.pieces(split=False)
    text = images.conditioning.text.embeds.repeat(2, 1, 1)
    with torch.no_grad():
        bare = sd.denoiser(images.noisy, images.timesteps, encoder_hidden_states=text)[0]
    assert torch.equal(step.errors(batch, reference=True), denoising_error(bare, images.target))
    assert not torch.allclose(step.errors(batch, reference=False), step.errors(batch, reference=True))
    assert images.conditioning.embeds.shape == (8, 78, 32)  # 77 padded tokens and the value's


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_the_gradient_is_that_of_the_plain_loss(sd, data, lora_rank):
    step, source, encoder = make(sd, data, lora_rank=lora_rank)
    batch = source.visit(PLACES)
    found = gradients(step, batch, encoder)
    encoder.zero_grad()
    # the slow, obvious version: two forwards with and two without the token, the formula, mean over pairs
    text, ids = batch.conditioning.text.embeds, batch.conditioning.ids
    cond = torch.cat([encoder(ids)[:, None], text], dim=1)
    errors = []
    for embeds in (cond, text):
        for noisy, target in zip(batch.noisy.chunk(2), batch.target.chunk(2), strict=True):
            errors.append(denoising_error(sd.denoiser(noisy, batch.timesteps, encoder_hidden_states=embeds)[0], target))
    hinges = (1 + 1000 * (errors[0] - errors[2])).relu() + (0.5 + 500 * (errors[3] - errors[1])).relu()
    hinges.mean().backward()
    assert_close(LiVO()(PairErrors(*(error.detach() for error in errors))), hinges.detach())
    for name, p in encoder.trained().items():
        assert_close(found[name], p.grad, rtol=1e-3, atol=1e-4 * float(p.grad.abs().max()) + 1e-7)
    assert all(p.grad is None for part in (sd.denoiser, sd.pipe.vae, sd.pipe.text_encoder) for p in part.parameters())


def test_halves_and_checkpointed_activations_give_the_same_gradient(sd, data):
    plain = make(sd, data)
    found = gradients(plain[0], plain[1].visit(PLACES), plain[2])
    halves = make(sd, data, split_pairs=True)
    sd.denoiser.enable_gradient_checkpointing()
    try:
        again = gradients(halves[0], halves[1].visit(PLACES), halves[2])
    finally:
        sd.denoiser.disable_gradient_checkpointing()
    for name, value in found.items():
        assert_close(again[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()) + 1e-7)


def partners(source, visits):
    """A batch, and the rows of its losers: of all images of the data set, noised by hand, those that are in the batch."""
    batch, cache, schedule = source.visit(visits), source.values, source.model.schedule
    rows, found = torch.arange(len(cache.scenes)), []
    for (_, visit), name, timestep, loser in zip(visits, batch.ids, batch.timesteps, batch.noisy.chunk(2)[1], strict=True):
        generator = generator_for("unsafe", source.config.seed, name, visit)
        flip_prob = 0.5 if source.config.flip else 0.0
        draw = draw_pair(generator, cache.latent_shape, num_timesteps=schedule.num_timesteps, flip_prob=flip_prob)
        mean, std = cache.batch(rows, torch.full((len(rows),), draw.flip))
        noise = draw.noise.expand(len(rows), -1, -1, -1)
        noisy = schedule.add_noise(mean + std * draw.loser_noise, noise, timestep.expand(len(rows)))
        (row,) = torch.isclose(noisy, loser).flatten(1).all(1).nonzero().flatten().tolist()
        found.append(row)
    return batch, found


def test_pairs_are_of_one_scene_and_change_with_the_epoch(sd, data):
    _, source, _ = make(sd, data)
    seen = set()
    for visit in range(12):
        batch, losers = partners(source, [(0, visit), (4, visit)])
        row = int(source.rows[0])
        assert all(
            data.scenes[partner] == data.scenes[int(source.rows[pair])] and not data.aligned[partner]
            for pair, partner in zip((0, 4), losers, strict=True)
        )
        seen.add(losers[0])
        assert data.aligned[row]
    assert seen == set(data.opposed(int(source.rows[0])))
    again = source.visit([(0, 11), (4, 11)])
    assert torch.equal(again.noisy, batch.noisy)
    noise = again.target.chunk(2)
    assert torch.equal(*noise)  # epsilon: the target is the noise, one for winner and loser
    assert len(set(again.timesteps.tolist())) == 2


def test_a_visit_does_not_depend_on_its_company(sd, data):
    _, source, _ = make(sd, data)
    together, alone = source.visit(PLACES), source.visit(PLACES[2:3])
    assert torch.equal(together.noisy.chunk(2)[1][2], alone.noisy.chunk(2)[1][0])
    assert torch.equal(together.conditioning.ids[2], alone.conditioning.ids[0])


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_training_leaves_a_value_encoder_and_the_model_untouched(family, request, tmp_path):
    model = load_model(request.getfixturevalue(family), device="cpu")
    cache = build_value_data(model, tmp_path / "data")
    before = weights(model)
    result = train_values(model, cache, tmp_path / "run", small_value_config(steps=2, min_snr=5.0), LiVO())
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(p.requires_grad for part in (model.denoiser, *model.text_encoders) for p in part.parameters())
    assert result.adapter == tmp_path / "run" / "values"
    assert result.metrics["drift"] == 0  # without the token nothing moves
    fresh, trained = copy_encoder(model, known(cache)), load_value_encoder(tmp_path / "run", model)
    assert not torch.equal(fresh.token("blue", ["a cat"]), trained.token("bluish", ["a cat"]))
    record = json.loads((result.adapter / "value_encoder.json").read_text())
    assert record["metadata"]["objective"]["name"] == "LiVO"
    assert record["metadata"]["parameters"] == record["parameters"] == sum(p.numel() for p in fresh.trained().values())


@pytest.fixture(scope="module")
def straight(sd, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "straight"
    return train_values(sd, data, out, small_value_config(**RUN), LiVO())


def test_a_stopped_run_goes_on_to_the_same_bytes(sd, data, straight, tmp_path, monkeypatch):
    append = MetricsLog.append

    def stop_at_five(log, record):
        append(log, record)
        if record["step"] == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "append", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        train_values(sd, data, tmp_path / "run", small_value_config(**RUN), LiVO())
    monkeypatch.setattr(MetricsLog, "append", append)
    resumed = train_values(sd, data, tmp_path / "run", small_value_config(**RUN), LiVO())
    assert replace(resumed, adapter=straight.adapter) == straight
    for name in RESULT:
        assert (tmp_path / "run" / name).read_bytes() == (straight.adapter.parent / name).read_bytes(), name


def test_a_finished_run_is_returned_and_another_recipe_refused(sd, data, straight):
    out = straight.adapter.parent
    assert train_values(sd, data, out, small_value_config(**RUN), LiVO()) == straight
    for changed in ({"lora_rank": 2}, {"layout": "padded"}):
        with pytest.raises(UserError, match="was made with another recipe"):
            train_values(sd, data, out, small_value_config(**RUN), LiVO(), **changed)
    with pytest.raises(UserError, match="was made with another recipe"):
        train_values(sd, data, out, small_value_config(**RUN), DiffusionDPO())


def test_other_objectives_fixed_draws_and_loras_train_too(sd, data, tmp_path):
    options = {"steps": 2, "precompute_ref_draws": 2}
    result = train_values(sd, data, tmp_path / "dpo", small_value_config(**options), DiffusionDPO(beta=500.0), lora_rank=2)
    assert result.steps == 2
    live = train_values(sd, data, tmp_path / "live", small_value_config(steps=2), DiffusionDPO(beta=500.0), lora_rank=2)
    left, right = (load_value_encoder(run.adapter, sd).token("blue", ["a cat"]) for run in (result, live))
    assert_close(left, right, rtol=1e-3, atol=1e-4)  # one epoch: the fixed draws are the live ones


def test_previews_show_the_base_above_and_the_token_below(sd, data, tmp_path):
    from PIL import Image

    prompts = {"sample_every": 2, "sample_prompts": ("a cat", "a red tree"), "sample_steps": 2}
    train_values(sd, data, tmp_path, small_value_config(steps=2, **prompts), LiVO())
    with Image.open(tmp_path / "samples" / "step-000002.png") as sheet:
        above, below = (sheet.crop((0, top, 64, top + 64)) for top in (0, 68))
    assert above.tobytes() == sd.generate(["a cat", "a red tree"], seeds=[0, 1], sampling=SamplingConfig(steps=2))[0].tobytes()
    assert below.tobytes() != above.tobytes()


def test_the_token_learns_to_prefer_the_winner(sd, data):
    """One batch over and over, beside a U-Net with random weights: the winners' error falls below the reference's."""
    step, source, encoder = make(sd, data, objective=LiVO(beta=50.0, alpha=50.0, gamma_win=0.25, gamma_lose=0.25))
    batch = source.visit(PLACES)
    reference = step.errors(batch, reference=True)
    optimizer = torch.optim.AdamW(encoder.trained().values(), lr=5e-3)
    first = step.backward(batch, reference, share=1 / 4)[0]
    for _ in range(90):
        optimizer.zero_grad()
        sums = dict(zip(SUMS, step.backward(batch, reference, share=1 / 4).tolist(), strict=True))
        optimizer.step()
    assert sums["loss"] < 0.75 * first
    assert sums["winner_error"] < sums["winner_reference"]
    assert sums["implicit_accuracy"] == 4  # of 4 pairs


def test_refuses_before_any_work(sd, data, tiny_sd_v, tmp_path):
    with pytest.raises(UserError, match="a value text belongs to its prompt"):
        train_values(sd, data, tmp_path / "run", small_value_config(empty_prompt_prob=0.1), LiVO())
    with pytest.raises(UserError, match="was encoded by another base model"):
        train_values(load_model(tiny_sd_v, device="cpu"), data, tmp_path / "other", small_value_config(), LiVO())
    attach_lora(sd, rank=1)
    try:
        with pytest.raises(UserError, match="must be bare, got one with an adapter"):
            train_values(sd, data, tmp_path / "busy", small_value_config(), LiVO())
    finally:
        unload_adapters(sd)
