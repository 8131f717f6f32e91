"""Safe LoRA against the authors' formula in plain NumPy, and the invariants of a projection."""

import numpy as np
import pytest
import torch
from realign_data import named, tensors
from torch.testing import assert_close

from valign.merging.deltas import NamedDeltas
from valign.merging.realign import safe_lora
from valign.merging.realign.safe_lora import project
from valign.models.files.adapter_files import LoraFactors

SHAPES = {"a.weight": (6, 4), "b.weight": (6, 9)}
SAFETY, TASK = tensors(1, SHAPES), tensors(2, SHAPES)


def authors(v, w, threshold):
    """C = V V^T / |V|_F; the update is C W where its cosine to W is below the threshold."""
    c = v @ v.T / np.linalg.norm(v)
    cosine = (c @ w * w).sum() / (np.linalg.norm(c @ w) * np.linalg.norm(w))
    return (c @ w if cosine < threshold else w), cosine


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.8, 1.0])
def test_equals_the_authors_formula(threshold):
    for name, delta in safe_lora(named(SAFETY), {"t": named(TASK)}, strength=threshold):
        expected, cosine = authors(SAFETY[name].double().numpy(), TASK[name].double().numpy(), threshold)
        assert abs(cosine - threshold) > 1e-3  # otherwise the test would depend on rounding
        assert_close(delta.delta().double(), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_strength_0_projects_nothing_and_1_everything():
    for name, delta in safe_lora(named(SAFETY), {"t": named(TASK)}, strength=0.0):
        assert torch.equal(delta.delta(), TASK[name])
    for name, delta in safe_lora(named(SAFETY), {"t": named(TASK)}, strength=1.0):
        assert not torch.equal(delta.delta(), TASK[name])


@pytest.mark.parametrize("projection", ["scaled", "orthogonal"])
def test_low_rank_factors_give_the_dense_result_without_a_dense_matrix(projection):
    g = torch.Generator().manual_seed(0)
    v = LoraFactors(torch.randn(3, 7, generator=g), torch.randn(8, 3, generator=g), 0.5)
    w = LoraFactors(torch.randn(2, 7, generator=g), torch.randn(8, 2, generator=g), 2.0)
    dense = {key: next(iter(named({"w": value.delta()}).entries.values())) for key, value in (("v", v), ("w", w))}
    low = project(v, w, projection)
    assert isinstance(low, LoraFactors)
    assert low.rank == 2
    for one in (
        project(dense["v"], dense["w"], projection),
        project(v, dense["w"], projection),
        project(dense["v"], w, projection),
    ):
        assert_close(one.delta(), low.delta(), rtol=1e-4, atol=1e-5)


def test_the_orthogonal_projection_twice_is_once_and_keeps_what_lies_inside():
    g = torch.Generator().manual_seed(0)
    v = LoraFactors(torch.randn(3, 7, generator=g), torch.randn(8, 3, generator=g), 1.0)
    w = LoraFactors(torch.randn(2, 7, generator=g), torch.randn(8, 2, generator=g), 1.0)
    once = project(v, w, "orthogonal")
    assert_close(project(v, once, "orthogonal").delta(), once.delta(), rtol=1e-4, atol=1e-5)
    assert_close(project(v, v, "orthogonal").delta(), v.delta(), rtol=1e-4, atol=1e-5)


def test_weights_without_alignment_vectors_and_embeddings_are_left_alone():
    task = tensors(2, {"norm.weight": (6,), "embed_tokens.weight": (9, 4), "a.weight": (6, 4)})
    vectors = {name: 0.0 * tensor if name == "a.weight" else tensor for name, tensor in task.items()}
    from valign.merging.realign import AdapterChanges, RealignContext, SafeLora, Vectors

    class Flat(AdapterChanges):
        def ndim(self, name):
            return task[name].ndim

    context = RealignContext()
    source = Vectors(Flat(named(vectors), ""), {"t": Flat(named(task), "")})
    change = SafeLora(strength=1.0).prepare(source, context)
    for at in source.items():
        assert torch.equal(change(at).delta(), task[at.name].reshape(at.safety.shape))
    assert context.results["cosines"] == {}


def test_an_update_without_rank_stays_so():
    v = LoraFactors(torch.randn(3, 7), torch.randn(8, 3), 1.0)
    nothing = LoraFactors(torch.zeros(0, 7), torch.zeros(8, 0), 1.0)
    ((_, delta),) = safe_lora(NamedDeltas({"w": v}), {"t": NamedDeltas({"w": nothing})}, strength=1.0)
    assert delta.rank == 0
