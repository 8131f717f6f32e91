import pytest
import torch
from pair_data import small_config

from valign.checks import UserError
from valign.models.files.adapter_files import open_adapter
from valign.objectives import DiffusionDPO
from valign.training import train_preference


def factors(sd, cache, out, **changes):
    config = small_config(steps=2, precompute_ref_draws=1, **changes)
    result = train_preference(sd, cache, cache.rows(), out, config, DiffusionDPO(beta=500.0))
    return {f"{name}.{part}": getattr(lora, part) for name, lora in open_adapter(result.adapter).items() for part in ("down", "up")}


def compile_by(backend):
    """`torch.compile` with what dynamo records given to ``backend``; no code is generated."""
    seen = []

    def compile_(module, **options):
        seen.append(module)
        return torch._dynamo.optimize(backend)(module)

    return seen, compile_


def test_a_captured_graph_trains_as_the_model_does(sd, cache, tmp_path, monkeypatch):
    plain, unet = factors(sd, cache, tmp_path / "plain"), sd.denoiser
    seen, compile_ = compile_by("eager")
    monkeypatch.setattr(torch, "compile", compile_)
    compiled = factors(sd, cache, tmp_path / "compiled", compile=True)
    assert sorted(compiled) == sorted(plain)
    assert all(torch.equal(compiled[name], plain[name]) for name in plain)
    assert seen == [unet]
    assert sd.denoiser is unet


def test_wrong_code_is_found_out_before_the_first_step(sd, cache, tmp_path, monkeypatch):
    def wrong(graph, _):
        return lambda *values: [1.1 * value for value in graph(*values)]

    unet = sd.denoiser
    monkeypatch.setattr(torch, "compile", compile_by(wrong)[1])
    with pytest.raises(UserError, match=r"PreferenceConfig\.compile must leave gradients as they are, got an error of \d+\.\d%"):
        factors(sd, cache, tmp_path, compile=True)
    assert not list(tmp_path.rglob("metrics.jsonl"))
    assert sd.denoiser is unet


def test_a_machine_without_a_compiler_is_told(sd, cache, tmp_path, monkeypatch):
    def refuse(graph, _):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", compile_by(refuse)[1])
    with pytest.raises(UserError, match=r"PreferenceConfig\.compile needs a compiler .*No working C\+\+ compiler"):
        factors(sd, cache, tmp_path, compile=True)
    assert not getattr(sd.denoiser, "peft_config", None)


@pytest.mark.slow
def test_generated_code_trains_as_the_model_does_or_is_refused(sd, cache, tmp_path):
    plain = factors(sd, cache, tmp_path / "plain", learning_rate=1e-5)
    refused, compiled = "", plain
    try:
        compiled = factors(sd, cache, tmp_path / "compiled", learning_rate=1e-5, compile=True)
    except UserError as error:
        refused = str(error)
    assert not refused or "must leave gradients as they are" in refused
    for name in plain:
        torch.testing.assert_close(compiled[name], plain[name], rtol=0, atol=5e-5)
