"""Mode-subspace overlap, projections and random controls: closed forms, invariants, planted subspaces."""

import math

import pytest
import torch
from torch.testing import assert_close

from valign.audits.subspaces import activation_overlap, audit_subspaces, expected_overlap, overlap, project_update, top_basis
from valign.checks import UserError
from valign.merging.deltas import DenseDelta, NamedDeltas
from valign.merging.realign import AdapterChanges
from valign.models.files.adapter_files import LoraFactors


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(seed, width, kept):
    return torch.linalg.qr(random(seed, width, kept).double())[0]


def changes(**matrices):
    return AdapterChanges(NamedDeltas({name: DenseDelta(matrix) for name, matrix in matrices.items()}), "")


def test_overlap_of_planted_spaces():
    basis = orthonormal(0, 12, 8)
    assert overlap(basis[:, :4], basis[:, :4]) == pytest.approx(1)
    assert overlap(basis[:, :4], basis[:, 4:]) == pytest.approx(0, abs=1e-12)
    assert overlap(basis[:, :4], basis[:, 2:6]) == pytest.approx(0.5)
    assert overlap(basis[:, :2], basis[:, :6]) == pytest.approx(1)  # one within the other
    assert math.isnan(overlap(basis[:, :0], basis))


def test_overlap_ignores_scale_and_a_rotation_of_the_inputs():
    update, other = random(1, 9, 7), random(2, 9, 7)
    turn = torch.linalg.qr(random(3, 7, 7))[0]
    plain = overlap(top_basis(DenseDelta(update), 0.5), top_basis(DenseDelta(other), 0.5))
    assert overlap(top_basis(DenseDelta(5 * update @ turn), 0.5), top_basis(DenseDelta(other), 0.5)) == pytest.approx(
        plain, rel=1e-4
    )
    assert overlap(top_basis(DenseDelta(other), 0.5), top_basis(DenseDelta(update), 0.5)) == pytest.approx(plain)


def test_the_random_expectation_is_the_mean_of_random_subspaces():
    found = torch.tensor([overlap(orthonormal(2 * n, 20, 3), orthonormal(2 * n + 1, 20, 6)) for n in range(200)])
    assert abs(float(found.mean()) - expected_overlap(3, 6, 20)) < 3 * float(found.std()) / 200**0.5


def test_a_basis_holds_the_energy_and_no_more_vectors_than_it_takes():
    left, right = orthonormal(0, 6, 4), orthonormal(1, 5, 4)
    update = DenseDelta((left * torch.tensor([4.0, 2.0, 1.0, 0.5]).double()) @ right.T)  # squares 16, 4, 1, 0.25 of 21.25
    for energy, kept in ((0.1, 1), (0.75, 1), (0.76, 2), (0.94, 2), (0.95, 3), (1.0, 4)):
        assert top_basis(update, energy).shape == (6, kept)
    assert_close((top_basis(update, 0.1)[:, 0] @ left[:, 0]).abs(), torch.tensor(1.0).double())
    assert top_basis(update, 1.0, side="right").shape == (5, 4)
    assert top_basis(DenseDelta(torch.zeros(4, 4)), 0.5).shape == (4, 0)


def test_a_column_overlaps_by_its_squared_cosine():
    one, other = random(0, 9, 1), random(1, 9, 1)
    cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
    assert overlap(top_basis(DenseDelta(one), 0.5), top_basis(DenseDelta(other), 0.5)) == pytest.approx(cosine**2, rel=1e-4)


def test_projections_add_up_and_applied_twice_change_nothing():
    update, alignment = DenseDelta(random(0, 8, 6)), DenseDelta(random(1, 8, 6))
    parallel, rest, opposite = (
        project_update(update, alignment, 0.5, part=part) for part in ("parallel", "orthogonal", "opposite")
    )
    assert_close(parallel.matrix + rest.matrix, update.matrix.double())
    assert_close(opposite.matrix, -parallel.matrix)
    assert_close(project_update(parallel, alignment, 0.5).matrix, parallel.matrix, rtol=1e-4, atol=1e-5)  # a float32 SVD
    energy = lambda delta: float(delta.matrix.double().square().sum())  # noqa: E731
    assert energy(parallel) + energy(rest) == pytest.approx(energy(update), rel=1e-6)
    whole = project_update(DenseDelta(random(0, 5, 9)), DenseDelta(random(1, 5, 9)), 1.0, part="orthogonal")
    assert float(whole.matrix.abs().max()) < 1e-5  # all left vectors of a wide matrix span its outputs
    assert float(project_update(update, DenseDelta(torch.zeros(8, 6)), 0.5).matrix.abs().max()) == 0


def test_low_rank_updates_give_what_their_matrices_give():
    low = {name: LoraFactors(random(n, 3, 7), random(n + 9, 8, 3), 0.5) for n, name in enumerate(("v", "a", "b"))}
    dense = {name: DenseDelta(delta.delta()) for name, delta in low.items()}
    figures = []
    for deltas in (low, dense):
        source = {name: AdapterChanges(NamedDeltas({"w": delta}), "") for name, delta in deltas.items()}
        figures.append(audit_subspaces({"a": source["a"], "b": source["b"]}, source["v"])[0])
    for name in ("a", "b"):
        for fraction, value in figures[0]["energy_kept"][name]["top"].items():
            assert value == pytest.approx(figures[1]["energy_kept"][name]["top"][fraction], rel=1e-4)
        assert figures[0]["cosine"][name] == pytest.approx(figures[1]["cosine"][name], rel=1e-4)
    for pair, rows in figures[0]["overlap"].items():
        assert rows["0.5"]["mean"] == pytest.approx(figures[1]["overlap"][pair]["0.5"]["mean"], rel=1e-4)


def planted(distinct):
    """Eight weights; harmful updates lie in the alignment's outputs, useful ones outside, or all are random."""
    aligned, useful, harmful = {}, {}, {}
    for n in range(8):
        basis = orthonormal(n, 16, 8).float()
        inside, outside = basis[:, :4], basis[:, 4:]
        aligned[f"w{n}"] = inside @ random(100 + n, 4, 10)
        harmful[f"w{n}"] = inside @ random(200 + n, 4, 10) if distinct else random(200 + n, 16, 10)
        useful[f"w{n}"] = outside @ random(300 + n, 4, 10) if distinct else random(300 + n, 16, 10)
    return audit_subspaces(
        {"benign": changes(**useful), "unsafe": changes(**harmful)}, changes(**aligned), useful=["benign"], harmful=["unsafe"]
    )


def test_the_verdict_on_planted_and_on_random_updates():
    figures, plots, verdict = planted(distinct=True)
    assert any("A safety subspace can be told apart here" in line for line in verdict)
    assert figures["energy_kept"]["unsafe"]["top"]["0.5"] == pytest.approx(1, rel=1e-5)  # 5 directions hold all 4
    assert figures["energy_kept"]["benign"]["top"]["0.5"] < 1e-9
    assert [plot.title for plot in plots][1].startswith("energy along")
    figures, _, verdict = planted(distinct=False)
    assert any("No distinct safety subspace shows in the weights" in line for line in verdict)
    row = figures["overlap"]["benign - unsafe"]["0.5"]
    assert row["interval"]["low"] <= row["mean"] <= row["interval"]["high"]
    assert row["mean"] == pytest.approx(row["random"], abs=0.1)


def test_random_controls_keep_the_share_of_directions():
    figures, _, _ = planted(distinct=False)
    assert figures["energy_kept"]["benign"]["random"]["0.5"] == pytest.approx(5 / 16, abs=0.1)  # 5 of 16 outputs


def test_activations_share_what_they_share():
    basis = orthonormal(0, 20, 6).float()
    one, other = random(1, 50, 3) @ basis[:, :3].T, random(2, 40, 3) @ basis[:, 3:].T
    assert activation_overlap(one, one, [1.0])[1.0][0] == pytest.approx(1)
    assert activation_overlap(one, other, [1.0])[1.0] == (pytest.approx(0, abs=1e-6), pytest.approx(3 / 20))
    with pytest.raises(UserError, match="at least 2 prompts in each set, got 1 and 40"):
        activation_overlap(one[:1], other)


def test_bad_input():
    update = changes(w=random(0, 4, 4))
    with pytest.raises(UserError, match="must have two updates, or one and the alignment"):
        audit_subspaces({"a": update})
    with pytest.raises(UserError, match="must differ from the base, got the same weights"):
        audit_subspaces({"a": update}, changes(w=torch.zeros(4, 4)))
    with pytest.raises(UserError, match="must change some weights in common"):
        audit_subspaces({"a": update, "b": changes(v=random(0, 4, 4))})
    with pytest.raises(ValueError, match="useful and harmful must be one of a, b"):
        audit_subspaces({"a": update, "b": update}, useful=["c"])
    for bad in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"must be in \(0, 1\]"):
            audit_subspaces({"a": update, "b": update}, etas=[bad])
    figures, _, verdict = audit_subspaces(
        {"a": update, "still": changes(w=torch.zeros(4, 4))}, update, useful=["a"], harmful=["still"]
    )
    assert figures["cosine"]["still"] is None  # undefined, not 0
    assert figures["overlap"]["alignment - still"]["0.5"]["mean"] is None
    assert any("cannot be compared" in line for line in verdict)
