import pytest
import torch
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.data.images.row_store import RowReader, RowWriter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_blocks_written_in_any_order_read_back_bit_for_bit(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    whole = {"b": torch.randn(5, 3, generator=generator).to(dtype), "a": torch.randn(5, 2, 2, generator=generator).to(dtype)}
    writer = RowWriter(tmp_path / "rows.safetensors", 5, {name: tensor[:2] for name, tensor in whole.items()})
    for start in (4, 0, 2):
        writer.write(start, {name: tensor[start : start + 2] for name, tensor in whole.items()})
    assert not (tmp_path / "rows.safetensors").exists()  # no half-written file under the final name
    writer.close()
    reader, library = RowReader(tmp_path / "rows.safetensors"), load_file(tmp_path / "rows.safetensors")
    rows = torch.tensor([3, 0, 3])
    for name, tensor in whole.items():
        assert torch.equal(library[name], tensor)
        assert torch.equal(reader.read(name, rows), tensor[rows])
        assert reader.read(name, rows).dtype == dtype
        assert reader.shape(name) == tuple(tensor.shape)
    assert reader.names == ("a", "b")


def test_reads_what_the_library_writes(tmp_path):
    tensor = torch.arange(12.0).reshape(4, 3)
    save_file({"x": tensor}, tmp_path / "x.safetensors", metadata={"note": "hello"})
    assert torch.equal(RowReader(tmp_path / "x.safetensors").read("x", torch.tensor([2])), tensor[2:3])


def test_refuses_to_go_on_with_other_shapes(tmp_path):
    RowWriter(tmp_path / "x.safetensors", 4, {"x": torch.zeros(1, 2)}).write(0, {"x": torch.ones(1, 2)})
    with pytest.raises(UserError, match="was begun with other shapes"):
        RowWriter(tmp_path / "x.safetensors", 4, {"x": torch.zeros(1, 3)})


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        RowReader(path)
    for data in (b"", b"rubbish that is long enough", b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{}"):
        path.write_bytes(data)
        with pytest.raises(UserError, match="is not a safetensors file of floats"):
            RowReader(path)
    save_file({"x": torch.zeros(4, 3)}, path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="is shorter than its header says"):
        RowReader(path)
    save_file({"x": torch.zeros(4, dtype=torch.int64)}, path)
    with pytest.raises(UserError, match="of floats"):
        RowReader(path)
