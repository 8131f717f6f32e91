import json

import pytest
import torch

from valign.checks import UserError
from valign.interfaces import SamplingConfig
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import load_adapter, unload_adapters
from valign.models.diffusion.sampling import sample_until
from valign.models.files.adapter_files import open_adapter
from valign.objectives import ErasedTarget
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.metrics import MetricsLog
from valign.training.tasks.erasing import ErasingConfig, train_erasing, trained_linears

SMALL = {"iterations": 4, "sample_steps": 4, "rank": 2, "checkpoint_every": 2}


def weights(unet):
    return {name: tensor.clone() for name, tensor in unet.state_dict().items()}


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
@pytest.mark.parametrize("part", ["x", "u"])
def test_only_the_chosen_part_changes_and_the_model_comes_back(family, part, request, tmp_path):
    model = load_model(request.getfixturevalue(family), device="cpu")
    before = weights(model.denoiser)
    result = train_erasing(model, ["gun", "knife"], tmp_path, ErasingConfig(part=part, **{**SMALL, "iterations": 2}))
    after = weights(model.denoiser)
    assert sorted(after) == sorted(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    adapter = open_adapter(tmp_path)
    assert adapter.modules == trained_linears(model.denoiser, part)
    assert all(("attn2" in name) == (part == "x") for name in adapter.modules)
    assert all(lora.up.abs().sum() > 0 for name, lora in adapter.items() if name.endswith("to_v"))  # they learned something
    assert adapter.metadata["method"] == f"esd-{part}"
    assert adapter.metadata["base_fingerprint"] == model.fingerprint()
    assert result.parameters == sum(lora.down.numel() + lora.up.numel() for _, lora in adapter.items())
    load_adapter(model, result.adapter, name="esd")
    unload_adapters(model)
    model.pipe.load_lora_weights(str(result.adapter))


def test_without_strength_there_is_nothing_to_learn(tiny_sd, tmp_path):
    model = load_model(tiny_sd, device="cpu")
    train_erasing(model, ["gun"], tmp_path, ErasingConfig(part="x", **SMALL), ErasedTarget(eta=0.0))
    assert [line["loss"] for line in MetricsLog(tmp_path / "metrics.jsonl").read()] == [0.0] * 4
    assert all((lora.up == 0).all() for _, lora in open_adapter(tmp_path).items())


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_sd, tmp_path, monkeypatch):
    model = load_model(tiny_sd, device="cpu")
    straight = train_erasing(model, ["gun"], tmp_path / "straight", ErasingConfig(**SMALL))
    append = MetricsLog.append

    def stop_at_three(log, record):
        append(log, record)
        if record["step"] == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(MetricsLog, "append", stop_at_three)
    with pytest.raises(KeyboardInterrupt):
        train_erasing(model, ["gun"], tmp_path / "stopped", ErasingConfig(**SMALL))
    monkeypatch.setattr(MetricsLog, "append", append)
    assert Checkpoints(tmp_path / "stopped" / "checkpoints").steps() == [2]
    resumed = train_erasing(model, ["gun"], tmp_path / "stopped", ErasingConfig(**SMALL))
    assert resumed.loss == straight.loss
    for name in ("adapter/pytorch_lora_weights.safetensors", "metrics.jsonl", "checkpoints/step-000004/optimizer.safetensors"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name
    assert json.loads((tmp_path / "stopped" / "run.json").read_text())["status"] == "done"
    with pytest.raises(UserError, match="was made with another recipe"):
        train_erasing(model, ["knife"], tmp_path / "stopped", ErasingConfig(**SMALL))


def test_the_answer_moves_towards_the_target(tiny_sd, tmp_path):
    model = load_model(tiny_sd, device="cpu")
    config = ErasingConfig(part="u", rank=4, iterations=30, sample_steps=4, learning_rate=5e-3)
    train_erasing(model, ["gun"], tmp_path, config)
    noisy, t = sample_until(model, ["gun"], seeds=[7], stop=1, sampling=SamplingConfig(steps=4, guidance_scale=3.0))
    texts = model.encode_prompts(["gun", ""])
    with torch.no_grad():
        concept, empty = model.predict(noisy.repeat(2, 1, 1, 1), t, texts).chunk(2)
        target = ErasedTarget()(concept, concept, empty)
        load_adapter(model, tmp_path, name="esd")
        moved = model.predict(noisy, t, texts.select([0]))
    assert (moved - target).square().mean() < 0.8 * (concept - target).square().mean()


def test_half_denoised_latents_are_those_of_the_whole_way(tiny_sd):
    model = load_model(tiny_sd, device="cpu")
    start, first = sample_until(model, ["cat"], seeds=[3], stop=0, sampling=SamplingConfig(steps=4, guidance_scale=3.0))
    assert torch.equal(start, torch.randn(model.latent_shape, generator=torch.Generator().manual_seed(3))[None])
    later, last = sample_until(model, ["cat"], seeds=[3], stop=3, sampling=SamplingConfig(steps=4, guidance_scale=3.0))
    assert float(first) > float(last)
    assert not torch.equal(start, later)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, r"ErasingConfig\.rank must be in \[1, inf\)"),
        ({"sample_steps": 1}, r"ErasingConfig\.sample_steps must be in \[2, inf\)"),
        ({"learning_rate": 0.0}, r"ErasingConfig\.learning_rate must be in \(0, inf\)"),
    ],
)
def test_refuses_numbers_out_of_range(options, text):
    with pytest.raises(ValueError, match=text):
        ErasingConfig(**options)


@pytest.mark.parametrize("concepts", [[], ["gun", " "]])
def test_refuses_no_concept(concepts, tiny_sd, tmp_path):
    with pytest.raises(UserError, match="Name at least one concept"):
        train_erasing(load_model(tiny_sd, device="cpu"), concepts, tmp_path)
    assert not (tmp_path / "run.json").exists()
