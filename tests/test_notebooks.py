"""Every notebook runs from start to end, cell after cell, in an empty folder."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_there_are_three():
    assert [path.stem for path in NOTEBOOKS] == ["align", "evaluate", "guard"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, few_shapes, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for number, cell in enumerate(code_cells(path)):
        exec(compile(cell, f"{path.name}, cell {number}", "exec"), names)
    printed = capsys.readouterr().out
    expected = {
        "guard": ("'a red bolt on the left': rewrite hate", "heart"),
        "align": ("base", "alignguard", "benign right"),
        "evaluate": ("my-adapter", "harmful"),
    }[path.stem]
    assert all(text in printed for text in expected), printed
