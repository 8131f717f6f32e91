import pytest
import torch
from torch.testing import assert_close

from valign.adapters.spectrum import exact_svd, randomized_svd


def matrix(rows=20, columns=14, decay=0.5, seed=0):
    """Known singular values ``decay ** i``, float64."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(n, columns, generator=generator, dtype=torch.float64)).Q for n in (rows, columns))
    s = decay ** torch.arange(columns, dtype=torch.float64)
    return u * s @ v.T, s


def test_exact_gives_back_the_matrix_with_fixed_signs():
    weight, s = matrix()
    found = exact_svd(weight)
    assert_close(found.s, s)
    assert_close(found.u * found.s @ found.vh, weight)
    assert (found.u.gather(0, found.u.abs().argmax(0, keepdim=True)) > 0).all()
    turned = exact_svd(-weight)
    assert_close(turned.u, found.u, rtol=1e-6, atol=1e-8)  # the sign goes to the right side
    assert_close(turned.vh, -found.vh, rtol=1e-6, atol=1e-8)


def test_randomized_agrees_with_exact_within_the_stated_error():
    weight, s = matrix(decay=0.8)
    exact = exact_svd(weight)
    errors = []
    for niter in (0, 2, 6):
        found = randomized_svd(weight, 4, niter=niter, oversample=2, generator=torch.Generator().manual_seed(1))
        errors.append((found.u * found.s @ found.vh - exact.u[:, :4] * s[:4] @ exact.vh[:4]).norm().item())
        assert_close(found.u.T @ found.u, torch.eye(4, dtype=torch.float64))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-3


def test_randomized_draws_from_the_generator_alone():
    weight, _ = matrix(decay=0.95)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two, other = (
        randomized_svd(weight, 3, niter=0, oversample=0, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.u, two.u)
    assert not torch.equal(one.u, other.u)


def test_half_precision_is_decomposed_in_float32():
    found = exact_svd(matrix()[0].to(torch.bfloat16))
    assert {t.dtype for t in found} == {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"randomized_svd\.rank must be in \[1, 14\], got 0\. The matrix is \(20, 14\)"),
        ({"rank": 15}, r"randomized_svd\.rank must be in \[1, 14\], got 15"),
        ({"niter": -1}, r"randomized_svd\.niter must be in \[0, inf\), got -1"),
        ({"oversample": -1}, r"randomized_svd\.oversample must be in \[0, inf\), got -1"),
    ],
)
def test_refuses_bad_numbers(options, message):
    with pytest.raises(ValueError, match=message):
        randomized_svd(matrix()[0], **{"rank": 2, "niter": 1, "oversample": 1, "generator": torch.Generator(), **options})
