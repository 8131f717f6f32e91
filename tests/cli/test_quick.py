"""Mistakes that are found from the source of the options alone, before a library that takes seconds is imported."""

import json

import pytest
import typer.main

from valign.checks import UserError
from valign.cli.options import _Configured
from valign.cli.quick import FAMILIES, bundled, fields_of, refuse_missing, refuse_model, refuse_unknown
from valign.cli.root import build
from valign.models.diffusion import loading
from valign.worlds import WORLDS


def configured_commands(command, name="valign"):
    if isinstance(command, _Configured):
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from configured_commands(inner, f"{name} {word}")


def test_what_is_read_from_the_source_is_what_the_dataclasses_declare():
    found = dict(configured_commands(typer.main.get_command(build())))
    assert len(found) > 10
    for command in found.values():
        for part, kind in command.kinds().items():
            assert fields_of(command.parts[part]) == fields_of(kind), part


def test_no_option_that_a_command_has_is_refused():
    for name, command in configured_commands(typer.main.get_command(build())):
        own = [flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)]
        parameters = command.get_params(command.context_class(command, info_name=name))
        flags = [flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)]
        refuse_unknown([flag for flag in flags if flag.startswith("--")], own, command.parts, command.typed, rest=True)
        assert flags, name


def test_names_are_guessed():
    parts = {"memory": "valign.memory:MemoryConfig"}
    for args, message in (
        (["--acumulation", "2"], r"^No such option: --acumulation\. Did you mean '--accumulation'\?"),
        (["--set", "phazed=true"], r"^--set must name options of the command, got phazed\. Did you mean 'phased'\?"),
        (["--set=memory.phazed=true"], r"got memory\.phazed\. Did you mean 'phased'"),
        (["--eight-bit"], r"^No such option: --eight-bit"),  # rare: for --set
    ):
        with pytest.raises(UserError, match=message):
            refuse_unknown(args, [], parts, {}, rest=False)
    refuse_unknown(["--set", "anything=1", "--", "--what"], [], parts, {}, rest=True)
    refuse_unknown(["--accumulation=2", "--set", "eight_bit=true", "--memory-limit", "3"], [], parts, {}, rest=False)


def test_models_are_told_by_their_index(tmp_path):
    assert set(FAMILIES) == set(loading.FAMILIES)
    assert set(WORLDS) <= set(bundled())
    refuse_model("owner/name")
    refuse_model("shapes")
    with pytest.raises(UserError, match=r"shapse does not exist\..* Did you mean 'shapes'"):
        refuse_model("shapse")
    refuse_model("gpt2", any_model=True)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"must be one of StableDiffusionPipeline, StableDiffusionXLPipeline; got FluxPipeline"):
        refuse_model(str(tmp_path), any_model=True)


def test_files_to_read_must_be_there(tmp_path):
    refuse_missing(["--data", str(tmp_path), "--out", "new"], any_model=False)
    refuse_missing(["--data", "shapes"], any_model=False)
    with pytest.raises(UserError, match=r"--data nowhere does not exist\. Check the path"):
        refuse_missing(["--data=nowhere"], any_model=False)
