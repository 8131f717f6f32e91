"""Logistic regression held against its own optimality condition, in plain NumPy."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from valign.checks import UserError
from valign.training.tasks.text_probe import TextProbeConfig, fit_text_probe


def data(seed, classes, rows=40, dim=5):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, dim, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 1.0, 2.0]) + 3
    names = [(), *((name,) for name in classes)]
    return states, [names[row % len(names)] for row in range(rows)]


def gradient(states, labels, classes, found, fit):
    """Of ``fit * sum_i cross_entropy_i + |W|^2 / 2`` in the standardized weights and the biases; 0 at the optimum."""
    x = states.double().numpy()
    mean, spread = x.mean(0), x.std(0)
    weight = found.weight.double().numpy() * spread
    logits = x @ found.weight.double().numpy().T + found.bias.double().numpy()
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    known = ["", *classes]
    y = np.array([[(name in names or (not names and not name)) / max(len(names), 1) for name in known] for names in labels])
    return fit * (p - y).T @ ((x - mean) / spread) + weight, (p - y).sum(0)


@pytest.mark.parametrize("fit", [0.1, 1.0, 10.0])
def test_the_fit_is_the_optimum(fit):
    states, labels = data(0, ("hate", "violence"))
    labels[1], labels[4] = ("hate", "violence"), ("hate", "violence")
    found = fit_text_probe(states, labels, ("hate", "violence"), fit=fit)
    for part in gradient(states, labels, ("hate", "violence"), found, fit):
        assert np.abs(part).max() < 1e-3 * fit + 1e-4


def test_one_category_has_the_same_probabilities_as_one_logit():
    states, labels = data(1, ("hate",))
    found = fit_text_probe(states, labels, ("hate",))
    assert not found.weight[0].any()
    slope, constant = gradient(states, labels, ("hate",), found, 1.0)
    assert np.abs(slope[1]).max() < 1e-3
    assert abs(constant[1]) < 1e-3


def test_scales_of_the_states_do_not_matter():
    states, labels = data(2, ("hate", "violence"))
    found = fit_text_probe(states, labels, ("hate", "violence"))
    scaled = fit_text_probe(states * 100 + 7, labels, ("hate", "violence"))
    assert_close((states * 100 + 7) @ scaled.weight.T + scaled.bias, states @ found.weight.T + found.bias, rtol=1e-2, atol=1e-2)


def test_a_constant_state_gets_no_weight():
    states, labels = data(3, ("hate",))
    states[:, 2] = 4.0
    assert not fit_text_probe(states, labels, ("hate",)).weight[:, 2].any()


def test_every_class_needs_a_prompt():
    states, labels = data(4, ("hate",))
    with pytest.raises(UserError, match=r"must have a prompt of every class, got none of violence\. Add some"):
        fit_text_probe(states, labels, ("hate", "violence"))
    with pytest.raises(UserError, match="got none of harmless"):
        fit_text_probe(states, [("hate",)] * len(labels), ("hate",))


@pytest.mark.parametrize(("name", "value"), [("fit", 0.0), ("threshold", 1.5), ("false_alarms", 0.0)])
def test_options_have_ranges(name, value):
    with pytest.raises(ValueError, match=rf"TextProbeConfig\.{name} must be in"):
        TextProbeConfig(**{name: value})
