"""An adapter says which model it was made for, and another one refuses it."""

import logging

import pytest
import torch
from safetensors.torch import save_file

from valign.checks import UserError
from valign.evaluation import adapter_system
from valign.interfaces import SamplingConfig
from valign.models.diffusion.adapter_base import base_record, check_base, recorded_prediction
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import adapter_names, load_adapter, unload_adapters
from valign.models.files.adapter_base import _warn
from valign.models.files.adapter_files import WEIGHTS, LoraFactors, open_adapter, save_adapter

MODULE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture
def model(tiny_sd):
    _warn.cache_clear()
    return load_model(str(tiny_sd), device="cpu")


@pytest.fixture
def make(model, tmp_path):
    width = model.denoiser.get_submodule(MODULE).weight.shape[0]

    def save(**metadata):
        save_adapter(tmp_path / "a", {MODULE: LoraFactors(torch.ones(2, width), torch.ones(width, 2), 1.0)}, metadata=metadata)
        return tmp_path / "a"

    return save


def test_the_model_that_it_was_made_for_takes_it_in_silence(model, make, caplog):
    load_adapter(model, make(**base_record(model)), name="a")
    assert adapter_names(model) == ["a"]
    assert not caplog.records
    unload_adapters(model)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"base_fingerprint": "f" * 64}, r"base model .* ffffffffffff, not"),
        ({"prediction": "velocity"}, r"prediction type velocity, not epsilon"),
        ({"family": "sdxl"}, r"family sdxl, not stable-diffusion"),
    ],
)
def test_another_model_refuses_it_unless_told_otherwise(model, make, caplog, other, says):
    folder = make(**base_record(model) | other)
    with pytest.raises(UserError, match=rf"was made for another model than .*: {says}.*use it anyway \(--anyway\)"):
        load_adapter(model, folder, name="a")
    assert adapter_names(model) == []
    with pytest.raises(UserError, match=says):  # before any image
        adapter_system(model, folder, SamplingConfig(), name="a")
    adapter_system(model, folder, SamplingConfig(), name="a", anyway=True)
    load_adapter(model, folder, name="a", anyway=True)
    assert "It is used anyway." in caplog.text
    unload_adapters(model)


def test_what_the_record_does_not_say_is_named_once(model, make, caplog):
    file = open_adapter(make())
    with caplog.at_level(logging.WARNING):
        check_base(model, file)
        check_base(model, file)
    (said,) = caplog.records
    assert "has no record of its base model, family, prediction type: whether it was made for" in said.getMessage()


def test_kohyas_header_tells_the_prediction(model, make, tmp_path):
    folder = make()
    tensors = {f"unet.{MODULE}.lora_A.weight": torch.ones(2, 4), f"unet.{MODULE}.lora_B.weight": torch.ones(4, 2)}
    (folder / "valign.json").unlink()
    save_file(tensors, folder / WEIGHTS, metadata={"ss_v_parameterization": "True"})
    assert recorded_prediction(open_adapter(folder)) == "velocity"
    with pytest.raises(UserError, match="prediction type velocity, not epsilon"):
        check_base(model, open_adapter(folder))
