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


def folder_with(path, text):
    path.mkdir()
    (path / "text").write_text(text)
    return path


def test_the_old_folder_stands_until_the_new_one_is_whole(tmp_path):
    path = folder_with(tmp_path / "folder", "old")
    with pytest.raises(UserError, match="exists"), atomic_folder(path):
        pass
    with atomic_folder(path, force=True) as new:
        (new / "more").write_text("new")
        assert (path / "text").read_text() == "old"
    assert [file.name for file in path.iterdir()] == ["more"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("failing", [1, 2])
def test_the_old_folder_is_put_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, failing):
    path = folder_with(tmp_path / "folder", "old")
    replace, calls = os.replace, []

    def fail_once(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("valign.files.os.replace", fail_once)
    with pytest.raises(PermissionError), atomic_folder(path, force=True) as new:
        (new / "text").write_text("new")
    assert (path / "text").read_text() == "old"
    assert calls[1:] == ([path, path] if failing == 2 else [])  # the new one, then the old one again
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_aside_is_in_nobody_s_way(tmp_path):
    path = folder_with(tmp_path / "folder", "old")
    folder_with(tmp_path / f".folder.{os.getpid()}.old", "older")
    with atomic_folder(path, force=True) as new:
        (new / "text").write_text("new")
    assert (path / "text").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
