"""``valign realign``: the four commands on the bundled chat models, their help, and what they refuse."""

import json

import pytest
import torch
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import realign as commands
from valign.merging.realign import REALIGN
from valign.models.files.weight_files import open_weights
from valign.worlds.chat import adapter_folder, model_folder
from valign.worlds.chat.grammar import ChatGrammar


def realign(*arguments):
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


BASE, ALIGNED, TUNED = (model_folder(stage) for stage in ("base", "aligned", "memorized"))
MODELS = ("--base", BASE, "--aligned", ALIGNED, "--finetuned", TUNED)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    requests = ChatGrammar().requests("disallowed", 4, 0, split="train")
    rows = [{"prompt": list(r.messages), "chosen": r.answer, "rejected": r.compliance} for r in requests]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.mark.parametrize("name", list(REALIGN))
def test_help_has_an_example_of_each(name):
    text = realign(name, "--help").stdout
    assert f"valign realign {name}" in text
    assert "--strength" in text


@pytest.mark.parametrize(
    "arguments", [("resta", "--strength", "0.3"), ("safe-lora",), ("enchtable", "--set", "fine=false", "--strength", "0.2")]
)
def test_whole_chat_models(arguments, tmp_path):
    found = json.loads(realign(*arguments, *MODELS, "-o", tmp_path / "out").stdout)
    assert found["weights"] == 38
    assert 0 < found["moved"] < 2
    assert open_weights(tmp_path / "out").shapes == open_weights(TUNED).shapes
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_somf_learns_from_pairs_and_its_masks_serve_again(pairs, tmp_path):
    small = ("--steps", "2", "--batch-size", "2", "--set", "granularity=row")
    found = json.loads(realign("somf", *MODELS, "--pairs", pairs, *small, "-o", tmp_path / "out").stdout)
    assert found["masks"] == "learned"
    again = ("--masks", tmp_path / "out" / "mask" / "masks.safetensors", "--set", "granularity=row")
    assert json.loads(realign("somf", *MODELS, *again, "-o", tmp_path / "again").stdout)["masks"] == "given"
    one, other = open_weights(tmp_path / "out"), open_weights(tmp_path / "again")
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.shapes)
    with pytest.raises(UserError, match="somf needs --pairs: of a chat model"):
        realign("somf", *MODELS, "-o", tmp_path / "none")


def test_several_models_behind_one_option_and_adapters(tmp_path):
    found = json.loads(realign("resta", *MODELS, BASE, "--fuse", "mean", "-o", tmp_path / "two").stdout)
    assert found["form"] == "model"
    safety = adapter_folder("safety")
    made = json.loads(
        realign(
            "resta", "--base", BASE, "--aligned", safety, "--finetuned", safety, "--start", "base", "-o", tmp_path / "lora"
        ).stdout
    )
    assert made["form"] == "adapter"
    with pytest.raises(UserError, match="must have an aligned model that differs from the base"):
        realign("resta", "--base", BASE, "--aligned", BASE, "--finetuned", TUNED, "-o", tmp_path / "same")
    assert not (tmp_path / "same").exists()
