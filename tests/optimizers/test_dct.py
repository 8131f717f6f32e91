"""The cosine basis against SciPy, the choice of columns against every other choice, the packed store against its own bound."""

from itertools import combinations

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from valign.optimizers.dct import (
    carry,
    coordinates,
    dct_matrix,
    dct_rows,
    newton_schulz,
    pack,
    recall,
    remember,
    select,
    unpack,
    vectors,
)

sizes = st.integers(1, 17)


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(sizes)
def test_the_matrix_is_the_orthonormal_dct(n):
    matrix = dct_matrix(n)
    assert_close(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix.numpy(), scipy.fft.dct(np.eye(n), type=2, norm="ortho", axis=0), atol=1e-12)


@given(sizes, st.integers(1, 5), st.integers(0, 9))
def test_one_fft_gives_the_same_as_the_product(n, rows, seed):
    x = random(rows, n, seed)
    np.testing.assert_allclose(dct_rows(x).numpy(), scipy.fft.dct(x.numpy(), type=2, norm="ortho", axis=1), atol=1e-12)
    assert_close(coordinates(x, "dct2", "fft"), coordinates(x, "dct2", "matmul"))
    assert_close(coordinates(x, "dct2", "matmul"), x @ dct_matrix(n).T)
    assert_close(coordinates(x, "dct3", "matmul"), x @ dct_matrix(n))  # the inverse transform of the rows


def test_half_precision_is_transformed_in_float32():
    x = random(3, 8).half()
    assert dct_rows(x).dtype == torch.float16
    assert_close(dct_rows(x).double(), dct_rows(x.double()), rtol=0, atol=2e-3)


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 30))
def test_the_strongest_columns_lose_least(rank, rows, seed):
    matrix, basis = random(rows, 6, seed), vectors(6, "dct2", random(1, 1))
    found = matrix @ basis
    chosen = select(found, rank)
    assert chosen.tolist() == sorted(chosen.tolist())

    def loss(columns):
        kept = basis[:, list(columns)]
        return (matrix - matrix @ kept @ kept.T).square().sum().item()

    least = min(loss(columns) for columns in combinations(range(6), rank))
    assert loss(chosen.tolist()) == pytest.approx(least, abs=1e-9)
    if rank == 6:
        assert_close(found[:, chosen] @ basis[:, chosen].T, matrix)  # all of them lose nothing
    energy = matrix.square().sum() - found[:, chosen].square().sum()
    assert loss(chosen.tolist()) == pytest.approx(energy.item(), abs=1e-9)
    assert loss(chosen.tolist()) <= (1 - rank / 6) * matrix.square().sum().item() + 1e-9


def relative_errors(matrix, rank):
    """What is lost by the best rank (SVD), by the best cosines, and by the best of a random basis."""
    n = matrix.shape[1]
    basis = torch.linalg.qr(random(n, n, seed=99)).Q
    best = torch.linalg.svdvals(matrix)[rank:].square().sum()
    losses = [best]
    for q in (vectors(n, "dct2", matrix), basis):
        found = matrix @ q
        losses.append(matrix.square().sum() - found[:, select(found, rank)].square().sum())
    return [float((loss / matrix.square().sum()).sqrt()) for loss in losses]


def test_cosines_come_near_an_svd_only_where_neighbouring_columns_are_alike():
    """n = 64, r = 16; columns correlated as AR(1) with 0.95, and a generic rank-4 matrix with noise."""
    noise = random(64, 64, seed=1)
    alike = [noise[:, 0]]
    for j in range(1, 64):
        alike.append(0.95 * alike[-1] + (1 - 0.95**2) ** 0.5 * noise[:, j])
    svd, cosines, other = relative_errors(torch.stack(alike, 1), 16)
    assert svd < cosines < 1.25 * svd
    assert cosines < 0.4 * other
    generic = random(64, 4, seed=2) @ random(4, 64, seed=3) + 0.05 * random(64, 64, seed=4)
    svd, cosines, other = relative_errors(generic, 16)
    assert svd < 0.1
    assert cosines > 0.9 * other  # no better than a random basis


def test_equal_columns_are_taken_in_order():
    assert select(torch.ones(2, 5), 3).tolist() == [0, 1, 2]
    assert select(torch.tensor([[3.0, 2.5], [0.0, 2.5]]), 1, norm=1).tolist() == [1]
    assert select(torch.tensor([[3.0, 2.0], [0.0, 2.0]]), 1, norm=2).tolist() == [0]


@given(st.sets(st.integers(0, 7), min_size=3, max_size=3), st.sets(st.integers(0, 7), min_size=3, max_size=3))
def test_moments_follow_their_vector(old, new):
    old, new = (torch.tensor(sorted(chosen)) for chosen in (old, new))
    moment, basis = random(4, 3), vectors(8, "dct2", random(1, 1))
    rotation = basis[:, old].T @ basis[:, new]
    assert_close(rotation, rotation.round(), rtol=0, atol=1e-9)
    assert set(rotation.round().flatten().tolist()) <= {0.0, 1.0}
    assert_close(carry(moment, old, new), moment @ rotation)


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 20), st.sampled_from(["8bit", "4bit"]))
def test_packing_is_wrong_by_half_a_step_at_most(rows, half, seed, bits):
    matrix = random(rows, 2 * half, seed).float()
    packed = pack(matrix, bits)
    levels = {"8bit": 255, "4bit": 15}[bits]
    assert packed.codes.shape[1] == 2 * half // (2 if bits == "4bit" else 1)
    step = (matrix.amax(1) - matrix.amin(1)) / levels
    assert ((unpack(packed, bits) - matrix).abs() <= step[:, None] / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_constant_rows_survive_and_numbers_keep_their_place(bits):
    constant = torch.full((2, 4), 0.3)
    assert_close(unpack(pack(constant, bits), bits), constant)
    ramp = torch.arange(16.0)[None]
    assert_close(unpack(pack(ramp, bits), bits), ramp, rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_codes_round_halves_up(bits):
    levels = {"8bit": 255, "4bit": 15}[bits]
    row = torch.tensor([[0.0, 0.5, 2.5, float(levels)]])  # the step is 1
    assert unpack(pack(row, bits), bits).tolist() == [[0.0, 1.0, 3.0, levels]]


def test_four_bits_want_even_rows():
    with pytest.raises(ValueError, match=r"pack must have rows of even length for 4 bits, got 3"):
        pack(torch.ones(1, 3), "4bit")


@pytest.mark.parametrize(("kind", "error"), [("none", None), ("full", 0.0), ("bf16", 2**-8), ("8bit", 0.02), ("4bit", 0.3)])
def test_what_is_remembered_comes_back(kind, error):
    state, matrix = {}, random(3, 8)
    assert not recall(state, kind, matrix).any()
    remember(state, matrix, kind)
    back = recall(state, kind, matrix)
    assert back.dtype == torch.float64
    if error is None:
        assert not state
    else:
        assert (back - matrix).abs().max() <= error * matrix.abs().max()


@pytest.mark.parametrize("shape", [(12, 4), (4, 12), (5, 5)])
def test_newton_schulz_pushes_singular_values_to_one(shape):
    matrix = random(*shape)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    found = newton_schulz(matrix, steps=10, dtype=torch.float64)
    s = torch.linalg.svdvals(found)
    assert s.min() > 0.6
    assert s.max() < 1.3
    assert ((u.T @ found @ vh.T) - torch.diag((u.T @ found @ vh.T).diag())).abs().max() < 1e-6  # the directions stay
    assert newton_schulz(torch.zeros(3, 2)).abs().max() == 0


def test_refuses_an_empty_basis():
    with pytest.raises(ValueError, match=r"dct_matrix\.n must be in \[1, inf\), got 0"):
        dct_matrix(0)
