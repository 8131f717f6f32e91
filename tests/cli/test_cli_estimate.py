"""``valign estimate``, and what every command asks before it loads a weight."""

import json
import shutil

import pytest
import typer
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import estimate as cli
from valign.cli.fitting import diffusion_run, fit
from valign.memory import MemoryConfig
from valign.training import PreferenceConfig

app = typer.Typer()
app.command(**cli.command.options)(cli.command)


@pytest.fixture(scope="module")
def bare(tiny_sd, tmp_path_factory):
    """A pipeline's folder without weights."""
    target = tmp_path_factory.mktemp("models") / "bare"
    return shutil.copytree(tiny_sd, target, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("align", ["make image pairs", "encode prompts", "encode images", "train", "search the strength", "evaluate"]),
        ("finetune", ["encode prompts", "encode images", "train"]),
        ("serve", ["generate images"]),
    ],
)
def test_every_phase_is_estimated_without_weights(bare, command, phases):
    result = CliRunner().invoke(app, ["--model", str(bare), "--command", command, "--device", "cpu", "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert [phase["phase"] for phase in record["phases"]] == phases
    assert all(phase["memory_gb"] >= 0.9 and phase["seconds"] is not None for phase in record["phases"])


def test_a_chat_model_is_estimated_by_its_config(bare, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, vocab_size=128
    ).save_pretrained(tmp_path)
    asked = ["--model", str(tmp_path), "--command", "finetune", "--task", "chat", "--device", "cpu", "--json"]
    lora, full = (json.loads(CliRunner().invoke(app, [*asked, *more]).stdout) for more in ([], ["--full"]))
    assert full["phases"][0]["disk_gb"] >= lora["phases"][0]["disk_gb"]
    result = CliRunner().invoke(app, ["--model", str(bare), *asked[2:]])
    assert "must have a config.json to be estimated by" in str(result.exception)


def test_what_cannot_be_estimated_is_refused(tmp_path):
    for given, message in (
        (["--model", str(tmp_path / "nothing")], "does not exist. Give a diffusers folder, sd15, sd21, sdxl, or a hub id"),
        (["--model", "sd15", "--command", "aling"], "Did you mean 'align'"),
        (["--model", "sd15", "--task", "chat"], "--task chat is a task of finetune"),
        (["--model", "sd15", "--command", "serve", "--accumulation", "2"], "memory.accumulation has no effect on serve"),
    ):
        assert message in str(CliRunner().invoke(app, given).exception)


def test_a_run_beyond_the_machine_is_refused_before_anything_is_loaded(bare, tmp_path):
    memory = MemoryConfig(limit=0.92)

    def run():
        return diffusion_run(bare, memory, "cpu", lambda known: [known.training(PreferenceConfig(memory=known.memory))], rows=16)

    with pytest.raises(UserError, match=r"The run needs about 0\.9\d GB in its phase 'train', and 0\.92 GB are free on cpu\."):
        fit(run, bare, memory, "cpu", tmp_path)


def test_what_is_small_needs_no_estimate(bare, tmp_path):
    def run():
        raise AssertionError("estimated")

    assert fit(run, bare, MemoryConfig(), "cpu", tmp_path) == MemoryConfig()
    assert fit(run, None, MemoryConfig(limit=1.0), "cpu", tmp_path) == MemoryConfig(limit=1.0)
