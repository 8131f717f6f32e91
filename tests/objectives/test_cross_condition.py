"""CMA's loss, queue, warp and pseudo-labels against closed forms, and its dense form on a synthetic check."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from valign.checks import UserError
from valign.objectives.robust.cross_condition import (
    IGNORED,
    ContrastOptions,
    CrossConditionContrastive,
    average_momentum,
    balanced_labels,
    check_pairs,
    class_thresholds,
    content_match,
    flow_confidence,
    label_loss,
    normalized_entropy,
    warp,
)


def contrast(**options):
    return CrossConditionContrastive(
        ContrastOptions(**{"width": 4, "grid": 1, "queue": 8} | options), torch.Generator().manual_seed(0)
    )


def row(*values):
    return torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1)


ONE = torch.ones(1, 1, 1, 1)


def test_an_equal_positive_and_one_orthogonal_negative():  # log(1 + exp(-1 / T))
    loss = contrast(queue=1, temperature=0.3)
    loss.negatives = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert float(loss(row(3, 0, 0, 0), row(7, 0, 0, 0), ONE).loss) == pytest.approx(math.log(1 + math.exp(-1 / 0.3)), rel=1e-6)


def test_equal_similarities_cost_the_logarithm_of_their_number():  # log(1 + Q)
    loss = contrast(queue=5)
    loss.negatives = torch.tensor([[1.0, 0, 0, 0]]).repeat(5, 1)
    assert float(loss(row(1, 0, 0, 0), row(1, 0, 0, 0), ONE).loss) == pytest.approx(math.log(6), rel=1e-6)


def test_lengths_do_not_matter_and_uncertain_cells_are_left_out():
    generator = torch.Generator().manual_seed(1)
    anchor, positive = torch.randn(2, 2, 4, 4, 4, generator=generator)
    trust = torch.rand(2, 1, 4, 4, generator=generator).clamp(min=0.3)
    loss = contrast(grid=2)
    whole = loss(anchor, positive, trust)
    assert whole.kept == 8
    assert_close(loss(5 * anchor, 0.1 * positive, trust).loss, whole.loss)
    trust[:, :, :2, :2] = 0
    assert loss(anchor, positive, trust).kept == 6
    nothing = loss(anchor, positive, torch.zeros_like(trust))
    assert (float(nothing.loss), nothing.kept) == (0.0, 0)


def test_only_the_anchor_has_a_gradient():
    anchor, positive = (row(1, 2, 0, 1).requires_grad_() for _ in range(2))
    loss = contrast()
    loss(anchor, positive, ONE).loss.backward()
    assert anchor.grad is not None
    assert positive.grad is None
    assert not loss.negatives.requires_grad


def test_the_queue_is_a_ring_of_unit_vectors():
    loss = contrast(queue=5)
    for number in range(3):
        loss.push(torch.full((2, 4, 1, 1), float(number + 1)) * torch.tensor([1.0, -1.0]).view(2, 1, 1, 1))
    assert loss.pushed == 6
    assert loss.pointer == 1
    assert_close(loss.negatives.norm(dim=1), torch.ones(5))
    assert_close(loss.negatives[0], -torch.full((4,), 0.5))  # the sixth row has wrapped around
    again = contrast(queue=5)
    again.restore(loss.state())
    assert again.negatives.equal(loss.negatives)
    assert again.pointer == 1
    with pytest.raises(ValueError, match=r"ContrastOptions\.queue must hold at least the 6 cells of one step, got 5"):
        loss.push(torch.ones(6, 4, 1, 1))


@pytest.mark.parametrize(
    ("anchor", "positive", "trust", "said"),
    [
        (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 1), torch.ones(1, 1, 2, 2), r"positive must be of shape \(1, 4, 2, 2\)"),
        (torch.ones(1, 3, 2, 2), torch.ones(1, 3, 2, 2), torch.ones(1, 1, 2, 2), "needs features of 4 numbers, got 3"),
        (torch.ones(1, 4, 1, 1), torch.ones(1, 4, 1, 1), torch.ones(1, 1, 1, 1), "at most the map's 1 places a side, got 2"),
        (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), torch.ones(1, 2, 2, 2), "confidence must have one channel"),
        (torch.ones(1, 4, 2, 2), torch.ones(1, 4, 2, 2), 2 * torch.ones(1, 1, 2, 2), r"confidence must be in \[0, 1\]"),
    ],
)
def test_maps_that_do_not_fit_are_refused(as_in_use, anchor, positive, trust, said):
    with pytest.raises(ValueError, match=said):
        contrast(grid=2)(anchor, positive, trust)


def test_a_temperature_of_0_is_refused():
    with pytest.raises(ValueError, match=r"ContrastOptions\.temperature must be in \(0, inf\), got 0"):
        ContrastOptions(temperature=0.0)


# ---- warp, confidence, schedules -------------------------------------------------------------------------------------


def test_no_flow_changes_nothing_and_every_place_is_inside():
    maps = torch.randn(2, 3, 4, 5)
    for flow in (None, torch.zeros(2, 2, 4, 5)):
        found = warp(maps, flow)
        assert found.features is maps
        assert found.inside.all()


def test_a_flow_of_one_place_shifts_and_the_border_is_outside():
    maps = torch.arange(20.0).view(1, 1, 4, 5)
    flow = torch.zeros(1, 2, 4, 5)
    flow[:, 0] = 1.0
    found = warp(maps, flow)
    assert_close(found.features[0, 0, 1, 1:3], maps[0, 0, 1, 2:4])
    assert found.inside[0, 0].tolist() == [
        [False] * 5,
        [True, True, True, False, False],
        [True, True, True, False, False],
        [False] * 5,
    ]


def test_a_flow_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=r"warp\.flow must be finite"):
        warp(torch.zeros(1, 1, 2, 2), torch.full((1, 2, 2, 2), float("nan")))


def test_confidence_falls_with_the_variance_of_the_flow():
    found = flow_confidence(torch.tensor([-20.0, 0.0, 20.0]).view(1, 1, 1, 3))
    assert found.flatten().tolist() == pytest.approx([1.0, 1 - math.exp(-0.5), 0.0], abs=1e-6)


def test_content_that_differs_is_trusted_less():
    assert content_match(torch.tensor([[1.0, 0], [1, 0], [1, 0]]), torch.tensor([[2.0, 0], [0, 1], [-1, 0]])).tolist() == [
        1.0,
        0.0,
        0.0,
    ]


def test_averages_start_as_the_network():
    assert [average_momentum(step) for step in (0, 1, 9)] == pytest.approx([0.0, 0.5, 0.9])
    assert average_momentum(10**9) == 0.9999


# ---- pseudo-labels ---------------------------------------------------------------------------------------------------


def test_the_most_certain_of_each_class_are_labelled():
    chances = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4], [0.55, 0.45], [0.51, 0.49], [0.3, 0.7]], dtype=torch.float64)
    limits = class_thresholds(chances, portion=0.2)
    assert limits.tolist() == [0.8, 0.7]
    assert balanced_labels(chances, limits).tolist() == [0, 0, IGNORED, IGNORED, IGNORED, 1]
    assert class_thresholds(chances[:5]).tolist()[1] == 1.0  # nothing was predicted as the second


def test_entropy_and_labels_at_their_ends():
    assert float(normalized_entropy(torch.zeros(3, 5))) == pytest.approx(1.0, rel=1e-6)
    assert float(normalized_entropy(torch.tensor([[100.0, 0, 0]]))) == pytest.approx(0.0, abs=1e-6)
    logits = torch.zeros(2, 3, requires_grad=True)
    assert float(label_loss(logits, torch.tensor([IGNORED, IGNORED]))) == 0.0
    assert float(label_loss(logits, torch.tensor([1, IGNORED]))) == pytest.approx(math.log(3), rel=1e-6)


def test_unpaired_images_are_refused():
    with pytest.raises(UserError, match=r"an image of each content under both conditions; got 3 and 2.*plain self-training"):
        check_pairs([1, 2, 3], [1, 2])


# ---- the dense form, on maps of contents -----------------------------------------------------------------------------


def test_a_dense_predictor_holds_under_a_shift_of_its_features():
    """Maps of 6 contents in 12 numbers; the bad condition adds a fixed shift and noise, and moves everything by one place."""
    generator = torch.Generator().manual_seed(0)
    contents = torch.randn(6, 12, generator=generator)
    shift = 1.6 * torch.randn(12, generator=generator)

    def maps(count, seed):
        own = torch.Generator().manual_seed(seed)
        truth = torch.randint(0, 6, (count, 5, 5), generator=own).repeat_interleave(2, 1).repeat_interleave(2, 2)
        plain = contents[truth].permute(0, 3, 1, 2)
        clean = plain + 0.2 * torch.randn(plain.shape, generator=own)
        adverse = torch.roll(plain, 1, dims=3) + shift.view(1, 12, 1, 1) + 0.2 * torch.randn(plain.shape, generator=own)
        return clean, adverse, torch.roll(truth, 1, dims=2)

    frozen = nn.Conv2d(12, 6, 1)
    with torch.no_grad():
        frozen.weight.copy_(contents.view(6, 12, 1, 1))
        frozen.bias.copy_(-contents.square().sum(1) / 2)
    frozen.requires_grad_(False)
    encoder = nn.Conv2d(12, 12, 1)
    with torch.no_grad():
        encoder.weight.copy_(torch.eye(12).view(12, 12, 1, 1))
        encoder.bias.zero_()
    loss = CrossConditionContrastive(ContrastOptions(width=12, grid=10, queue=1600), generator)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=1e-2)
    flow = torch.zeros(4, 2, 10, 10)
    flow[:, 0] = -1.0  # what stands here under the bad condition stood one place to the left

    def right(images, truth):
        with torch.no_grad():
            return float((frozen(encoder(images)).argmax(1) == truth)[..., 1:].float().mean())

    clean, adverse, moved = maps(8, 99)
    before, held = right(adverse, moved), right(clean, torch.roll(moved, -1, dims=2))
    for step in range(60):
        good, bad, _ = maps(4, step)
        with torch.no_grad():
            reference = warp(encoder(good), flow)
        optimizer.zero_grad()
        loss(encoder(bad), reference.features, reference.inside.float()).loss.backward()
        optimizer.step()
        with torch.no_grad():
            loss.push(encoder(bad))
    assert before < 0.75
    assert right(adverse, moved) > before + 0.1
    assert right(clean, torch.roll(moved, -1, dims=2)) > held - 0.02
