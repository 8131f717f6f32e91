"""Mistakes that are found from the source of the options alone, before a library that takes seconds is imported."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import typer.main

from valign.adapters.registry import ADAPTERS
from valign.checks import UserError, declared_options, option
from valign.cli.options import Configured
from valign.cli.quick import (
    FAMILIES,
    Field,
    bundled,
    chosen_rows,
    fields_in,
    fields_of,
    own_words,
    refuse_missing,
    refuse_model,
    refuse_out_of_range,
    refuse_settings,
    refuse_unknown,
    table_row,
    typed_fields,
)
from valign.cli.root import build
from valign.data.images.filters import FILTERS
from valign.data.images.pairs import PAIRINGS
from valign.merging import MERGES
from valign.merging.realign import REALIGN
from valign.models.diffusion import loading
from valign.objectives import PRESERVING
from valign.optimizers.registry import OPTIMIZERS, PERTURBATIONS
from valign.worlds import WORLDS


def configured_commands(command, name="valign"):
    if isinstance(command, Configured):
        yield name, command
    for word, inner in getattr(command, "commands", {}).items():
        yield from configured_commands(inner, f"{name} {word}")


def test_what_is_read_from_the_source_is_what_the_dataclasses_declare():
    found = dict(configured_commands(typer.main.get_command(build())))
    assert len(found) > 10
    for command in found.values():
        for part, kind in command.kinds().items():
            for name, declared in fields_of(kind).items():
                read = fields_of(command.parts[part])[name]
                assert read._replace(choices=(), limits={}) == declared._replace(choices=(), limits={}), name
                assert read.choices in (declared.choices, ()), name  # () where only running the source tells
                assert read.limits.items() <= declared.limits.items(), name


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
    folders = ("adapters", "optimizers", "objectives/preserving")
    refuse_unknown(["--set", "rank=4", "--set=agl.lambda_A=1", "--set", "dropout=0.1"], [], parts, {}, rest=True, rest_from=folders)
    with pytest.raises(UserError, match=r"^--set must name options of the command, got lora\.rnk\. Did you mean 'rank'"):
        refuse_unknown(["--set", "lora.rnk=4"], [], parts, {}, rest=True, rest_from=folders)
    refuse_unknown(["--accumulation=2", "--set", "eight_bit=true", "--memory-limit", "3"], [], parts, {}, rest=False)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    steps: int = option(5, help="x", low=1)
    rate: float = option(0.5, help="x", above=0, high=1)
    kind: str = option("a", help="x", choices=("alpha", "beta"))
    weights: dict[str, float] = option(dict, help="x")
    limit: int | None = option(None, help="x", none="all", low=2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--steps many", r"^--steps must be a whole number, got 'many'"),
        ("--steps=2.5", r"^--steps must be a whole number, got '2\.5'"),
        ("--steps 0", r"^--steps must be in \[1, inf\), got 0"),
        ("--rate 0", r"^--rate must be in \(0, 1\], got 0"),
        ("--rate nan", r"^--rate must be a number, got 'nan'"),
        ("--kind alhpa", r"^--kind must be one of alpha, beta; got 'alhpa'\. Did you mean 'alpha'"),
        ("--later-steps 0", r"^--later-steps must be in \[1, inf\), got 0"),
    ],
)
def test_a_value_is_held_against_the_declaration(line, message):
    parts = {"first": Sizes, "later": Sizes}
    with pytest.raises(UserError, match=message):
        refuse_out_of_range(line.split(), typed_fields(parts, {}, []))
    refuse_out_of_range(["--", *line.split()], typed_fields(parts, {}, []))
    own = ["--steps", "--rate", "--kind"] if "later" not in line else ["--later-steps"]
    refuse_out_of_range(line.split(), typed_fields(parts, {}, own))
    right = "--steps 1 --rate 1.0e-3 --kind beta --weights ties=0.3 --limit all --steps"
    refuse_out_of_range(right.split(), typed_fields(parts, {}, []))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("steps=0", r"^--set steps must be in \[1, inf\), got 0"),
        ("first.rate=2", r"^--set first\.rate must be in \(0, 1\], got 2"),
        ("kind=alhpa", r"^--set kind must be one of alpha, beta; got 'alhpa'\. Did you mean 'alpha'"),
    ],
)
def test_a_setting_is_held_against_every_declaration_of_its_name(word, message):
    parts = [fields_of(Sizes), fields_of("valign.memory:MemoryConfig")]
    with pytest.raises(UserError, match=message):
        refuse_settings(["--set", word], parts)
    name = word.partition("=")[0]
    for kept in ("null", "[0, 1]", "{a: 0}", "$X"):
        refuse_settings([f"--set={name}={kept}"], parts)
    refuse_settings(["--set", word], [{"steps": Field((), False), "rate": Field((), False), "kind": Field((), False)}, *parts])
    refuse_settings(["--set", "unknown=0"], parts)


def test_what_was_chosen_by_name_has_its_own_settings():
    named = {"--adapter": ("valign.adapters.registry:ADAPTERS", "none"), "--preserve": ("valign.objectives:PRESERVING",)}
    args = ["--adapter", "lora+none", "--preserve=kl+agl", "--adapter", "nothing"]
    rows = [
        "valign.adapters.lora:LoraOptions",
        "valign.objectives.preserving.kl_to_start:KlToStart",
        "valign.objectives.preserving.agl:AGL",
    ]
    assert list(chosen_rows(args, named)) == rows
    with pytest.raises(UserError, match=r"^--set agl\.lambda_A must be in \[0, inf\), got -1"):
        refuse_settings(["--set", "agl.lambda_A=-1"], [fields_of(row) for row in rows])


def test_choices_may_stand_in_a_table():
    known = fields_of("valign.data.build:DataConfig")
    assert (known["pairing"].choices, known["filter"].choices) == (PAIRINGS, FILTERS)


def test_models_are_told_by_their_index(tmp_path):
    assert {name: family.family for name, family in loading.FAMILIES.items()} == FAMILIES
    page = (Path(__file__).parents[2] / "docs" / "install.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in page for family in FAMILIES)
    assert set(WORLDS) <= set(bundled())
    refuse_model("shapes")
    with pytest.raises(UserError, match=r"shapse does not exist\..* Did you mean 'shapes'"):
        refuse_model("shapse")
    refuse_model("gpt2", any_model=True)
    refuse_model("sd15", models=("sd15",))
    with pytest.raises(UserError, match=r"sd16 does not exist\..* Did you mean 'sd15'"):
        refuse_model("sd16", models=("sd15",))
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"must be one of StableDiffusionPipeline, StableDiffusionXLPipeline; got FluxPipeline"):
        refuse_model(str(tmp_path), any_model=True)


def test_a_model_of_the_hub_is_asked_for_before_anything_is_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sd15").mkdir(parents=True)
    index, asked = tmp_path / "model_index.json", []
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    monkeypatch.setattr("huggingface_hub.model_info", lambda name, timeout: asked.append((name, timeout)))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(index))
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    refuse_model("owner/name")
    index.write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"must be one of StableDiffusionPipeline, StableDiffusionXLPipeline; got FluxPipeline"):
        refuse_model("owner/name")
    assert asked == [("owner/name", 5)] * 2

    def unknown(name, timeout):
        raise OSError("404 Client Error. (Request ID: x)\nmore")

    monkeypatch.setattr("huggingface_hub.model_info", unknown)
    message = (
        r"^models/sd16 is not a folder here and could not be fetched from the hub: 404 Client Error\. Did you mean 'models/sd15'"
    )
    with pytest.raises(UserError, match=message):
        refuse_model("models/sd16")


def test_options_of_base_classes_and_rows_of_tables_are_read_from_the_source():
    for name, kind in {**MERGES, **REALIGN}.items():
        table = "valign.merging:MERGES" if name in MERGES else "valign.merging.realign:REALIGN"
        assert set(fields_of(table_row(table, name))) == set(declared_options(kind)), name
    assert table_row("valign.merging:MERGES", "regmean") == "valign.merging.regmean:RegMean"
    with pytest.raises(LookupError, match="has no row nothing"):
        table_row("valign.merging:MERGES", "nothing")
    assert fields_of("valign.memory:MemoryConfig")["precision"].choices == ("auto", "float32", "bfloat16", "float16")


def test_words_without_the_options_of_the_parts():
    known = typed_fields({"memory": "valign.memory:MemoryConfig"}, {}, [])
    assert known["--phased"].kind == "bool"
    line = "a --accumulation 2 b --phased c --precision=float32 --set x=1 d --config f.yaml -o e -- --accumulation"
    assert own_words(line.split(), known) == ["a", "b", "c", "d", "-o", "e", "--", "--accumulation"]


def test_files_to_read_must_be_there(tmp_path):
    refuse_missing(["--data", str(tmp_path), "--out", "new"], any_model=False)
    refuse_missing(["--data", "shapes"], any_model=False)
    with pytest.raises(UserError, match=r"--data nowhere does not exist\. Check the path"):
        refuse_missing(["--data=nowhere"], any_model=False)


def test_every_option_of_a_method_is_known_beforehand():
    methods = [*ADAPTERS.values(), *OPTIMIZERS.values(), *PERTURBATIONS.values(), *PRESERVING.values()]
    known = fields_in(("adapters", "optimizers", "objectives/preserving"))
    assert {field.name for method in methods for field in fields(method)} <= set(known)
