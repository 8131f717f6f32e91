"""The table from which stages are built, and a row of it from an installed package."""

import importlib

import pytest

from valign.checks import UserError
from valign.guard import Guard
from valign.guard.stages import STAGES, StageParts, build_stages
from valign.plugins import with_plugins
from valign.policy import load_policy

POLICY = "version: 1\nid: site\ntitle: Site\nextends: default\nguard: {stages: [lexical, %s]}\n"
PLUG_IN = """
from valign.guard import Verdict


class Zebras:
    name, level = "zebras", "word"

    def __init__(self, parts):
        self.title = parts.policy.title

    def check(self, prompt):
        return Verdict(stage=self.name, level="word", outcome="fire" if "zebra" in prompt else "pass")

    def check_many(self, prompts):
        return [self.check(prompt) for prompt in prompts]
"""


@pytest.mark.parametrize("name", ["lexical", "semantic", "learned", "values"])
def test_every_row_gives_the_stage_of_its_name(policy, minilm, name):
    assert STAGES[name](StageParts(policy, loaded=minilm)).name == name


def test_the_probe_is_on_the_model_that_was_given(policy):
    with pytest.raises(UserError, match="needs a probe of the model, got none"):
        STAGES["probe"](StageParts(policy))


def test_the_encoder_is_loaded_for_stages_that_need_it(policy):
    parts = StageParts(policy)
    assert [stage.name for stage in build_stages(parts)] == ["lexical", "values"]
    assert parts.loaded is None


def test_a_package_adds_a_stage(tmp_path, monkeypatch):
    info = tmp_path / "plug_zebras-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug_zebras\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[valign.guard_stages]\nzebras = plug_zebras:Zebras\n")
    (tmp_path / "plug_zebras.py").write_text(PLUG_IN)
    (tmp_path / "site.yaml").write_text(POLICY % "zebras")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    for table in ("valign.policy.schema.STAGE_NAMES", "valign.guard.stages.STAGES"):  # tables look for packages once
        monkeypatch.setattr(table, with_plugins("valign.guard_stages", {"lexical": STAGES["lexical"]}))
    guard = Guard.from_policy(tmp_path / "site.yaml")
    assert [stage.name for stage in guard.stages] == ["lexical", "zebras"]
    assert guard.stages[1].title == "Site"
    assert (guard.check("a zebra").stop, guard.check("a horse").stop) == ("zebras", "")


def test_a_stage_that_nobody_knows_is_a_mistake_of_the_policy(tmp_path):
    (tmp_path / "site.yaml").write_text(POLICY % "zebras")
    says = r"guard\.stages\[1\] must be one of lexical, semantic, learned, probe, hysac, values, got 'zebras'\."
    with pytest.raises(UserError, match=says):
        load_policy(tmp_path / "site.yaml")
