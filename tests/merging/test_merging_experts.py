"""Experts that do not belong together are refused, with the modules named."""

import pytest
import torch
from expert_data import SHAPES, random_factors
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.merging import Expert, compatible
from valign.models.files.adapter_files import WEIGHTS, open_adapter


def test_weight_multiplies_the_dense_delta(make_expert):
    factors = random_factors()
    expert = make_expert("a", factors, weight=-1.5)
    for module, lora in factors.items():
        assert torch.allclose(expert.factors(module).delta(), -1.5 * lora.delta(), atol=1e-6)


def test_compatible_gives_the_modules(three):
    assert compatible("test", three) == sorted(SHAPES)


def test_lists_modules_that_only_one_has(make_expert):
    other = {**random_factors(), "up_blocks.9.to_q": random_factors()["mid_block.to_v"]}
    with pytest.raises(UserError, match=r"the same modules; only one of a and b has up_blocks\.9\.to_q"):
        compatible("test", [make_expert("a", random_factors()), make_expert("b", other)])


def test_lists_shapes_that_differ(make_expert):
    other = random_factors({**SHAPES, "mid_block.to_v": (6, 10)})
    with pytest.raises(UserError, match=r"a and b differ in mid_block\.to_v \(\(6, 9\) and \(6, 10\)\)"):
        compatible("test", [make_expert("a", random_factors()), make_expert("b", other)])


def test_lists_ranks_only_where_they_must_be_equal(three):
    with pytest.raises(UserError, match=r"the same rank.*down_blocks\.0\.to_q \(2 and 3\)"):
        compatible("test", three, equal_ranks=True)


def test_names_the_module_with_nan(make_expert, tmp_path):
    expert = make_expert("a", random_factors())
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    tensors["unet.mid_block.to_v.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / WEIGHTS)
    broken = Expert("a", open_adapter(tmp_path / "a"))
    with pytest.raises(UserError, match=r"mid_block\.to_v\.lora_B\.weight must be finite, got NaN or infinity"):
        compatible("test", [broken])
    assert compatible("test", [broken], finite=False) == expert.file.modules


def test_an_unknown_base_is_taken_on_trust(make_expert):
    known, unknown = make_expert("a", random_factors()), make_expert("b", random_factors(), base_fingerprint=None)
    assert compatible("test", [known, unknown])


def test_weight_must_be_finite(make_expert):
    with pytest.raises(ValueError, match=r"Expert\(a\)\.weight must be in"):
        make_expert("a", random_factors(), weight=float("inf"))


def test_bases_that_differ_are_listed(make_expert):
    experts = [make_expert("a", random_factors()), make_expert("b", random_factors(), base_fingerprint="c" * 64)]
    with pytest.raises(UserError, match=r".") as caught:
        compatible("test", experts)
    assert str(caught.value) == (
        "test.experts must come from one base model, got a bbbbbbbbbbbb, b cccccccccccc. "
        "Train them on one, or go on anyway (--anyway)."
    )
