import threading

import pytest
import torch

from valign.checks import UserError, first_line
from valign.models.devices import choose_device, choose_dtype, torch_threads


def test_device_and_dtype():
    assert choose_dtype(torch.device("cpu")) == torch.float32
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UserError, match="device must be auto, cpu, cuda or another torch device, got 'gpu'"):
        choose_device("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_refuses_cuda_where_there_is_none():
    with pytest.raises(UserError, match="device cuda was asked for, but this machine"):
        choose_device("cuda")
    assert choose_device("auto").type == "cpu"


def test_the_first_line_of_a_message():
    assert first_line(ValueError("\nbroken header.\nmore")) == "broken header"
    assert first_line(ValueError()) == "ValueError"


def test_fewer_threads_within_and_as_many_as_before_afterwards():
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
        with torch_threads(before + 1), torch_threads(0):
            assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), torch_threads(1):
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


def test_calls_at_the_same_time_agree_on_the_number_to_go_back_to():
    """A thread that starts while another call holds torch to one thread must not take that number for the usual one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    inside = []

    def other():
        with torch_threads(1):
            inside.append(torch.get_num_threads())
        inside.append(torch.get_num_threads())

    try:
        with torch_threads(1):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert inside == [1, 2]
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
