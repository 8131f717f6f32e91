import pytest
import torch

from valign.checks import UserError
from valign.training.engine.processes import on_main, reduce_sum, start_processes


def test_one_process_sums_to_itself():
    tensor = torch.arange(3.0)
    assert reduce_sum(start_processes(cpu=True), tensor) is tensor


def test_results_and_errors_of_the_first_process_reach_the_caller():
    accelerator = start_processes(cpu=True)
    assert on_main(accelerator, lambda: 7) == 7
    with pytest.raises(UserError, match="no space"):
        on_main(accelerator, lambda: (_ for _ in ()).throw(UserError("no space")))


def test_unknown_trackers_are_listed_before_any_work():
    with pytest.raises(ValueError, match=r"--tracker must be one of .*tensorboard.*; got 'wandbb'\. Did you mean 'wandb'"):
        start_processes(trackers=("wandbb", "wandb"), cpu=True)


def test_a_later_training_may_have_another_precision():
    assert start_processes(mixed_precision="bf16", cpu=True).mixed_precision == "bf16"
    assert start_processes(mixed_precision="no", cpu=True).mixed_precision == "no"
