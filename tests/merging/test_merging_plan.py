"""The dry run, against dense matrices."""

import pytest
import torch
from expert_data import SHAPES, random_factors

from valign.merging import plan_merge
from valign.merging.deltas import DenseDelta, inner
from valign.merging.moments import moment_bytes


def test_figures_are_those_of_the_dense_deltas(three):
    plan = plan_merge(three, rank=3)
    dense = [torch.cat([expert.factors(module).delta().flatten() for module in sorted(SHAPES)]) for expert in three]
    assert plan.modules == 3
    assert plan.ranks == ((2, 2), (3, 3), (4, 4))
    for i in range(3):
        assert plan.norms[i] == pytest.approx(float(dense[i].norm()), rel=1e-4)
        for j in range(3):
            cosine = float(torch.cosine_similarity(dense[i], dense[j], dim=0))
            assert plan.cosines[i][j] == pytest.approx(cosine, abs=1e-5)
    lost = energy = 0.0
    for module in SHAPES:
        values = torch.linalg.svdvals(sum(expert.factors(module).delta() for expert in three))
        lost, energy = lost + values[3:].square().sum(), energy + values.square().sum()
    assert plan.error == pytest.approx(float((lost / energy).sqrt()), rel=1e-4)
    assert plan.worst_error >= plan.error


def test_weights_count_and_zero_experts_do_not_divide_by_zero(make_expert):
    factors = random_factors()
    experts = [make_expert("a", factors), make_expert("opposite", factors, -2.0), make_expert("off", factors, 0.0)]
    plan = plan_merge(experts)
    assert plan.cosines[0][1] == pytest.approx(-1)
    assert plan.cosines[0][2] == 0
    assert plan.norms[1] == pytest.approx(2 * plan.norms[0])


def test_memory_of_the_second_moments_is_known_before():
    """Every layer that reads the text shares one float64 matrix a group; one self-attention's inputs one of float32."""
    attention = {f"mid.attn1.{part}": 10 for part in ("to_q", "to_k", "to_v", "to_out.0")}
    text = {f"{block}.attn2.{part}": 7 for block in ("mid", "up.0") for part in ("to_k", "to_v")}
    assert moment_bytes(attention | text, groups=3) == 3 * (8 * 7**2 + 4 * 2 * 10**2)


@pytest.mark.parametrize("shape", [(3, 5), (64, 64), (130, 71)])
def test_inner_product_of_matrices_in_stretches_is_that_in_float64(shape):
    g = torch.Generator().manual_seed(0)
    one, other = (DenseDelta(torch.randn(shape, generator=g)) for _ in range(2))
    size = float(one.matrix.double().norm() * other.matrix.double().norm())
    assert abs(inner(one, other) - float((one.matrix.double() * other.matrix.double()).sum())) < 1e-6 * size
    assert inner(one, one) == pytest.approx(float(one.matrix.double().square().sum()), rel=1e-6)


def test_inner_product_without_the_matrices(three):
    a, b = three[0].factors("mid_block.to_v"), three[2].factors("mid_block.to_v")
    assert inner(a, b) == pytest.approx(float((a.delta() * b.delta()).sum()), rel=1e-4)
