"""Rank reduction: as good as the dense SVD, and honest about its error."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.merging.compress import compress, compress_dense, spectrum
from valign.merging.deltas import DenseDelta
from valign.models.files.adapter_files import LoraFactors


def random_lora(fan_out, fan_in, rank, seed, scale=0.7):
    g = torch.Generator().manual_seed(seed)
    return LoraFactors(torch.randn(rank, fan_in, generator=g), torch.randn(fan_out, rank, generator=g), scale)


sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))


@settings(max_examples=25, deadline=None)
@given(sizes, st.data())
def test_equals_the_dense_svd(size, data):
    lora = random_lora(*size)
    rank = data.draw(st.integers(1, lora.rank))
    u, s, vt = np.linalg.svd(lora.delta().double().numpy(), full_matrices=False)  # the slow, obvious way
    kept = min(rank, len(s))
    result, error = compress(lora, rank)
    assert_close(result.delta().numpy(), ((u[:, :kept] * s[:kept]) @ vt[:kept]).astype("float32"), rtol=1e-3, atol=1e-4)
    assert error**2 * (s**2).sum() == pytest.approx((s[kept:] ** 2).sum(), rel=1e-4, abs=1e-8 * (s**2).sum())
    assert_close(spectrum(lora)[: len(s)].numpy(), s[: lora.rank], rtol=1e-4, atol=1e-4 * s[0])


def test_full_rank_is_exact():
    lora = random_lora(12, 10, 4, seed=0)
    result, error = compress(lora, 4)
    assert error == 0
    assert_close(result.delta(), lora.delta(), rtol=1e-5, atol=1e-6)


def test_factors_are_balanced_with_fixed_signs():
    result, _ = compress(random_lora(12, 10, 4, seed=1), 3)
    assert_close(result.up.norm(dim=0), result.down.norm(dim=1))
    assert (result.up.gather(0, result.up.abs().argmax(0, keepdim=True)) > 0).all()


def test_dense_matrix_is_truncated_the_same_way():
    lora = random_lora(9, 7, 5, seed=2)
    (a, error_a), (b, error_b) = compress(lora, 2), compress_dense(lora.delta(), 2)
    assert_close(a.delta(), b.delta(), rtol=1e-4, atol=1e-5)
    assert error_a == pytest.approx(error_b, rel=1e-4)
    whole, error = compress_dense(lora.delta(), 99)  # clipped to the matrix
    assert (whole.rank, error) == (7, 0)


def test_zero_stays_zero():
    result, error = compress(LoraFactors(torch.ones(2, 3), torch.zeros(4, 2), 1.0), 1)
    assert error == 0
    assert result.delta().abs().max() == 0


@pytest.mark.parametrize("bad", [0, 5])
def test_refuses_ranks_that_are_not_there(bad):
    with pytest.raises(ValueError, match=r"compress\.rank must be in \[1, 4\], got"):
        compress(random_lora(9, 9, 4, seed=0), bad)


def test_the_spectrum_of_a_matrix_is_that_of_its_factors():
    lora = random_lora(9, 7, 3, seed=5)
    values = np.linalg.svd(lora.delta().double().numpy(), compute_uv=False)
    dense = spectrum(DenseDelta(lora.delta()))
    assert (dense.shape, dense.dtype) == ((7,), torch.float64)
    assert_close(dense.numpy(), values, rtol=1e-6, atol=1e-6)
    assert_close(spectrum(lora).numpy(), values[:3], rtol=1e-5, atol=1e-5)
