"""What is written is whole, or not there; and whoever may read other files may read it too."""

import os

import pytest
import torch
from safetensors.torch import save_file

from valign.checks import UserError
from valign.files import atomic_folder, atomic_path


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o027)
    yield
    os.umask(before)


def mode(path):
    return path.stat().st_mode & 0o777


def test_files_of_tensors_are_as_readable_as_others(tmp_path):
    private = tmp_path / "private.txt"
    private.touch(0o600)
    with atomic_path(tmp_path / "one.safetensors") as temporary:
        save_file({"a": torch.zeros(2)}, temporary)
    with atomic_folder(tmp_path / "many") as folder:
        save_file({"a": torch.zeros(2)}, folder / "a.safetensors")
        (folder / "link").symlink_to(private)
        (folder / "deeper").mkdir()
        (folder / "deeper" / "b.txt").write_text("b")
    files = [tmp_path / "one.safetensors", tmp_path / "many" / "a.safetensors", tmp_path / "many" / "deeper" / "b.txt"]
    assert [mode(path) for path in files] == [0o640] * 3
    assert mode(private) == 0o600  # only pointed at
    assert mode(tmp_path / "many") == mode(tmp_path / "many" / "deeper") == 0o750


def fail(error):
    raise error


def test_nothing_is_left_of_a_write_that_failed(tmp_path):
    path = tmp_path / "kept.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        fail(RuntimeError(temporary.write_text("new")))
    with pytest.raises(UserError, match="could not be written"), atomic_path(path):
        fail(OSError(28, "No space left on device"))
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "folder") as folder:
        fail(RuntimeError((folder / "part").write_text("half")))
    assert (path.read_text(), [file.name for file in tmp_path.iterdir()]) == ("old", ["kept.txt"])
