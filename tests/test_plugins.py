"""Tables extended by installed packages: found late, imported one by one, and refused where two have one name."""

import importlib
import sys

import pytest

from valign.checks import UserError
from valign.plugins import PluginTable, with_plugins

GROUP = "valign.test_rows"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a package with the given entry points (name -> "module:attribute") on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def run(package, entry_points, **modules):
        info = tmp_path / f"{package}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{lines}")
        for name, text in modules.items():
            (tmp_path / f"{name}.py").write_text(text)
            monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.invalidate_caches()

    return run


def test_rows_of_packages_come_after_the_table_sorted(install):
    install("plug_one", {"zoo": "plug_one_rows:ZOO", "ant": "plug_one_rows:ANT"}, plug_one_rows="ZOO, ANT = 7, 8")
    table = with_plugins(GROUP, {"own": 1, "first": 2})
    assert list(table) == ["own", "first", "ant", "zoo"]
    assert len(table) == 4
    assert dict(table) == {"own": 1, "first": 2, "ant": 8, "zoo": 7}
    assert "cat" not in table
    with pytest.raises(KeyError):
        table["cat"]


def test_a_plug_in_is_imported_when_its_row_is_read(install):
    install("plug_two", {"late": "plug_two_rows:LATE"}, plug_two_rows="LATE = 5")
    table = with_plugins(GROUP, {"own": 1})
    assert "late" in table
    assert table["own"] == 1
    assert "plug_two_rows" not in sys.modules
    assert table["late"] == 5
    assert "plug_two_rows" in sys.modules


def test_a_name_that_the_table_has_is_refused(install):
    install("plug_three", {"own": "plug_three_rows:OWN"}, plug_three_rows="OWN = 2")
    with pytest.raises(
        UserError, match=r"valign\.test_rows: the plug-in plug_three_rows:OWN .*, got 'own', which valign itself has\. Rename"
    ):
        PluginTable(GROUP, {"own": 1})["own"]


def test_a_name_of_two_packages_is_refused(install):
    install("plug_four", {"both": "plug_four_rows:A"}, plug_four_rows="A = 1")
    install("plug_five", {"both": "plug_five_rows:B"}, plug_five_rows="B = 1")
    with pytest.raises(UserError, match=r"the plug-in plug_four_rows:A .* got 'both', which plug_five_rows:B has"):
        list(PluginTable(GROUP, {}))


def test_a_plug_in_that_does_not_load_is_named_and_stops_no_other_row(install):
    install("plug_six", {"broken": "plug_six_rows:A", "lost": "plug_seven_rows:A"}, plug_six_rows="raise OSError('no disk')")
    table = with_plugins(GROUP, {"own": 1})
    assert table["own"] == 1
    with pytest.raises(UserError, match=r"'broken' \(plug_six_rows:A\) must be importable, got OSError: no disk\. Mend"):
        table["broken"]
    with pytest.raises(UserError, match=r"'lost' .* got ModuleNotFoundError: No module named 'plug_seven_rows'"):
        table["lost"]
