import json

import pytest
import torch
from torch import nn

from valign.checks import UserError
from valign.optimizers import OPTIMIZERS
from valign.training.engine.checkpoint import Checkpoints


def trained(name="adamw", steps=3):
    torch.manual_seed(0)
    parameters = {"b": nn.Parameter(torch.randn(3, 2)), "a": nn.Parameter(torch.randn(4))}
    optimizer = OPTIMIZERS[name]().build([{"params": list(parameters.values())}], [], 0.01)
    for step in range(steps):
        move(parameters, optimizer, step)
    return parameters, optimizer


def move(parameters, optimizer, step):
    for parameter in parameters.values():
        parameter.grad = torch.sin(parameter.detach() * (step + 1))
    optimizer.step()


@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_training_goes_on_bit_for_bit(tmp_path, name):
    parameters, optimizer = trained(name)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(3, parameters, optimizer, {"alarm": [[0.1, 1 / 3]]})
    others, fresh = trained(name, steps=0)
    state = checkpoints.load(3, others, fresh)
    assert state["step"] == 3
    assert state["alarm"] == [[0.1, 1 / 3]]
    for pair in ((parameters, optimizer), (others, fresh)):
        move(*pair, 3)
    assert all(torch.equal(parameters[key], others[key]) for key in parameters)


def test_files_are_safetensors_and_json_only(tmp_path):
    path = Checkpoints(tmp_path).save(1, *trained(), {})
    assert sorted(file.name for file in path.iterdir()) == ["adapter.safetensors", "optimizer.safetensors", "state.json"]


def test_half_written_folders_do_not_count_and_old_ones_go(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2, 3, 4):
        checkpoints.save(step, *trained(), {})
    (tmp_path / ".step-000005.77.tmp").mkdir()
    checkpoints.prune(2, also=1)
    assert checkpoints.steps() == [1, 3, 4]


def test_other_modules_and_damage_are_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    parameters, optimizer = trained()
    path = checkpoints.save(1, parameters, optimizer, {})
    with pytest.raises(UserError, match=r"was made with other modules: c\. Use the same rank"):
        checkpoints.load(1, {**parameters, "c": parameters["a"]})
    with pytest.raises(UserError, match=r"was made with other modules: a, c\. Use the same rank"):  # as many, of other names
        checkpoints.load(1, {"b": parameters["b"], "c": parameters["a"]})
    (path / "adapter.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match=r"adapter\.safetensors cannot be read: .* Delete its folder"):
        checkpoints.load(1, parameters)


@pytest.mark.parametrize("name", ["tensor", "\\tensor"])
def test_a_state_named_tensor_is_not_taken_for_a_tensor(tmp_path, name):
    extra = {
        "method": {name: "0"},
        "nested": [{name: {name: 1.5}}],
        "more": {name: torch.ones(2), "also": 1},
        "one": torch.zeros(1),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, *trained(), {}, extra={**extra, "inside": {name: torch.full((2,), 3.0)}})
    found = checkpoints.extra(1)
    assert found["method"] == {name: "0"}
    assert found["nested"] == [{name: {name: 1.5}}]
    assert found["more"]["also"] == 1
    assert torch.equal(found["more"][name], torch.ones(2))
    assert torch.equal(found["inside"][name], torch.full((2,), 3.0))
    assert torch.equal(found["one"], torch.zeros(1))


def test_a_tensor_is_written_as_it_always_was(tmp_path):
    path = Checkpoints(tmp_path).save(1, *trained(), {}, extra={"mean": torch.ones(1), "seed": 3})
    assert json.loads((path / "extra.json").read_text()) == {"mean": {"tensor": "0"}, "seed": 3}


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoints, (parameters, optimizer) = Checkpoints(tmp_path), trained()
    for value in (1, 2):
        checkpoints.save(1, parameters, optimizer, {"value": value})
        with torch.no_grad():
            parameters["a"].fill_(value)
    checkpoints.save(1, parameters, optimizer, {"value": 3})
    assert checkpoints.steps() == [1]
    fresh = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in parameters.items()}
    assert checkpoints.load(1, fresh)["value"] == 3
    assert (fresh["a"] == 2).all()
