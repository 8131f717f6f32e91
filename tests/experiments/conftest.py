"""The benchmark that a test file is named after: `test_chat_drift.py` tests `benchmarks/chat_drift.py`."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def bench(request):
    name = request.module.__name__.rpartition("test_")[2]
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(FOLDER)  # as python does where it runs the file
        spec.loader.exec_module(module)
    return module
