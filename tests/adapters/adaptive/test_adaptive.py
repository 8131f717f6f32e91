"""What every adaptive method in the table promises on a U-Net: the base at the start, and plain LoRA at the end."""

import pytest
import torch
from torch.testing import assert_close

from valign.adapters import export_lora
from valign.adapters.adaptive import ADAPTIVE
from valign.methods import declared_methods
from valign.models.adapter_files import save_adapter
from valign.models.loading import load_model
from valign.models.lora import attach_lora, unload_adapters


def drive(method, unet, loss):
    """Two steps of a method as its page says."""
    generator = torch.Generator().manual_seed(0)
    if method == "diffora":
        made = ADAPTIVE[method](unet, steps=2, lr=1e-2, warmup=0.0)
        for _ in range(2):
            made.step(loss, loss)
        return
    options = {"codyra": {"steps": 2, "levels": 1}, "increlora": {"init_warmup": 0, "interval": 1}, "sora": {"threshold": 0.2}}[
        method
    ]
    made = ADAPTIVE[method](unet, generator=generator, **options)
    if method == "sora":
        optimizers = [torch.optim.AdamW(made.weights(), lr=1e-2), made.gate_optimizer(lr=1e-2)]
    else:
        optimizers = [torch.optim.AdamW(made.parameters(), lr=1e-2)]
        made.watch(optimizers[0])
    for _ in range(2):
        loss().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_unet_keeps_its_base_and_loads_the_export(method, tiny_sd, tmp_path):
    sd = load_model(tiny_sd)
    noisy = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))

    def ask(model=sd):
        return model.predict(noisy, torch.tensor([7]), model.encode_prompts(["a red man"]))

    with torch.no_grad():
        before = ask()
    attach_lora(sd, rank=2 if method != "increlora" else 1)
    drive(method, sd.unet, lambda: ask().square().sum())
    with torch.no_grad():
        answer = ask()
    save_adapter(tmp_path / "adapter", export_lora(sd.unet), metadata={})
    unload_adapters(sd)
    clean = load_model(tiny_sd)
    with torch.no_grad():
        assert torch.equal(ask(), before)
        clean.pipe.load_lora_weights(str(tmp_path / "adapter"))
        assert_close(ask(clean), answer, rtol=1e-3, atol=1e-4)
    assert not torch.equal(answer, before)


@pytest.mark.parametrize("method", ADAPTIVE)
def test_the_method_is_declared(method):
    assert method in {declared.slug for declared in declared_methods() if declared.room == "adapters"}
