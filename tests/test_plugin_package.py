"""The package in `plugin_package/`, which knows nothing of this repository: each of its methods by the name it has for a user."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from valign.models.files.adapter_files import LoraFactors, open_adapter, save_adapter

PACKAGE = Path(__file__).with_name("plugin_package")
GROUPS = {"valign.adapters", "valign.merges", "valign.objectives", "valign.detectors", "valign.guard_stages"}
LIBRARY = """
import json, torch
from pathlib import Path
from PIL import Image
from valign.adapters import ADAPTERS, EXPERTS
from valign.detectors import build, flagged, scores_of
from valign.guard.stages import StageParts, build_stages
from valign.merging import MERGES
from valign.objectives import OBJECTIVES, PairErrors
from valign.policy import load_policy

one = torch.ones(1)
dark = build("dark")
(stage,) = build_stages(StageParts(load_policy(Path("policy.yaml"))))
print(json.dumps({
    "known": ["lora-plus" in ADAPTERS, "median" in MERGES, "lora" in ADAPTERS, "ties" in MERGES, "lora-plus" in EXPERTS],
    "loss": OBJECTIVES["squared-margin"](beta=0.25)(PairErrors(one, 2 * one, 2 * one, 2 * one)).tolist(),
    "dark": flagged(scores_of(dark, [Image.new("RGB", (8, 8), c) for c in ("black", "white")]), dark.card).tolist(),
    "length": [verdict.fired for verdict in stage.check_many(["a cat", "a cat " * 31])],
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder on the path of new processes with the package in it, as pip would have put it there."""
    target = tmp_path_factory.mktemp("site")
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    module = project["name"].replace("-", "_")
    shutil.copytree(PACKAGE / module, target / module, ignore=shutil.ignore_patterns("__pycache__"))
    info = target / f"{module}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = project["entry-points"]
    lines = [f"[{group}]\n" + "".join(f"{name} = {row}\n" for name, row in rows.items()) for group, rows in groups.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))
    return target


@pytest.fixture
def python(installed, tmp_path):
    def run(*arguments):
        paths = [str(installed), *filter(None, [os.environ.get("PYTHONPATH")])]
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        return json.loads(result.stdout)

    return run


def test_the_package_has_a_method_of_every_kind():
    groups = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]["entry-points"]
    assert groups.keys() == GROUPS


def test_every_table_has_the_packages_row(python, tmp_path):
    (tmp_path / "policy.yaml").write_text("id: site\ntitle: A site\nextends: default\nguard:\n  stages: [length]\n")
    found = python("-c", LIBRARY)
    assert found["known"] == [True, True, True, True, False]
    assert found["loss"] == [1.0]  # advantage 1, margin 1 / (2 * 0.25) = 2
    assert found["dark"] == [True, False]
    assert found["length"] == [False, True]


def test_merge_has_a_command_for_it(python, tmp_path):
    ups = {"a": 1.0, "b": 5.0, "c": 2.0}
    for name, value in ups.items():
        factors = {"mid_block.to_q": LoraFactors(torch.ones(1, 3), torch.full((2, 1), value), 1.0)}
        save_adapter(tmp_path / name, factors, metadata={"base_fingerprint": "b" * 64, "category": name})
    summary = python("-m", "valign", "merge", "median", *ups, "-o", "out", "--rank", "1")
    assert summary["modules"] == 1
    ((_, merged),) = open_adapter(tmp_path / "out").items()
    torch.testing.assert_close(merged.delta(), torch.full((2, 3), 2.0))


def test_finetune_trains_it(python, tmp_path):
    for name, size in (("train", 8), ("test", 4)):
        rows = [f"{name} prompt number {i},{i % 2}" for i in range(size)]
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt,label", *rows]))
    options = "--task classification --data train.csv --held-out test.csv --text prompt --steps 2 --batch-size 4"
    found = python("-m", "valign", "finetune", "--model", "minilm", *options.split(), "--adapter", "lora-plus", "-o", "run")
    assert found
    assert (tmp_path / "run" / "adapter" / "adapter_config.json").exists()
