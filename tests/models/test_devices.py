import pytest
import torch

from valign.checks import UserError
from valign.models.devices import choose_device, choose_dtype, first_line


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
