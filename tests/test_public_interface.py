"""What `import valign` offers: every public name, each imported when it is asked for."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import valign

SOURCE = Path(valign.__file__).read_text(encoding="utf-8")
NAMES = [name for name in valign.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_what_its_home_defines_and_says_what_it_is(name):
    value = getattr(valign, name)
    assert value is getattr(import_module(valign._HOMES[name]), name)
    assert name in dir(valign)
    assert value.__doc__
    assert value.__doc__.strip()


def test_type_checkers_see_the_same_names_from_the_same_modules():
    shown = {
        alias.asname: node.module
        for node in ast.walk(ast.parse(SOURCE))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    assert shown == valign._HOMES
    assert (Path(valign.__file__).parent / "py.typed").exists()


def test_the_import_takes_in_nothing_heavy():
    code = "import sys, valign; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "'valign'" in loaded
    for heavy in ("torch", "numpy", "transformers", "diffusers", "pydantic", "yaml", "typer"):
        assert f"'{heavy}'" not in loaded


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'valign' has no attribute 'alignn'"):
        valign.alignn  # noqa: B018


def test_the_page_has_every_name_and_its_example_runs(capsys):
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: valign\.(\w+)$", page, re.MULTILINE)) == sorted(NAMES)
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, object] = {}
    exec(example, found)
    assert capsys.readouterr().out.strip() in example  # the comment says what is printed
    assert len(found["images"]) == 1
