"""Shards: their plan, their names, what is kept of an earlier call, and a fingerprint that sees every tensor."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.files import write_json
from valign.models.files.finite import all_finite
from valign.models.files.tensor_stream import TensorShape, write_known
from valign.models.files.weight_files import open_weights, plan_shards, write_shards

FLOAT = torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_entry_that_is_not_finite_is_found(dtype):
    for bad in (float("nan"), float("inf"), float("-inf")):
        tensor = torch.zeros(3, 4, dtype=dtype)
        assert all_finite(tensor)
        tensor[1, 2] = bad
        assert not all_finite(tensor)
    assert all_finite(torch.empty(0, dtype=dtype))


def shapes(**sizes):
    return {name: TensorShape(FLOAT, (size,)) for name, size in sizes.items()}


def test_shards_hold_what_fits_and_a_larger_tensor_alone():
    assert plan_shards(shapes(a=2, b=2, c=9, d=1), limit=16) == [["a", "b"], ["c"], ["d"]]
    assert plan_shards(shapes(a=2, b=2), limit=1000) == [["a", "b"]]


def test_finished_shards_are_kept_and_the_index_names_all(tmp_path):
    table = shapes(a=4, b=4, c=4)
    made = []

    def make(name):
        made.append(name)
        if name == "c" and len(made) == 3:
            raise KeyboardInterrupt
        return torch.full((4,), float(len(name)))

    with pytest.raises(KeyboardInterrupt):
        write_shards(tmp_path, "model", table, make, limit=16)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "model-00001-of-00003.safetensors",
        "model-00002-of-00003.safetensors",
    ]
    names = write_shards(tmp_path, "model", table, make, limit=16)
    assert made == ["a", "b", "c", "c"]
    write_json(tmp_path / "config.json", {})
    opened = open_weights(tmp_path)
    assert list(opened.shapes) == ["a", "b", "c"]
    assert set(opened.files) == set(names)
    assert torch.equal(opened.read("b"), torch.ones(4))


def test_what_is_written_at_once_is_what_safetensors_reads(tmp_path):
    tensors = {"x": torch.randn(3, 2), "y": torch.arange(4), "z": torch.randn(()), "e": torch.zeros(0, 3)}
    write_known(
        tmp_path / "f.safetensors", {name: TensorShape(t.dtype, tuple(t.shape)) for name, t in tensors.items()}, tensors.__getitem__
    )
    found = load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_fingerprint_sees_a_change_of_any_tensor(tmp_path):
    tensors = {f"w{n}": torch.randn(64, 64) for n in range(3)}
    write_json(tmp_path / "config.json", {})
    seen = set()
    for change in (None, "w0", "w2"):
        new = dict(tensors) if change is None else {**tensors, change: tensors[change] * 1.001}
        save_file(new, tmp_path / "model.safetensors")
        seen.add(open_weights(tmp_path).fingerprint())
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "must hold safetensors, got none"),
        ({"adapter_config.json": {}}, "must be a whole model here, got an adapter"),
        ({"model.safetensors.index.json": {"weight_map": {"a": "../a.safetensors"}}}, "must hold a weight_map of file names"),
        ({"model.safetensors.index.json": []}, "must hold a weight_map of file names"),
    ],
)
def test_refuses_folders_that_are_not_models(files, message, tmp_path):
    write_json(tmp_path / "config.json", {})
    for name, value in files.items():
        write_json(tmp_path / name, value)
    with pytest.raises(UserError, match=message):
        open_weights(tmp_path)
