"""An adapter in the weights of its model: the same images as beside them, everything else untouched."""

import pytest
import torch
from safetensors.torch import load_file

from valign.checks import UserError
from valign.merging.fuse_adapter import fuse_adapter
from valign.models.diffusion.adapter_base import base_record
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.models.files.weight_files import open_weights

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture
def adapter(tiny_sd, tmp_path):
    fan_out, fan_in = open_weights(tiny_sd).shapes[f"{MODULE}.weight"].shape
    draws = torch.Generator().manual_seed(0)
    factors = LoraFactors(down=torch.randn(2, fan_in, generator=draws), up=torch.randn(fan_out, 2, generator=draws), scale=0.5)
    model = load_model(tiny_sd, device="cpu")
    save_adapter(tmp_path / "adapter", {MODULE: factors}, metadata=base_record(model), prefix=model.components["denoiser"])
    return tmp_path / "adapter", factors


def test_its_weight_has_the_change_and_no_other_file_differs(tiny_sd, adapter, tmp_path):
    folder, factors = adapter
    out = fuse_adapter(tiny_sd, folder, tmp_path / "fused", weight=2.0)
    before, after = (load_file(next((place / "unet").glob("*.safetensors"))) for place in (tiny_sd, out))
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert changed == [f"{MODULE}.weight"]
    expected = before[changed[0]].float() + 2.0 * 0.5 * factors.up @ factors.down
    torch.testing.assert_close(after[changed[0]], expected.to(before[changed[0]].dtype))
    for file in tiny_sd.rglob("*.json"):
        assert (out / file.relative_to(tiny_sd)).read_bytes() == file.read_bytes()


def test_it_generates_what_the_adapter_beside_the_model_does(tiny_sd, adapter, tmp_path):
    from valign.models.diffusion.lora import load_adapter

    fused = load_model(fuse_adapter(tiny_sd, adapter[0], tmp_path / "fused"), device="cpu", dtype="float32")
    beside = load_model(tiny_sd, device="cpu", dtype="float32")
    load_adapter(beside, adapter[0], name="beside")
    text = beside.encode_prompts(["a red thing"])
    noisy = torch.randn(1, *beside.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, other = (model.predict(noisy, torch.tensor([500]), text) for model in (fused, beside))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused(tiny_sd, tiny_sd_v, adapter, tmp_path):
    with pytest.raises(UserError, match=r"was made for another model than .*: base model"):
        fuse_adapter(tiny_sd_v, adapter[0], tmp_path / "fused")
    said = {"prediction": "epsilon"}  # all that this record says
    save_adapter(tmp_path / "half", {MODULE: adapter[1]}, metadata=said, prefix="unet.")
    with pytest.raises(UserError, match="prediction type epsilon, not velocity"):
        fuse_adapter(tiny_sd_v, tmp_path / "half", tmp_path / "fused")
    save_adapter(tmp_path / "odd", {"nothing.here": adapter[1]}, metadata={}, prefix="unet.")
    with pytest.raises(UserError, match=r"a change of nothing\.here, which the model has not"):
        fuse_adapter(tiny_sd, tmp_path / "odd", tmp_path / "fused")
    assert not (tmp_path / "fused").exists()
    fuse_adapter(tiny_sd, adapter[0], tmp_path / "fused")
    with pytest.raises(UserError, match="exists"):
        fuse_adapter(tiny_sd, adapter[0], tmp_path / "fused")
