import warnings

import pytest
import torch
from torch.testing import assert_close

from valign.objectives import AGL, PRESERVING
from valign.objectives.preserving.agl import (
    FisherSum,
    LayerFisher,
    WeightChange,
    entrywise_collision,
    geodesic_collision,
    kept_directions,
)

SHAPE = (6, 4)
OFF = {"lambda_A": 0.0, "lambda_T": 0.0, "lambda_NC": 0.0}


def samples(seed=0, count=7):
    """Per-sample gradients."""
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3


def gathered(projector="left", gradients=None):
    found = FisherSum(projector)
    for gradient in samples() if gradients is None else gradients:
        found.add(gradient if projector != "vector" else gradient.reshape(-1, 1))
    return found


def fisher_of(agl, **given):
    return agl.fisher(gathered(agl.projector, **given))


def change_of(seed=1, rank=2, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((SHAPE[0], rank), (rank, SHAPE[1])))
    return WeightChange(scale * up, down)


def quiet(**options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return AGL(**options)


def test_the_table_names_it():
    assert PRESERVING["agl"] is AGL


def test_the_defaults_are_the_published_constants():
    agl = AGL()
    assert (agl.lambda_A, agl.lambda_T, agl.lambda_NC) == (0.25, 0.5, 0.1)
    assert (agl.alpha, agl.beta, agl.tau, agl.eps, agl.energy) == (0.5, 4.0, 0.01, 1e-12, 0.9)
    assert (agl.projector, agl.reduction, agl.geo_metric, agl.fisher_normalize) == ("left", "mean", "fisher_elementwise", "mean")


def test_the_streamed_fisher_matrix_is_the_mean_over_samples():
    found, all_at_once = gathered(), samples()
    assert_close(found.matrix, torch.einsum("sij,skj->ik", all_at_once, all_at_once) / 7)
    assert_close(found.diagonal, all_at_once.square().mean(0))
    values, vectors = found.spectrum()
    assert_close(vectors * values @ vectors.T, found.matrix)
    assert (values.diff() <= 0).all()


def test_the_vector_fisher_matrix_is_never_formed_but_right():
    values, vectors = gathered("vector").spectrum()
    flat = samples().reshape(7, -1)
    assert vectors.shape == (24, 7)
    assert_close(vectors * values @ vectors.T, flat.T @ flat / 7)


@pytest.mark.parametrize("projector", ["left", "coordinate"])
def test_both_parts_are_the_change_and_orthogonal(projector):
    agl = quiet(projector=projector, directions=3)
    fisher, change = fisher_of(agl), change_of()
    aligned, rest = fisher.split(change)
    assert_close(aligned + rest, change.dense)
    assert abs((aligned * rest).sum().item()) < 1e-10
    if projector == "left":
        projection = fisher.basis @ fisher.basis.T
        assert_close(projection @ projection, projection)
        assert torch.trace(projection).item() == pytest.approx(3)
        assert_close(projection @ change.dense, aligned)


def test_the_vector_projector_splits_all_numbers_at_once():
    agl = AGL(projector="vector", directions=2)
    fisher, change = fisher_of(agl), WeightChange(change_of().dense.reshape(-1, 1))
    aligned, rest = fisher.split(change)
    assert abs((aligned * rest).sum().item()) < 1e-10
    expected = sum(value * (fisher.basis[:, k] @ change.up[:, 0]) ** 2 for k, value in enumerate(fisher.eigenvalues))
    assert_close(fisher.sensitivity(change), expected)


@pytest.mark.parametrize("projector", ["left", "vector", "coordinate"])
def test_no_change_costs_nothing(projector):
    agl = quiet(projector=projector)
    zero = torch.zeros(SHAPE if projector != "vector" else (24, 1), dtype=torch.float64, requires_grad=True)
    loss = agl(WeightChange(zero), fisher_of(agl))
    assert loss.item() == 0
    (found,) = torch.autograd.grad(loss, zero)
    assert (found == 0).all()


def test_without_weights_there_is_no_gradient():
    change = change_of()
    change.up.requires_grad_()
    assert not AGL(**OFF)(change, fisher_of(AGL())).requires_grad


def test_with_all_directions_it_is_elastic_weight_consolidation_as_a_matrix():
    agl = AGL(**OFF | {"lambda_A": 0.25}, directions=6, fisher_normalize="none")
    change = change_of()
    expected = 0.25 * torch.trace(change.dense.T @ gathered().matrix @ change.dense)
    assert_close(agl(change, fisher_of(agl)), expected)


def test_without_directions_only_the_trust_region_is_left():
    empty = LayerFisher(torch.zeros(0).double(), torch.zeros(6, 0).double(), samples().square().mean(0))
    change = change_of()
    found = AGL().terms(change, empty)
    assert found.alignment.item() == 0
    assert found.collision.item() == 0
    assert_close(found.trust, 0.5 * (empty.diagonal * change.dense.square()).sum())
    assert_close(AGL(trust="identity").terms(change, empty).trust, 0.5 * change.dense.square().sum())


def test_factors_cost_what_the_dense_change_does():
    agl, change = AGL(), change_of(scale=1.7)
    fisher = fisher_of(agl)
    assert_close(agl(change, fisher), agl(WeightChange(change.dense), fisher))
    aligned, _ = fisher.split(change)
    weighted = fisher.basis * fisher.eigenvalues @ fisher.basis.T
    assert_close(agl.terms(change, fisher).alignment, 0.25 * (weighted @ aligned * aligned).sum())


def test_signs_and_rotations_of_equal_eigenvalues_change_nothing():
    agl = AGL()
    fisher, change = fisher_of(agl), change_of()
    same = LayerFisher(torch.ones_like(fisher.eigenvalues), fisher.basis, fisher.diagonal)
    rotation = torch.linalg.qr(torch.randn(len(same.eigenvalues), len(same.eigenvalues), dtype=torch.float64)).Q
    turned = LayerFisher(same.eigenvalues, same.basis @ rotation, same.diagonal)
    assert_close(agl(change, turned), agl(change, same))
    flipped = LayerFisher(fisher.eigenvalues, -fisher.basis, fisher.diagonal)
    assert_close(agl(change, flipped), agl(change, fisher))


def test_the_whole_loss_in_float64_numpy():
    # written out again, with the dense projector and no function of the package
    import numpy as np

    gradients, delta = samples().numpy(), change_of().dense.numpy()
    values, vectors = np.linalg.eigh(sum(g @ g.T for g in gradients) / 7)
    values, vectors = values[::-1], vectors[:, ::-1]
    m = int(np.argmax(np.cumsum(values) / values.sum() >= 0.9)) + 1
    kept, basis = values[:m] / values[:m].mean(), vectors[:, :m]
    diagonal = (gradients**2).mean(0)
    diagonal = diagonal / diagonal.mean()
    aligned = basis @ basis.T @ delta
    rest = delta - aligned
    first = 0.25 * np.sum(kept[:, None] * (basis.T @ delta) ** 2)
    second = 0.5 * np.sum(diagonal * rest**2)
    eta = 1 + 4 / (1 + np.exp(-(np.abs(delta) - 0.01)))
    entrywise = np.mean(eta * np.abs(aligned * rest))
    inner = np.sum(diagonal * aligned * rest)
    geodesic = inner**2 / (np.sum(diagonal * aligned**2) * np.sum(diagonal * rest**2) + 1e-12)
    third = 0.1 * (0.5 * entrywise + 0.5 * geodesic)
    found = AGL().terms(change_of(), fisher_of(AGL()))
    assert_close([float(term) for term in found], [first, second, third], rtol=1e-9, atol=0)
    assert geodesic > 1e-4


def test_the_euclidean_collision_is_zero_and_says_so():
    with pytest.warns(UserWarning, match="geodesic collision is zero in the Euclidean metric"):
        agl = AGL(geo_metric="euclidean")
    fisher, change = fisher_of(agl), change_of()
    change.up.requires_grad_()
    aligned, rest = fisher.split(change)
    value = geodesic_collision(aligned, rest, None, eps=1e-12)
    assert value.item() < 1e-20
    assert torch.autograd.grad(value, change.up)[0].abs().max() < 1e-12


def test_the_live_collision_lies_between_zero_and_one():
    for seed in range(20):
        fisher = fisher_of(AGL(), gradients=samples(seed))
        value = geodesic_collision(*fisher.split(change_of(seed + 50)), fisher.diagonal, eps=1e-12)
        assert 0 < value.item() <= 1


def test_in_coordinate_mode_both_collisions_are_zero_and_that_is_said():
    with pytest.warns(UserWarning, match="collision terms are zero in coordinate mode"):
        agl = AGL(projector="coordinate", directions=5)
    fisher = fisher_of(agl)
    assert int(fisher.chosen.sum()) == 5
    aligned, rest = fisher.split(change_of())
    assert entrywise_collision(aligned, rest, beta=4.0, tau=0.01, reduction="sum").item() == 0
    assert agl.terms(change_of(), fisher).collision.item() == 0
    expected = 0.25 * (fisher.diagonal * change_of().dense.square())[fisher.chosen].sum()
    assert_close(agl.terms(change_of(), fisher).alignment, expected)


def test_sum_and_mean_differ_by_the_number_of_entries():
    aligned, rest = fisher_of(AGL()).split(change_of())
    options = {"beta": 4.0, "tau": 0.01}
    mean, total = (entrywise_collision(aligned, rest, reduction=name, **options) for name in ("mean", "sum"))
    assert_close(total, 24 * mean)
    assert mean > 0


def test_the_collision_warms_up_over_a_tenth_of_the_steps():
    agl = AGL()
    assert [agl.warm(step, 100) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert AGL(warmup=0.0).warm(0, 100) == 1.0
    fisher, change = fisher_of(agl), change_of()
    full = agl.terms(change, fisher).collision
    assert_close(agl.terms(change, fisher, warm=0.25).collision, 0.25 * full)


def test_directions_are_kept_by_energy_up_to_the_cap():
    values = torch.tensor([5.0, 3.0, 1.0, 1.0])
    assert [kept_directions(values, energy=energy, cap=9) for energy in (0.4, 0.5, 0.6, 0.85, 1.0)] == [1, 1, 2, 3, 4]
    assert kept_directions(values, energy=1.0, cap=2) == 2


def test_normalized_fisher_values_do_not_depend_on_the_scale_of_the_loss():
    agl, change = AGL(), change_of()
    assert_close(agl(change, fisher_of(agl)), agl(change, fisher_of(agl, gradients=100 * samples())))
    raw = AGL(fisher_normalize="none", lambda_NC=0.0)
    assert_close(raw(change, fisher_of(raw, gradients=10 * samples())), 100 * raw(change, fisher_of(raw)))


def test_a_custom_trust_region_takes_the_options_place():
    agl, change, mine = AGL(trust="task_ema"), change_of(), torch.rand(SHAPE, dtype=torch.float64)
    fisher = fisher_of(agl)
    _, rest = fisher.split(change)
    assert_close(agl.terms(change, fisher, trust=mine).trust, 0.5 * (mine * rest.square()).sum())
    with pytest.raises(ValueError, match=r"AGL\.terms must get trust with task_ema, got None"):
        agl.terms(change, fisher)
    with pytest.raises(ValueError, match=r"AGL\.trust must be >= 0 with shape \(6, 4\), got \(6, 4\) with least value -1"):
        agl.terms(change, fisher, trust=mine - 1 - mine.min())


@pytest.mark.parametrize("name", ["lambda_A", "lambda_T", "lambda_NC", "beta", "tau"])
@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_refuses_a_weight_out_of_range(name, bad):
    with pytest.raises(ValueError, match=rf"AGL\.{name} must be in \[0, inf\), got"):
        AGL(**{name: bad})


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: AGL(alpha=1.1), r"AGL\.alpha must be in \[0, 1\], got 1\.1"),
        (lambda: AGL(eps=0.0), r"AGL\.eps must be in \(0, inf\), got 0"),
        (lambda: AGL(directions=0), r"AGL\.directions must be in \[1, inf\), got 0"),
        (lambda: AGL(directions=7).fisher(gathered()), r"AGL\.directions must be in \[1, 6\], got 7\. the weight has no more"),
        (lambda: AGL().fisher(FisherSum("left")), "must have calibration samples, got none"),
        (lambda: AGL().fisher(gathered(gradients=0 * samples())), "must have gradients on the calibration data, got only zeros"),
        (lambda: gathered(gradients=samples() / 0), "must get finite gradients, got NaN or infinity"),
        (
            lambda: AGL()(WeightChange(torch.zeros(5, 4).double()), fisher_of(AGL())),
            r"must have the Fisher matrix's shape \(6, 4\), got \(5, 4\)",
        ),
    ],
)
def test_bad_input_is_refused(work, message):
    with pytest.raises(ValueError, match=message):
        work()


def test_too_many_directions_are_taken_down_only_when_asked():
    with pytest.warns(UserWarning, match="AGL takes all 6 directions of the weight, fewer than the 7 asked for"):
        fisher = AGL(directions=7, clamp=True).fisher(gathered())
    assert fisher.basis.shape == (6, 6)


def test_it_holds_safety_while_another_skill_is_learnt():
    # The card's small experiment: a net 24-32-4, safety on logits 0 and 1, another skill on logits 2 and 3, LoRA of rank 4.
    drift, right = zip(
        *(_experiment(agl, seed) for agl in (None, AGL(**OFF | {"lambda_A": 0.25}, directions=4)) for seed in (0, 1))
    )
    assert min(right) > 0.98  # the skill is learnt in all four
    assert max(drift[2:]) < 0.5 * min(drift[:2])


def _experiment(agl, seed):
    """Drift of the safety task (KL) and accuracy of the other one."""
    generator = torch.Generator().manual_seed(seed)
    inputs, other = torch.randn(128, 24, generator=generator), torch.randn(128, 24, generator=generator)
    safe, skill = (inputs[:, 0] > 0).long(), (other[:, 1] > 0).long()
    weights = [torch.randn(32, 24, generator=generator) / 5, torch.randn(4, 32, generator=generator) / 6]

    def net(x, changes=(0.0, 0.0)):
        return torch.tanh(x @ (weights[0] + changes[0]).T) @ (weights[1] + changes[1]).T

    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(logits, labels)

    _adam([weight.requires_grad_() for weight in weights], lambda: loss(net(inputs)[:, :2], safe), 200)
    start = net(inputs)[:, :2].detach().log_softmax(1)
    sums = [FisherSum("left") for _ in weights]
    for place in range(64):
        for one, found in zip(
            sums, torch.autograd.grad(loss(net(inputs[place : place + 1])[:, :2], safe[place : place + 1]), weights)
        ):
            one.add(found)
    for weight in weights:
        weight.requires_grad_(False)
    known = [agl.fisher(one) for one in sums] if agl else []
    downs = [torch.randn(4, weight.shape[1], generator=generator).div(4).requires_grad_() for weight in weights]
    ups = [torch.zeros(len(weight), 4, requires_grad=True) for weight in weights]

    def total():
        changes = [WeightChange(up, down) for up, down in zip(ups, downs)]
        penalties = [agl(change, fisher) for change, fisher in zip(changes, known)] if agl else []
        return loss(net(other, [change.dense for change in changes])[:, 2:], skill) + sum(penalties)

    _adam([*ups, *downs], total, 200)
    changes = [(up @ down).detach() for up, down in zip(ups, downs)]
    after = net(inputs, changes)[:, :2].log_softmax(1)
    drift = (start.exp() * (start - after)).sum(1).mean().item()
    return drift, (net(other, changes)[:, 2:].argmax(1) == skill).float().mean().item()


def _adam(parameters, loss, steps):
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
