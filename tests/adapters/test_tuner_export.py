"""A tuner as a LoRA file: the same function in stock peft and diffusers."""

import pytest
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.testing import assert_close
from tuner_models import UNET_TARGETS, ask, build, shake

from valign.adapters import LocaConfig, LolduConfig, NolaConfig, SvfitConfig, lora_factors
from valign.models.files.adapter_files import open_adapter, save_adapter

CASES = {
    "svfit": (SvfitConfig(r=3, target_modules=UNET_TARGETS), 3),
    "loldu": (LolduConfig(r=4, target_modules=UNET_TARGETS), 4),
    "nola": (NolaConfig(r=2, target_modules=UNET_TARGETS), 2),
    "loca": (LocaConfig(n_coefficients=5, target_modules=UNET_TARGETS), 5),
}


@pytest.mark.parametrize("slug", sorted(CASES))
def test_a_file_that_diffusers_reads(slug, tmp_path):
    config, rank = CASES[slug]
    unet = inject_adapter_in_model(config, build("unet"), adapter_name="expert")
    shake(unet, "expert")
    for layer in unet.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("expert", 0.5)
    factors = lora_factors(unet, "expert")
    assert {lora.rank for lora in factors.values()} == {rank}
    save_adapter(tmp_path / "adapter", factors, metadata={})
    assert open_adapter(tmp_path / "adapter").modules == sorted(factors)
    plain = build("unet")
    plain.load_lora_adapter(str(tmp_path / "adapter"), weight_name="pytorch_lora_weights.safetensors", prefix="unet")
    assert_close(ask(plain), ask(unet), atol=1e-5, rtol=1e-4)


def test_what_cannot_be_exported():
    unet = build("unet")
    with pytest.raises(ValueError, match="must have an adapter of valign"):
        lora_factors(unet)
    conv = nn.ModuleDict({"conv": nn.Conv2d(2, 3, 3)})
    inject_adapter_in_model(SvfitConfig(r=2, target_modules=["conv"], convs=True), conv)
    with pytest.raises(ValueError, match=r"must have its adapter on nn\.Linear, got conv"):
        lora_factors(conv)
    inject_adapter_in_model(LoraConfig(target_modules=["to_q"]), unet)
    with pytest.raises(ValueError, match="must have an adapter of valign"):
        lora_factors(unet)
