"""EnchTable against a transcription of the card's formulas in NumPy, and its invariants."""

import numpy as np
import pytest
import torch
from realign_data import named, tensors
from torch.testing import assert_close

from valign.checks import UserError
from valign.merging.deltas import DenseDelta, NamedDeltas
from valign.merging.realign import enchtable, interference
from valign.models.files.adapter_files import LoraFactors

SHAPES = {"a.weight": (6, 8), "b.weight": (5, 7)}
SAFETY, TASK = tensors(1, SHAPES), tensors(2, SHAPES, scale=0.4)


def transcribed(task, safety, gamma=0.5):
    """The mean absolute entry of R, by loops over singular pairs."""
    u1, s1, v1 = np.linalg.svd(task, full_matrices=False)
    u2, s2, v2 = np.linalg.svd(safety, full_matrices=False)
    k1, k2 = max(1, int(gamma * len(s1))), max(1, int(gamma * len(s2)))
    u, sigma = np.concatenate([u1[:, :k1], u2[:, :k2]], 1), np.concatenate([s1[:k1], s2[:k2]])
    v = np.concatenate([v1[:k1], v2[:k2]])
    k = k1 + k2
    total = 0.0
    for i in range(k):
        for j in range(k):
            entry = sum((u[:, i] @ u[:, m] - (i == m)) * sigma[m] * (v[m] @ v[j] - (m == j)) for m in range(k))
            total += abs(entry)
    return total / k**2


def parts(strength):
    size = lambda vectors: np.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in vectors.values()))  # noqa: E731
    return strength * size(TASK) / size(SAFETY)


@pytest.mark.parametrize("gain", [0.0, 3.0, 200.0])
def test_equals_the_transcription(gain):
    alpha = parts(0.3)
    for name, delta in enchtable(named(SAFETY), {"t": named(TASK)}, strength=0.3, gain=gain):
        weight = np.exp(-gain * transcribed(TASK[name].double().numpy(), alpha * SAFETY[name].double().numpy()))
        assert_close(delta.delta(), TASK[name] + float(weight) * alpha * SAFETY[name], rtol=1e-4, atol=1e-5)


def test_the_coarse_scale_matches_norms_whatever_the_safety_vectors_own():
    def added(factor):
        safety = named({name: factor * tensor for name, tensor in SAFETY.items()})
        made = dict(enchtable(safety, {"t": named(TASK)}, strength=0.3, fine=False))
        return {name: delta.delta() - TASK[name] for name, delta in made.items()}

    once, thrice = added(1.0), added(3.0)
    norm = torch.cat([tensor.flatten() for tensor in once.values()]).norm()
    assert_close(norm, 0.3 * torch.cat([tensor.flatten() for tensor in TASK.values()]).norm(), rtol=1e-5, atol=0)
    assert_close(once["a.weight"], thrice["a.weight"], rtol=1e-4, atol=1e-6)


def test_strength_0_is_the_fine_tuned_model_and_without_norms_it_multiplies_the_vector():
    for name, delta in enchtable(named(SAFETY), {"t": named(TASK)}, strength=0.0):
        assert torch.equal(delta.delta(), TASK[name])
    for name, delta in enchtable(named(SAFETY), {"t": named(TASK)}, strength=0.8, coarse=False, fine=False):
        assert_close(delta.delta(), TASK[name] + 0.8 * SAFETY[name])


def test_orthogonal_spaces_do_not_interfere_and_shared_ones_do():
    g = torch.Generator().manual_seed(0)
    basis, other = (torch.linalg.qr(torch.randn(40, 40, generator=g))[0] for _ in range(2))
    values = torch.linspace(0.1, 0.01, 10)

    def update(left, right):
        return DenseDelta(left * values @ right.T)

    task = update(basis[:, :10], other[:, :10])
    assert interference(task, update(basis[:, 10:20], other[:, :10])) < 1e-6  # other left directions
    assert interference(task, update(basis[:, :10], other[:, 10:20])) < 1e-6  # other right directions
    shared = [0, 1, *range(20, 28)]
    half = interference(task, update(basis[:, shared], other[:, shared]))
    assert 0 < half < interference(task, task)
    assert interference(task, task) == pytest.approx(
        interference(DenseDelta(2 * task.matrix), DenseDelta(2 * task.matrix)) / 2, rel=1e-4
    )


def test_the_numerical_rank_makes_low_rank_interference_reproducible():
    g = torch.Generator().manual_seed(0)
    task, safety = (LoraFactors(torch.randn(4, 30, generator=g), torch.randn(20, 4, generator=g), 0.1) for _ in range(2))
    exact = interference(task, safety)
    for _ in range(3):
        noisy = DenseDelta(task.delta() + 1e-9 * torch.randn(20, 30, generator=g))
        assert interference(noisy, DenseDelta(safety.delta())) == pytest.approx(exact, rel=1e-3)


def test_auto_gain_halves_the_median_weight():
    three = {"a.weight": (6, 8), "b.weight": (5, 7), "c.weight": (7, 7)}
    safety, task = tensors(1, three), tensors(2, three, scale=0.4)
    from valign.merging.realign import AdapterChanges, EnchTable, RealignContext, Vectors

    context = RealignContext()
    vectors = Vectors(AdapterChanges(named(safety), ""), {"t": AdapterChanges(named(task), "")})
    EnchTable(auto_gain=True).prepare(vectors, context)
    assert sorted(context.results["safety_weights"].values())[1] == pytest.approx(0.5)


def test_what_was_measured_is_kept(tmp_path):
    first = dict(enchtable(named(SAFETY), {"t": named(TASK)}, folder=tmp_path))
    (kept,) = tmp_path.iterdir()
    kept.write_text(kept.read_text().replace('"alpha": ', '"alpha": 1'))  # seen again if it is read at all
    second = dict(enchtable(named(SAFETY), {"t": named(TASK)}, folder=tmp_path))
    assert not torch.equal(first["a.weight"].delta(), second["a.weight"].delta())
    third = dict(enchtable(named(SAFETY), {"t": named(TASK)}, folder=tmp_path, strength=0.2))  # another question: measured anew
    assert_close(third["a.weight"].delta(), dict(enchtable(named(SAFETY), {"t": named(TASK)}, strength=0.2))["a.weight"].delta())


def test_refuses_vectors_of_zero():
    nothing = named({name: torch.zeros(shape) for name, shape in SHAPES.items()})
    with pytest.raises(UserError, match="must have an aligned model that differs from the base"):
        enchtable(nothing, {"t": named(TASK)})
    with pytest.raises(UserError, match="must have a fine-tuned model that differs from its start"):
        enchtable(named(SAFETY), {"t": nothing})


def test_low_rank_vectors_stay_low_rank():
    g = torch.Generator().manual_seed(0)
    safety, task = (LoraFactors(torch.randn(2, 7, generator=g), torch.randn(8, 2, generator=g), 1.0) for _ in range(2))
    ((_, delta),) = enchtable(NamedDeltas({"w": safety}), {"t": NamedDeltas({"w": task})}, gain=1.0)
    dense = {key: named({"w": value.delta()}) for key, value in (("s", safety), ("t", task))}
    ((_, expected),) = enchtable(dense["s"], {"t": dense["t"]}, gain=1.0)
    assert isinstance(delta, LoraFactors)
    assert delta.rank == 4
    assert_close(delta.delta(), expected.delta(), rtol=1e-4, atol=1e-5)
