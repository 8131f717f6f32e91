import json

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.editing.uce import ConceptEdit, closed_form, edit_concepts, token_states
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.lora import attach_lora, load_adapter, unload_adapters
from valign.models.files.adapter_files import open_adapter, save_adapter


def tensors(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def dense(w, e, g, p, lam, a, b):
    """The paper's formula, sum by sum, in NumPy."""
    w, e, g, p = (tensor.numpy() for tensor in (w, e, g, p))
    left, system = lam * w, lam * np.eye(w.shape[1])
    for row, guide in zip(e, g, strict=True):
        left, system = left + a * np.outer(w @ guide, row), system + a * np.outer(row, row)
    for row in p:
        left, system = left + b * np.outer(w @ row, row), system + b * np.outer(row, row)
    return left @ np.linalg.inv(system)


@pytest.mark.parametrize(("lam", "a", "b"), [(0.5, 1.0, 1.0), (0.1, 1.0, 0.1), (2.0, 3.0, 0.0)])
def test_the_low_rank_form_is_the_dense_formula(lam, a, b):
    w, e, g, p = tensors((5, 12), (3, 12), (3, 12), (4, 12))
    lora = closed_form(w, e, g, p, lam=lam, erase_scale=a, preserve_scale=b)
    assert lora.rank == 3
    np.testing.assert_allclose(w.numpy() + lora.delta().double().numpy(), dense(w, e, g, p, lam, a, b), atol=2e-6)


def test_a_guide_equal_to_the_concept_changes_nothing():
    w, e, p = tensors((5, 12), (3, 12), (4, 12))
    assert (closed_form(w, e, e, p).delta() == 0).all()


def test_a_strong_edit_reaches_the_guide_and_a_strong_hold_keeps():
    w, e, g, p = tensors((5, 12), (3, 12), (3, 12), (4, 12))
    erased = w + closed_form(w, e, g, p, erase_scale=1e7).delta().double()
    assert_close(erased @ e.T, w @ g.T, atol=1e-4, rtol=0)
    held = w + closed_form(w, e, g, p, preserve_scale=1e7).delta().double()
    assert_close(held @ p.T, w @ p.T, atol=1e-4, rtol=0)
    assert (held @ e.T - w @ e.T).abs().max() > 0.1


def test_what_is_orthogonal_to_every_concept_is_mapped_as_before():
    w, e, g, x = tensors((5, 12), (3, 12), (3, 12), (6, 12))
    basis = torch.linalg.qr(e.T).Q
    x = x - x @ basis @ basis.T
    delta = closed_form(w, e, g, e[:0]).delta().double()
    assert_close(delta @ x.T, torch.zeros(5, 6, dtype=torch.float64), atol=1e-5, rtol=0)
    assert (delta @ e.T).abs().max() > 0.1


@pytest.mark.parametrize("family", ["tiny_sd", "tiny_sd_v", "tiny_sdxl"])
def test_every_family_gets_an_adapter_that_diffusers_loads(family, request, tmp_path):
    model = load_model(request.getfixturevalue(family), device="cpu")
    edit = ConceptEdit(concepts=("a red cat", "gun"), guides=("a blue dog",), preserve=("house",), lam=1e-3)
    factors = edit_concepts(model, edit)
    width = model.denoiser.config.cross_attention_dim
    assert factors
    assert all(name.endswith(("attn2.to_k", "attn2.to_v")) for name in factors)
    assert {lora.rank for lora in factors.values()} == {2}
    assert {lora.shape[1] for lora in factors.values()} == {width}
    save_adapter(tmp_path / "uce", factors, metadata={"method": "uce"})
    assert json.loads((tmp_path / "uce" / "valign.json").read_text())["method"] == "uce"
    base = {name: model.denoiser.get_submodule(name).weight.detach().clone() for name in factors}
    states = token_states(model, ["a red cat", "gun", "a blue dog", "house"])
    load_adapter(model, tmp_path / "uce", name="uce")
    for name, weight in base.items():
        layer = model.denoiser.get_submodule(name)
        cat, gun, _, house = layer(states)
        wanted = states @ weight.T
        assert_close(layer.get_base_layer().weight, weight, rtol=0, atol=0)  # the model's own weight is not touched
        for found in (cat, gun):  # the card's bar: within one per cent
            assert (found - wanted[2]).norm() < 0.01 * wanted[2].norm()
        assert (house - wanted[3]).norm() < 0.01 * wanted[3].norm()
    unload_adapters(model)
    model.pipe.load_lora_weights(str(tmp_path / "uce"))
    name = next(iter(base))
    assert_close(model.denoiser.get_submodule(name)(states)[0], base[name] @ states[2], rtol=1e-2, atol=1e-2)
    assert open_adapter(tmp_path / "uce").modules == sorted(factors)


def test_the_last_word_is_before_the_end_and_of_nothing_it_is_the_start(tiny_sd, tiny_sdxl):
    model = load_model(tiny_sd, device="cpu")
    whole = model.encode_prompts(["cat"]).embeds[0]
    length = int(model.pipe.tokenizer(["cat"], return_tensors="pt").input_ids.shape[1])
    assert_close(token_states(model, ["cat"])[0], whole[length - 2], rtol=0, atol=0)
    assert_close(token_states(model, [""])[0], whole[0], rtol=1e-5, atol=1e-6)  # causal: the start sees nothing of the text
    assert token_states(model, ["cat", ""], "all").shape == (2 * whole.shape[0], whole.shape[1])
    xl = load_model(tiny_sdxl, device="cpu")
    assert xl.encode_prompts([""]).embeds.abs().sum() == 0  # the unconditional branch ...
    assert token_states(xl, [""]).abs().sum() > 0  # ... is no content to move a concept to


def test_all_tokens_give_the_rank_of_the_text(tiny_sd):
    model = load_model(tiny_sd, device="cpu")
    factors = edit_concepts(model, ConceptEdit(concepts=("cat",), tokens="all"))
    assert {lora.rank for lora in factors.values()} == {model.pipe.tokenizer.model_max_length}


def test_wordings_multiply_concepts_but_not_the_empty_guide():
    edit = ConceptEdit(concepts=("cat", "dog"), guides=("", "wolf"), template="art")
    assert len(edit.pairs()) == 12
    assert edit.pairs()[1] == ("painting by cat", "")
    assert edit.pairs()[7] == ("painting by dog", "painting by wolf")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"concepts": ()}, "Name at least one concept"),
        ({"concepts": ("cat", " ")}, "must be texts"),
        ({"concepts": ("a", "b", "c"), "guides": ("x", "y")}, r"one per concept \(3\), got 2"),
        ({"concepts": ("cat",), "preserve": ("dog", "cat ")}, "got cat in both"),
        ({"concepts": ("cat",), "lam": 0.0}, r"ConceptEdit\.lam must be in \(0, inf\)"),
        ({"concepts": ("cat",), "erase_scale": float("nan")}, r"ConceptEdit\.erase_scale must be in"),
        ({"concepts": ("cat",), "template": "song"}, "must be one of none, object, art; got 'song'"),
    ],
)
def test_refuses_bad_input(options, text):
    with pytest.raises(ValueError, match=text):
        ConceptEdit(**options)


def test_refuses_a_model_with_an_adapter_or_without_a_number(tiny_sd):
    model = load_model(tiny_sd, device="cpu")
    edit = ConceptEdit(concepts=("cat",))
    attach_lora(model, rank=1)
    with pytest.raises(UserError, match="needs a bare model"):
        edit_concepts(model, edit)
    unload_adapters(model)
    name = next(name for name, _ in model.denoiser.named_modules() if name.endswith("attn2.to_k"))
    with torch.no_grad():
        model.denoiser.get_submodule(name).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=f"got others in {name}"):
        edit_concepts(model, edit)
