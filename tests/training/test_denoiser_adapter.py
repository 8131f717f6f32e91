"""Experts with another adapter: they start as their card says, resume to the same bytes, and are saved as plain LoRA."""

from statistics import fmean

import pytest
import torch
from dying import killed_at
from pair_data import small_config
from test_preference import OBJECTIVE, equal, factors, train
from torch.testing import assert_close

from valign.adapters import ADAPTERS, EXPERTS, adapter_state
from valign.checks import UserError
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, load_adapter, unload_adapters
from valign.models.files.adapter_files import open_adapter
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.denoiser_adapter import DenoiserAdapter, first_loss
from valign.training.tasks.preference.pair_step import PairStep

KINDS = [kind for kind in EXPERTS if kind != "lora"]
ADAPTIVE = [kind for kind in KINDS if ADAPTERS[kind].adaptive]


def settings(kind):
    return {"adapter": kind, "checkpoint_every": 2, "steps": 6 if kind == "diffora" else 4}  # its search takes the first two


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def runs(sd, cache, tmp_path_factory):
    """One short training per adapter, made when it is asked for."""
    found = {}

    def run(kind):
        if kind not in found:
            found[kind] = train(sd, cache, tmp_path_factory.mktemp("runs") / kind, **settings(kind))
        return found[kind]

    return run


def answer(model):
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([7]), model.encode_prompts(["red 1"]))


def test_the_model_comes_back_bit_for_bit(sd, cache, runs, kind):
    before = sd.fingerprint()
    runs(kind)
    assert sd.fingerprint() == before == cache.base_fingerprint
    assert not getattr(sd.denoiser, "peft_config", None)


def test_training_begins_at_the_base_model_or_one_step_away(runs, kind):
    first = MetricsLog(runs(kind).adapter.parent / "metrics.jsonl").read()[0]
    moved = abs(first["winner_error"] - first["winner_reference"]) / first["winner_reference"]
    if kind == "lora-sb":
        assert 1e-7 < moved < 0.5
    else:
        assert moved < 1e-5


def test_the_adapter_is_plain_lora_that_diffusers_loads(sd, tiny_sd, runs, kind):
    adapter = runs(kind).adapter
    ranks = {}
    for name, lora in open_adapter(adapter).items():
        ranks.setdefault(name.rpartition(".")[2], []).append(lora.rank)
    average = fmean(rank for found in ranks.values() for rank in found)
    if kind in ADAPTIVE:
        assert {"sora": 0 < average < 4, "codyra": average <= 4, "increlora": 1 < average <= 4, "diffora": average == 8}[kind]
    else:
        twice = ("to_q", "to_v") if kind == "ailora" else ()
        assert {name: set(found) for name, found in ranks.items()} == {
            name: {8 if name in twice else 4} for name in ("to_q", "to_k", "to_v", "0")
        }
    base = answer(sd)
    load_adapter(sd, adapter, name="trained")
    ours = answer(sd)
    unload_adapters(sd)
    other = load_model(tiny_sd)
    other.pipe.load_lora_weights(str(adapter))
    assert_close(answer(other), ours, rtol=1e-3, atol=1e-4)
    assert (ours - base).abs().max() > (1e-6 if kind == "increlora" else 1e-4)  # its gains start at 0


def test_a_resumed_run_gives_the_same_bytes(sd, cache, runs, kind, tmp_path, monkeypatch):
    straight = runs(kind)
    with killed_at(settings(kind)["steps"] - 1, monkeypatch):
        train(sd, cache, tmp_path / "run", **settings(kind))
    resumed = train(sd, cache, tmp_path / "run", **settings(kind))
    assert equal(factors(resumed.adapter), factors(straight.adapter))
    for name in ("adapter/pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoints/step-000004/adapter.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (straight.adapter.parent / name).read_bytes(), name


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ADAPTIVE])
def test_they_train_what_they_should(sd, cache, kind):
    config = small_config(adapter=kind)
    step = PairStep(sd, OBJECTIVE, config, start_processes(cpu=True))
    trainable = DenoiserAdapter(sd, config)
    trainable.attach()
    try:
        base = {name: p.detach().clone() for name, p in sd.denoiser.named_parameters()}
        trainable.start(step, PairSource(sd, cache, cache.rows(), config))
        trained = trainable.parameters()
        assert all(("lora_core" if kind == "lora-sb" else ".lora_") in name for name in trained)
        if kind == "lora-sb":
            assert sum(p.numel() for p in trained.values()) == 16 * len(trained)
        kept = {name.replace(".base_layer", ""): p for name, p in sd.denoiser.named_parameters() if ".lora_" not in name}
        assert all(torch.equal(kept[name], p) for name, p in base.items())
    finally:
        trainable.detach()


def test_an_expert_of_plain_lora_starts_without_data_from_factors_that_the_seed_gives(sd, tmp_path):
    config = small_config(init_seed=3)
    attach_lora(sd, rank=config.rank, alpha=config.alpha, targets=config.targets, seed=3)
    expected = {name: tensor.detach().clone() for name, tensor in adapter_state(sd.denoiser, "expert").items()}
    unload_adapters(sd)
    trainable = DenoiserAdapter(sd, config)
    trainable.attach()
    try:
        trainable.start(None, None)
        found = trainable.state()
        assert found.keys() == expected.keys() == trainable.parameters().keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        trainable.save(tmp_path, {"step": 1})
        assert {lora.rank for _, lora in open_adapter(trainable.result(tmp_path)).items()} == {config.rank}
    finally:
        trainable.detach()


def test_the_first_loss_has_the_gradient_of_the_first_step(sd, cache):
    config = small_config(sft_weight=0.5)
    step = PairStep(sd, OBJECTIVE, config, start_processes(cpu=True))
    source = PairSource(sd, cache, cache.rows(), config)
    attach_lora(sd, rank=2, name="expert")
    try:
        with torch.no_grad():  # B must not be zero, or A has no gradient
            for name, p in sd.denoiser.named_parameters():
                if "lora_B" in name:
                    p.fill_(1e-6)
        factors_ = {name: p for name, p in sd.denoiser.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(first_loss(step, source, (1, 0)), list(factors_.values()))
        batch = source.visit([(1, 0)], safe_caption=False)
        step.backward(batch, step.errors(batch, reference=False), share=1.0)
        for gradient, parameter in zip(found, factors_.values(), strict=True):
            assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-6)
    finally:
        unload_adapters(sd)


def test_the_command_takes_the_name():
    from typer.testing import CliRunner

    from valign.cli.root import build

    shown = CliRunner(env={"COLUMNS": "200"}).invoke(build(), ["train", "alignguard", "--help"]).stdout
    assert "--adapter" in shown
    assert all(kind in shown for kind in EXPERTS)


def test_the_recipe_takes_the_name_and_refuses_another():
    from jaxtyping import config

    from valign.recipes.alignguard import AlignGuardRecipe

    assert AlignGuardRecipe().changed(adapter="ailora").training.adapter == "ailora"
    config.update("jaxtyping_disable", True)  # so that bad input meets the sentence that a user would meet
    try:
        with pytest.raises(
            ValueError, match=r"PreferenceConfig\.adapter must be one of lora, ailora, .*, diffora, codyra; got 'x'"
        ):
            AlignGuardRecipe().changed(adapter="x")
    finally:
        config.update("jaxtyping_disable", False)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UserError, match="compile must be off with sora"):
        small_config(adapter="sora", compile=True)
    with pytest.raises(UserError, match="alpha must be None with increlora, got 8"):
        small_config(adapter="increlora", alpha=8.0)


def test_a_step_before_the_ranks_are_final_is_never_the_best(runs):
    assert runs("codyra").best_step == runs("codyra").steps == 4


def test_the_search_is_taken_from_the_steps(runs):
    lines = MetricsLog(runs("diffora").adapter.parent / "metrics.jsonl").read()
    assert [line["step"] for line in lines] == [3, 4, 5, 6]


def test_refuses_a_rank_that_does_not_fit(sd, cache, tmp_path):
    with pytest.raises(ValueError, match=r"AILoRA\.rank must be in \[1, 32\] for down_blocks.*, got 33"):
        train(sd, cache, tmp_path / "run", adapter="ailora", rank=33)
    assert not getattr(sd.denoiser, "peft_config", None)
