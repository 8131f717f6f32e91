"""Eight bits: within half a step of the exact product, row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from valign.models.devices import cpu_has
from valign.models.encoders.int8 import exact_int8, has_int8, int8_linear, to_int8

needs_int8 = pytest.mark.skipif(not exact_int8(), reason="this processor multiplies no 8-bit matrices exactly")


@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_rounding_is_within_half_a_step(seed, size):
    weight = torch.randn(6, 8, generator=torch.Generator().manual_seed(seed)) * size
    small = to_int8(weight)
    error = (small.values.t() * small.scale[:, None] - weight).abs()
    assert (error <= weight.abs().amax(1, keepdim=True) / 254 * 1.0001).all()


@needs_int8
@pytest.mark.parametrize("shape", [(1, 64), (5, 64), (2, 3, 64)])
def test_what_eight_bits_can_say_is_exact(shape):
    """Whole numbers up to 127 with a 127 in every row round to themselves."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-126, 127, shape, generator=generator).float()
    weight = torch.randint(-126, 127, (32, 64), generator=generator).float()
    x[..., 0], weight[:, 1] = 127.0, -127.0
    bias = torch.randn(32, generator=generator)
    torch.testing.assert_close(int8_linear(x, to_int8(weight), bias), x @ weight.t() + bias)


@needs_int8
def test_a_row_does_not_depend_on_its_neighbours():
    generator = torch.Generator().manual_seed(1)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((7, 64), (32, 64), (32,)))
    small = to_int8(weight)
    alone = torch.cat([int8_linear(row[None], small, bias) for row in x])
    assert torch.equal(int8_linear(x, small, bias), alone)
    louder = torch.cat([x, 1000 * x])
    assert torch.equal(int8_linear(louder, small, bias)[:7], alone)


@needs_int8
def test_a_row_of_zeros_gives_the_bias():
    bias = torch.arange(32.0)
    assert torch.equal(int8_linear(torch.zeros(2, 64), to_int8(torch.ones(32, 64)), bias), bias.expand(2, 32))


def test_a_processor_without_them_keeps_float32(monkeypatch):
    """Products in 8 bits are fifty times slower there."""
    from valign.models.encoders import minilm

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True}, raising=False)
    for function in (cpu_has, has_int8):
        function.cache_clear()
    try:
        assert not cpu_has("avx512_vnni", "amx_int8")
        assert cpu_has("avx512_vnni", "avx2")
        assert not has_int8()
        weights = {"encoder.layer.0.output.dense.weight": torch.randn(4, 4)}
        assert minilm.quick_weights(weights) is weights
    finally:
        for function in (cpu_has, has_int8):
            function.cache_clear()
