"""Without bitsandbytes it is refused before anything is loaded; with it, it goes downhill as AdamW does."""

import pytest
import torch

from valign.checks import UserError
from valign.memory import MemoryConfig
from valign.optimizers import OPTIMIZERS
from valign.optimizers import adamw_eight_bit as module
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.preference.config import PreferenceConfig


def test_a_missing_package_is_refused_when_the_options_are_read(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: None)
    for ask in (
        lambda: parse_tuning("lora+adamw-eight-bit"),
        lambda: parse_tuning("lora").eight_bit(),
        lambda: PreferenceConfig(memory=MemoryConfig(eight_bit=True)),
    ):
        with pytest.raises(
            UserError, match=r"needs the package bitsandbytes, which is missing\. pip install 'valign\[eight-bit\]'"
        ):
            ask()


def test_it_takes_the_place_of_adamw_alone(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda _: object())
    made = parse_tuning("lora", {"weight_decay": 0.1}).eight_bit()
    assert made.optimizer == module.AdamWEightBitOptions(weight_decay=0.1)
    assert made.eight_bit() == made
    with pytest.raises(UserError, match=r"memory\.eight_bit is the state of adamw, got the method 'full\+trion'"):
        parse_tuning("full+trion").eight_bit()
    with pytest.raises(UserError, match=r"memory\.eight_bit is the state of adamw, got the optimizer adafactor"):
        PreferenceConfig(optimizer="adafactor", memory=MemoryConfig(eight_bit=True))


def test_it_goes_downhill():
    pytest.importorskip("bitsandbytes")
    if not torch.cuda.is_available():
        pytest.skip("8-bit optimizers need CUDA")
    weight = torch.nn.Parameter(torch.full((128, 128), 5.0, device="cuda"))
    optimizer = OPTIMIZERS["adamw-eight-bit"]().build([{"params": [weight]}], [], 0.1)
    for _ in range(20):
        optimizer.zero_grad()
        weight.square().mean().backward()
        optimizer.step()
    assert float(weight.detach().abs().mean()) < 4
