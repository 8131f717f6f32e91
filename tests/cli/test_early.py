"""Names and paths that are refused before a library is imported, and what must pass."""

import pytest
from typer.testing import CliRunner

from valign.adapters.registry import ADAPTERS
from valign.attacks import ATTACKS
from valign.checks import UserError
from valign.cli.common import BUDGETS
from valign.cli.early import DEVICES, TUNINGS, refuse_device, refuse_values
from valign.cli.finetune import TASKS
from valign.cli.quick import given_values, table_names
from valign.cli.root import build
from valign.data.tasks.base import SCORES
from valign.data.tasks.texts import GLUE
from valign.detectors import DETECTORS
from valign.merging import MERGES
from valign.objectives import PRESERVING
from valign.optimizers.registry import OPTIMIZERS, PERTURBATIONS
from valign.policy.loader import BUNDLED
from valign.recipes.repair import LADDERS
from valign.training.tasks.reinforce.run import METHODS
from valign.worlds import world

NAMED = {"--adapter": TUNINGS, "--baseline": ("sld-weak", "sld-max")}


def test_tables_are_read_as_they_are():
    assert table_names("valign.detectors:DETECTORS") == list(DETECTORS)
    assert [name for place in TUNINGS for name in table_names(place)] == [*ADAPTERS, *OPTIMIZERS, *PERTURBATIONS]
    assert table_names("valign.objectives:PRESERVING") == list(PRESERVING)
    assert table_names("valign.recipes.repair:LADDERS") == list(LADDERS)
    assert table_names("valign.training.tasks.reinforce.run:METHODS") == list(METHODS)
    assert table_names("valign.attacks:ATTACKS") == list(ATTACKS)
    assert table_names("valign.merging:MERGES") == list(MERGES)
    assert [name for place in TASKS for name in table_names(place)] == [*GLUE, *SCORES]
    assert all(name == task.name for name, task in GLUE.items())
    assert list(world("shapes").budgets) == list(BUDGETS)
    for bench in ("resilience", "configs", "reinforce"):
        assert table_names(f"valign.experiments.{bench}:BUDGETS") == list(BUDGETS)
    assert table_names("valign.experiments.adapters.settings:BUDGETS") == ["tiny", "quick", "full"]
    with pytest.raises(LookupError, match="NOTHING is not in its source"):
        table_names("valign.detectors:NOTHING")


@pytest.mark.parametrize(("group", "close"), [("merge", "regmean"), ("realign", "resta")])
def test_a_row_of_a_table_is_guessed(group, close):
    ran = CliRunner().invoke(build(), [group, close[:-1], "-o", "o"])
    assert f"No such command: {close[:-1]}. Did you mean {close!r}?" in str(ran.exception)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--policy deflt", r"^policy deflt does not exist\. Give a YAML file, or one of .*\. Did you mean 'default'"),
        ("-p none", r"^policy none does not exist"),
        ("--guard=shaps", r"^policy shaps does not exist\..* Did you mean 'shapes'"),
        ("--detector orcale", r"^--detector must be oracle, nudenet.*; got 'orcale'\. Did you mean 'oracle'"),
        ("--detector oracle+nudnet", r"got 'nudnet'\. Did you mean 'nudenet'\? In detectors: none"),
        ("--detector safety-checker=nowhere", r"^--detector safety-checker=nowhere: nowhere does not exist\. Check the path"),
        ("--filter-detector safty-checker=.", r"got 'safty-checker=\.'\. Did you mean 'safety-checker'"),
        ("--suite shpes", r"^--suite shpes does not exist\..* Did you mean 'shapes'"),
        ("--before nowhere", r"^--before nowhere must be a folder of a chat model, a diffusers pipeline or an adapter, got none"),
        ("--after chat:bas", r"bundled are chat, shapes, chat:base, .*\. Did you mean 'chat:base'"),
        ("--device cdua", r"^device must be auto, cpu, cuda or another torch device, got 'cdua'\. Did you mean 'cuda'"),
        ("--adapter lroa", r"^--adapter must be one of lora, .*; got 'lroa'\. Did you mean 'lora'"),
        ("--adapter lora+mgp", r"got 'mgp'\. Did you mean 'mgpo'"),
        ("--baseline sld-mx", r"^--baseline must be one of sld-weak, sld-max; got 'sld-mx'\. Did you mean 'sld-max'"),
        ("--retain nowhere.csv", r"^--retain nowhere\.csv does not exist\. Check the path"),
    ],
)
def test_a_wrong_value_is_refused_with_what_is_close_to_it(line, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        refuse_values(line.split(), ["--retain", "--out"], NAMED)
    refuse_values(["--", *line.split()], ["--retain", "--out"], NAMED)  # behind -- nothing is an option


def test_what_is_there_passes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "detectors" / "probe").mkdir(parents=True)
    (tmp_path / "mine.yaml").write_text("")
    for policy in (*BUNDLED, "mine.yaml"):
        refuse_values(["--policy", policy, "--guard", policy], [], {})
    detectors = (
        "probe+oracle",
        "nudenet",
        "detectors/probe",
        "judge@http://here/v1",
        "safety-checker=detectors",
        "none",
        "shapes",
        "",
    )
    (tmp_path / "judge").mkdir()
    for detector in detectors:
        refuse_values(["--detector", detector], [], {})
    refuse_values(
        ["--guard", "none", "--suite", "mine.yaml", "-s", "shapes", "--out", "new", "--adapter", "full+dct-adamw"], ["--out"], NAMED
    )
    refuse_values(["--start", "shipped"], ["--start"], {})
    for place in ("chat", "shapes", "chat:base", "chat:safety", "http://here/v1", "judge"):
        refuse_values(["--before", place, "--after", place], [], {})
    with pytest.raises(UserError, match="--before owner/name must be a folder"):  # not in the hub's cache
        refuse_values(["--before", "owner/name"], [], {})
    refuse_values(["--guard", "anything"], [], {}, own=["--guard"])
    assert list(given_values(["a", "--x=1", "-o", "b", "--flag"])) == [("--x", "1"), ("-o", "b"), ("--flag", "")]


def test_a_device_of_this_build(monkeypatch):
    import torch

    for name in set(DEVICES) - {"auto", "npu"}:  # npu is the name that a package gives to privateuseone
        torch.device(name)
    monkeypatch.setattr("valign.cli.early._torch_version", lambda: "2.9.0+cpu")
    with pytest.raises(UserError, match=r"device cuda:1 was asked for, but this machine or this build of torch has no CUDA"):
        refuse_device("cuda:1")
    refuse_device("cuda:1", elsewhere=True)
    refuse_device("cpu")
    monkeypatch.setattr("valign.cli.early._torch_version", lambda: "2.9.0+cu128")
    refuse_device("cuda")
