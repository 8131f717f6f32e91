"""The law of forgetting, fitted to runs that follow it."""

import numpy as np
import pytest

from valign.checks import UserError
from valign.evaluation.driftcheck.forgetting_law import fit_forgetting_law

TOKENS = np.tile([1e5, 1e6, 1e7, 1e8], 2)
SIZES = np.repeat([1e8, 1e9], 4)


def law(tokens, sizes, floor=0.0):
    return 3.0 * tokens**0.4 / sizes**0.3 + floor


def test_exact_runs_give_the_constants():
    found = fit_forgetting_law(TOKENS, SIZES, law(TOKENS, SIZES), samples=100)
    assert found.amplitude.value == pytest.approx(3.0, rel=1e-6)
    assert found.beta.value == pytest.approx(0.4)
    assert found.alpha.value == pytest.approx(0.3)
    assert found.floor.value == 0
    assert found.error < 1e-9
    assert found.rise(1e6, 1e9) == pytest.approx(law(1e6, 1e9))


def test_a_floor_is_found_on_its_grid():
    rise = law(TOKENS, SIZES, floor=0.5)
    found = fit_forgetting_law(TOKENS, SIZES, rise, samples=100)
    assert found.floor.value == pytest.approx(0.5, abs=rise.min() / 200)
    assert found.beta.value == pytest.approx(0.4, abs=0.02)


def test_noise_widens_the_intervals_around_the_truth():
    noise = np.exp(np.random.default_rng(0).normal(0, 0.05, len(TOKENS)))
    found = fit_forgetting_law(TOKENS, SIZES, law(TOKENS, SIZES) * noise, samples=200)
    assert found.beta.low < 0.4 < found.beta.high
    assert found.beta.high - found.beta.low > 1e-3


def test_models_of_one_size_have_no_exponent_of_size():
    found = fit_forgetting_law(TOKENS[:4], SIZES[:4], law(TOKENS[:4], SIZES[:4]), samples=100)
    assert found.alpha is None
    assert found.beta.value == pytest.approx(0.4)
    assert found.rise(1e6, 5.0) == pytest.approx(law(1e6, 1e8))


def test_forgetting_that_falls_with_tokens_has_exponent_zero():
    assert fit_forgetting_law(TOKENS, SIZES, 1 / TOKENS, samples=100).beta.value == 0


@pytest.mark.parametrize(
    ("tokens", "rise", "message"),
    [
        (TOKENS[:3], TOKENS[:3], "at least 4 runs"),
        (TOKENS, -TOKENS, "above 0 and finite"),
        (np.ones(8), TOKENS, "at least two numbers of tokens"),
    ],
)
def test_bad_runs_are_refused(tokens, rise, message):
    with pytest.raises(UserError, match=message):
        fit_forgetting_law(tokens, SIZES[: len(tokens)], rise)
