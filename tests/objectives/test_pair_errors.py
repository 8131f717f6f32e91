import pytest
import torch
from torch.testing import assert_close

from valign.objectives import PairErrors, denoising_error

one, two = torch.ones(1), torch.ones(2)


@pytest.mark.parametrize("bad", [(two, one, two, two), (two[:, None],) * 4, (torch.tensor(1.0),) * 4])
def test_refuses_shapes_that_would_broadcast(bad, as_in_use):
    with pytest.raises(ValueError, match=r"PairErrors must be four tensors of one shape \[pair\], got .*Reduce per sample"):
        PairErrors(*bad)


def test_refuses_half_precision():
    with pytest.raises(ValueError, match=r"PairErrors must be float32 or float64, got torch\.bfloat16, torch\.float32"):
        PairErrors(two, two.bfloat16(), two, two)


def test_float32_and_float64_may_stand_together():
    errors = PairErrors(two.double(), two, two.double(), two)
    assert [error.dtype for error in errors] == [torch.float64, torch.float32] * 2


def test_split_takes_winners_first():
    errors = PairErrors.split(torch.arange(6.0), torch.arange(10.0, 16.0))
    assert [error.tolist() for error in errors] == [[0, 1, 2], [3, 4, 5], [10, 11, 12], [13, 14, 15]]


@pytest.mark.parametrize(("policy", "reference"), [(3, 3), (4, 2)])
def test_split_refuses_an_odd_or_unequal_batch(policy, reference, as_in_use):
    with pytest.raises(ValueError, match=rf"two batches of one even size, got {policy} and {reference}"):
        PairErrors.split(torch.ones(policy), torch.ones(reference))


def test_weighting_multiplies_all_four_and_refuses_another_count(as_in_use):
    errors = PairErrors(two, 2 * two, 3 * two, 4 * two).weighted(torch.tensor([1.0, 0.5]))
    assert [error.tolist() for error in errors] == [[1, 0.5], [2, 1], [3, 1.5], [4, 2]]
    with pytest.raises(ValueError, match=r"must get 2 weights, got \(1,\)"):
        errors.weighted(one)


def test_error_is_formed_in_float32():
    prediction, target = torch.full((1, 1, 2, 2), 256.0, dtype=torch.bfloat16), torch.full((1, 1, 2, 2), 255.5)
    assert denoising_error(prediction, target).item() == 0.25  # bfloat16 has no 255.5: the difference would be 0
    assert denoising_error(target, prediction).item() == 0.25
    both = denoising_error(prediction + 2, prediction)  # 258 is a bfloat16, too
    assert (both.item(), both.dtype) == (4.0, torch.float32)
    third = torch.full((1, 1, 2, 2), 1 / 3, dtype=torch.bfloat16)
    assert_close(denoising_error(third, -third), (2 * third.float()[0, 0, 0, 0]).square()[None], rtol=1e-6, atol=0)
    assert denoising_error(target.double(), target.double()).dtype == torch.float64


def test_error_is_a_mean_over_a_sample(as_in_use):
    target = torch.zeros(2, 3, 2, 2)
    prediction = target.clone()
    prediction[1, 0, 0, 0] = 6.0
    assert_close(denoising_error(prediction, target), torch.tensor([0.0, 3.0]))  # 36 / 12 elements
    with pytest.raises(ValueError, match=r"denoising_error must get equal shapes"):
        denoising_error(prediction, target[:, :, :1, :1])
