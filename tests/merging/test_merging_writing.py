"""A merge on disk: loadable, with its whole recipe, and without the machine's paths."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from expert_data import SHAPES
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging import kernels_of, merge_metadata, merge_sum, merge_ties, write_merge
from valign.merging.calibration import check_model
from valign.models.files.adapter_files import WEIGHTS, LoraFactors, open_adapter


def test_recipe_and_card_lie_beside_the_weights(three, tmp_path):
    errors = {}
    metadata = merge_metadata("ties", three, {"density": 0.5})
    summary = write_merge(merge_ties(three, density=0.5, rank=2, errors=errors), tmp_path / "out", metadata, errors=errors)
    config = yaml.safe_load((tmp_path / "out" / "merge_config.yml").read_text())
    assert config["merge_method"] == "ties"
    assert config["options"] == {"density": 0.5}
    assert config["base_fingerprint"] == "b" * 64
    assert [(s["name"], s["weight"], s["category"], s["sha256"]) for s in config["sources"]] == [
        (expert.name, 1.0, expert.name, expert.file.fingerprint()) for expert in three
    ]
    assert config["weights_sum"] == 3.0
    assert config["result"] == summary
    assert summary["modules"] == 3
    assert summary["ranks"] == [2, 2]
    assert summary["parameters"] == 2 * sum(o + i for o, i in SHAPES.values())
    assert summary["error_worst"] == max(errors.values()) >= summary["error_mean"] > 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "ties of hate, shocking, violence" in card
    assert str(tmp_path) not in card + (tmp_path / "out" / "merge_config.yml").read_text()
    assert open_adapter(tmp_path / "out").metadata["merge_method"] == "ties"


def test_the_keys_have_the_prefix_of_the_experts(three, tmp_path):
    assert three[0].file.prefix == "unet."
    write_merge(merge_sum(three), tmp_path / "out", merge_metadata("sum", three, {}), prefix="denoiser.")
    assert all(key.startswith("denoiser.") for key in load_file(tmp_path / "out" / WEIGHTS))


def test_a_merge_that_breaks_leaves_no_adapter(three, tmp_path):
    def breaks():
        yield next(merge_sum(three))
        raise RuntimeError("disk pulled")

    with pytest.raises(RuntimeError):
        write_merge(breaks(), tmp_path / "out", merge_metadata("sum", three, {}))
    assert not (tmp_path / "out" / WEIGHTS).exists()


def test_differing_bases_are_not_claimed(three, make_expert):
    from expert_data import random_factors

    stranger = make_expert("stranger", random_factors(), base_fingerprint="c" * 64)
    assert "base_fingerprint" not in merge_metadata("sum", [three[0], stranger], {})
    silent = make_expert("silent", random_factors(), base_fingerprint=None)
    assert "base_fingerprint" not in merge_metadata("sum", [three[0], silent], {})  # what one does not say is unknown of all


def test_a_merge_without_a_record_still_has_a_card(three, tmp_path):
    summary = write_merge(merge_sum(three), tmp_path / "out", {})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A LoRA adapter, made by valign (LoRA)." in card
    assert 'pipe.load_lora_weights("out")' in card
    assert summary == {"modules": 3, "parameters": 9 * sum(o + i for o, i in SHAPES.values()), "ranks": [9, 9]}


def test_convolutions_and_text_encoders_are_merged_and_keep_their_form(make_expert, tmp_path, as_in_use):
    text = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    experts = []
    for name in ("one", "two"):
        generator = torch.Generator().manual_seed(len(experts))
        conv = torch.randn(2, 6 * 9, generator=generator), torch.randn(4, 2, generator=generator), 1.0, (3, 3)
        factors = {"mid_block.resnets.0.conv1": LoraFactors(*conv), text: LoraFactors(torch.ones(2, 5), torch.ones(4, 2), 1.0)}
        experts.append(make_expert(name, factors))
    write_merge(merge_sum(experts), tmp_path / "out", merge_metadata("sum", experts, {}), kernels=kernels_of(experts))
    saved = load_file(tmp_path / "out" / WEIGHTS)
    assert saved["unet.mid_block.resnets.0.conv1.lora_A.weight"].shape == (4, 6, 3, 3)
    assert saved[f"{text}.lora_A.weight"].shape == (4, 5)
    for module, lora in open_adapter(tmp_path / "out").items():
        expected = sum(expert.factors(module).delta() for expert in experts)
        assert_close(lora.delta(), expected)
    with pytest.raises(
        UserError, match=r"looks at the inputs and outputs of the U-Net's linear layers, got experts that also adapt mid"
    ):
        check_model("co_merge", SimpleNamespace(denoiser=nn.Module()), experts, experts[0].file.modules, False)
