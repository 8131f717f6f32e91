"""A probe's probabilities by hand, its files, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from valign.checks import UserError
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.prompt_states import prompt_states, text_fingerprint
from valign.models.heads.text_probe import CARD, WEIGHTS, TextProbe, load_probe, probe_probabilities, save_probe

PROMPTS = ["a red man", "the blue woman"]


@pytest.fixture(scope="module")
def model(tiny_sd):
    return load_model(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def probe(model):
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 32, generator=generator), torch.randn(3, generator=generator)
    return TextProbe(model, ("hate", "violence"), weight, bias, 0.25, {"threshold_set": "given", "measured": None})


def test_probabilities_by_hand(probe, model):
    states = prompt_states(model, PROMPTS).double().numpy()
    for row, state in zip(probe.probabilities(PROMPTS), states):
        logits = [sum(w * x for w, x in zip(line, state)) + b for line, b in zip(probe.weight.tolist(), probe.bias.tolist())]
        powers = np.exp(logits)
        assert np.allclose(row, powers / powers.sum(), rtol=1e-9)


def test_large_logits_stay_probabilities():
    found = probe_probabilities(torch.tensor([[1.0]]), torch.tensor([[1e6], [-1e6]]), torch.zeros(2))
    assert found.tolist() == [[1.0, 0.0]]


@pytest.mark.parametrize("given", ["", WEIGHTS])
def test_files_give_the_same_probe(probe, model, tmp_path, given):
    save_probe(tmp_path, probe)
    found = load_probe(tmp_path / given, model)
    assert_close(found.weight, probe.weight, rtol=0, atol=0)
    assert (found.categories, found.threshold, found.notes) == (probe.categories, 0.25, probe.notes)
    assert found.fingerprint() == probe.fingerprint()
    assert np.array_equal(found.probabilities(PROMPTS), probe.probabilities(PROMPTS))
    card = json.loads((tmp_path / CARD).read_text())
    assert (card["text_encoders"], card["family"], card["width"]) == (text_fingerprint(model), "stable-diffusion", 32)


def test_the_fingerprint_changes_with_every_number(probe, model):
    weight = probe.weight.clone()
    weight[0, 0] += 1e-3
    others = [
        TextProbe(model, probe.categories, weight, probe.bias, 0.25),
        TextProbe(model, probe.categories, probe.weight, probe.bias, 0.3),
        TextProbe(model, ("hate", "sexual"), probe.weight, probe.bias, 0.25),
    ]
    assert len({one.fingerprint() for one in (probe, *others)}) == 4


def test_it_belongs_to_the_text_encoders_alone(probe, tiny_sd_v, tiny_sdxl, tmp_path):
    save_probe(tmp_path, probe)
    with pytest.raises(
        UserError, match=r"was fitted on text encoders .* \(stable-diffusion\), .* \(sdxl\)\. Use a model with those"
    ):
        load_probe(tmp_path, load_model(tiny_sdxl, device="cpu"))
    other = load_model(tiny_sd_v, device="cpu")  # another denoiser on the same text encoder
    assert other.fingerprint() != probe.model.fingerprint()
    assert load_probe(tmp_path, other).probabilities(PROMPTS).shape == (2, 3)


@pytest.mark.usefixtures("as_in_use")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"weight": torch.zeros(3, 64)},
            r"TextProbe\.weight must be \(3, 32\) for 2 categories on the text encoders of .*, got \(3, 64\)",
        ),
        ({"bias": torch.zeros(2)}, r"got \(3, 32\) with a bias of \(2,\)"),
        ({"weight": torch.full((3, 32), float("nan"))}, "must be finite, got NaN or infinity"),
        ({"bias": torch.tensor([0.0, 0.0, float("inf")])}, "must be finite, got NaN or infinity"),
        ({"categories": ()}, r"must be one or more distinct ids, got \(\)"),
        ({"categories": ("hate", "hate")}, "must be one or more distinct ids"),
        ({"threshold": 0.0}, r"TextProbe\.threshold must be in \(0, 1\], got 0\.0"),
        ({"threshold": float("nan")}, r"TextProbe\.threshold must be in \(0, 1\], got nan"),
    ],
)
def test_refuses_what_does_not_fit(probe, change, says):
    given = {name: getattr(probe, name) for name in ("model", "categories", "weight", "bias", "threshold")}
    with pytest.raises(ValueError, match=says):
        TextProbe(**given | change)


def test_damaged_files_say_so(probe, model, tmp_path):
    with pytest.raises(UserError, match=r"text_probe\.json does not exist"):
        load_probe(tmp_path, model)
    save_probe(tmp_path, probe)
    save_file({"weight": probe.weight}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=r"could not be read: 'bias'\. Copy both files again"):
        load_probe(tmp_path, model)
    save_file({"weight": torch.full((3, 32), float("inf")), "bias": probe.bias}, tmp_path / WEIGHTS)
    with pytest.raises(UserError, match="must be finite"):
        load_probe(tmp_path, model)
    (tmp_path / WEIGHTS).write_bytes(b"no tensors")
    with pytest.raises(UserError, match="could not be read"):
        load_probe(tmp_path, model)
    (tmp_path / CARD).write_text('{"format": 7}')
    with pytest.raises(UserError, match="must be the card of a text probe of format 1"):
        load_probe(tmp_path, model)


def test_an_encoder_that_overflows_is_no_harmless_prompt(probe, monkeypatch):
    monkeypatch.setattr(
        "valign.models.heads.text_probe.prompt_states", lambda model, prompts: torch.full((len(prompts), 32), torch.nan)
    )
    with pytest.raises(UserError, match="must answer finite numbers, got NaN or infinity"):
        probe.probabilities(PROMPTS)
