"""Old import paths give the modules of today."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import valign
from valign.moved import MovedModules, install, moved_modules


def _modules():
    """Modules by their files."""
    root = Path(valign.__file__).parent
    return {"valign/" + path.relative_to(root).with_suffix("").as_posix().removesuffix("/__init__") for path in root.rglob("*.py")}


@pytest.mark.parametrize(("old", "new"), sorted(moved_modules().items()))
def test_every_row_leads_to_a_module_that_is_there_and_nothing_stands_at_the_old_path(old, new):
    assert new not in moved_modules()
    found = find_spec(new)
    assert found is not None
    assert found.name == new
    assert old not in {module.replace("/", ".") for module in _modules()}


def test_an_old_path_is_the_same_module_and_warns():
    with pytest.warns(DeprecationWarning, match=r"valign\.models\.adapter_files is now valign\.models\.files\.adapter_files"):
        old = import_module("valign.models.adapter_files")
    new = import_module("valign.models.files.adapter_files")
    assert old is new
    assert new.__spec__.name == "valign.models.files.adapter_files"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_module_below_a_moved_package_is_not_loaded_twice():
    assert import_module("valign.adapters.adaptive.sora").SoRA is import_module("valign.adapters.sora").SoRA


def test_installing_again_changes_nothing():
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_an_unknown_path_is_still_an_error():
    with pytest.raises(ModuleNotFoundError, match=r"valign\.models\.nowhere"):
        import_module("valign.models.nowhere")


def test_other_packages_are_left_to_the_other_finders():
    finder = next(finder for finder in sys.meta_path if isinstance(finder, MovedModules))
    assert finder.find_spec("sklearn", object()) is None  # whatever path a package has: a namespace package's is not a list


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_names_of_a_module_that_became_a_package_still_import():
    assert import_module("valign.data.images").import_images is import_module("valign.data.images.pairs").import_images
