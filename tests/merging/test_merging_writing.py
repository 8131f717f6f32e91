"""A merge on disk: loadable, with its whole recipe, and without the machine's paths."""

import pytest
import yaml
from expert_data import SHAPES
from safetensors.torch import load_file

from valign.merging import merge_metadata, merge_sum, merge_ties, write_merge
from valign.models.files.adapter_files import WEIGHTS, open_adapter


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


def test_a_merge_without_a_record_still_has_a_card(three, tmp_path):
    summary = write_merge(merge_sum(three), tmp_path / "out", {})
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A LoRA adapter, made by valign (LoRA)." in card
    assert 'pipe.load_lora_weights("out")' in card
    assert summary == {"modules": 3, "parameters": 9 * sum(o + i for o, i in SHAPES.values()), "ranks": [9, 9]}
