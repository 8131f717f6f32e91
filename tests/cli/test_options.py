"""Options that config dataclasses give to a command."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import pytest
import typer
import yaml
from command_lines import parse
from typer.testing import CliRunner

from valign.checks import UserError, check_options, option
from valign.cli.options import _panel, changes, configured, record, rest_of
from valign.memory import MemoryConfig
from valign.objectives import DiffusionDPO
from valign.recipes.alignguard import AlignGuardRecipe
from valign.training import PreferenceConfig

runner = CliRunner(env={"COLUMNS": "200"})


@dataclass(frozen=True, kw_only=True)
class Oven:
    heat: int = option(200, help="degrees", low=50, high=300)
    hours: float = option(1.0, help="until it is done", above=0)
    fan: bool = option(True, help="moves the air")
    mode: Literal["top", "bottom"] = option("top", help="where the heat comes from")
    trays: tuple[str, ...] = option((), help="what is in it", flags=("--tray",))
    weights: Mapping[str, float] = option(dict, help="of what is in it")
    timer: int | None = option(30, help="minutes; 0 is off", low=1, none=0)
    recipe: Path | None = option(None, help="file")
    self_cleaning: bool = option(False, help="now and then", rare=True)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class Fridge:
    heat: int = option(4, help="degrees", low=-30, high=10)
    door: str = option("left", help="side", choices=("left", "right"))


@dataclass(frozen=True, kw_only=True)
class Kitchen:
    oven: Oven = field(default_factory=Oven)
    fridge: Fridge = field(default_factory=Fridge)


def kitchen(*arguments: str, **options: object) -> dict:
    """What a command with these parts finds given."""
    app, found = typer.Typer(), {}

    @app.command(cls=configured(oven=Oven, fridge=Fridge, **options))
    def cook(ctx: typer.Context, name: Annotated[str, typer.Option(help="of the cook")] = "") -> None:
        found.update(oven=record(ctx, Oven), fridge=record(ctx, Fridge), given=changes(ctx, Oven, Fridge), rest=rest_of(ctx))

    result = runner.invoke(app, arguments)
    if result.exception:
        raise result.exception
    return found


EVERYTHING = Oven(heat=250, hours=0.5, fan=False, mode="bottom", trays=("a", "b"), weights={"a": 2.0}, timer=None, recipe=Path("x"))
TYPED = [
    "--heat=250",
    "--hours=0.5",
    "--no-fan",
    "--mode=bottom",
    "--tray=a",
    "--tray=b",
    "--weights=a=2",
    "--timer=0",
    "--recipe=x",
]


def test_each_type_is_typed_set_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").touch()
    typed = kitchen(*TYPED, "--fridge-heat=2")
    assert (typed["oven"], typed["fridge"]) == (EVERYTHING, Fridge(heat=2))
    as_set = [f"--set={name}={value}" for name, value in {"heat": 250, "hours": "5.0e-1", "fan": "no", "mode": "bottom"}.items()]
    as_set += ["--set", "trays=[a, b]", "--set", "weights={a: 2}", "--set", "timer=null", "--set", "recipe=x"]
    assert kitchen(*as_set)["oven"] == EVERYTHING
    plain = asdict(Kitchen(oven=EVERYTHING, fridge=Fridge(heat=2)))
    plain["oven"] |= {"trays": ["a", "b"], "recipe": "x"}
    for written in (plain, plain["oven"] | {"fridge.heat": 2}):  # as the config that holds both, or flat
        (tmp_path / "kitchen.yaml").write_text(yaml.safe_dump(written))
        read = kitchen("--config", str(tmp_path / "kitchen.yaml"))
        assert (read["oven"], read["fridge"]) == (typed["oven"], typed["fridge"])


def test_what_is_left_out_is_not_given(tmp_path):
    found = kitchen()
    assert (found["oven"], found["fridge"], found["given"], found["rest"]) == (Oven(), Fridge(), {}, {})


def test_the_command_line_wins_over_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("heat: 100\nhours: 2\n")
    found = kitchen("--config", str(tmp_path / "a.yaml"), "--heat", "120")
    assert found["given"] == {"heat": 120, "hours": 2.0}
    assert kitchen("--config", str(tmp_path / "a.yaml"), "--set", "heat=130")["oven"].heat == 130


def test_a_field_of_the_same_name_bears_its_part(tmp_path):
    assert kitchen("--fridge-heat", "1", "--set", "oven.heat=60")["given"] == {"heat": 1}
    found = kitchen("--fridge-heat", "1", "--set", "oven.heat=60")
    assert (found["oven"].heat, found["fridge"].heat) == (60, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "heet: 1\nsize: 2\n",
            r"must name options of the command, got heet, size\. Did you mean 'heat'\? Known: oven: heat, hours",
        ),
        ("heat: warm\n", r"--heat: Input should be a valid integer.*, got 'warm'"),
        ("heat: 400\n", r"--heat must be in \[50, 300\], got 400"),
        ("hours: 0\n", r"--hours must be in \(0, inf\), got 0"),
        ("mode: left\n", r"--mode: Input should be 'top' or 'bottom', got 'left'"),
        ("door: up\n", "--door must be one of left, right; got 'up'"),
        ("- heat\n", r"must hold NAME: VALUE lines, got list"),
        ("heat: !!python/object/apply:os.getcwd []\n", "must be YAML, got: could not determine a constructor"),
        ("heat: [\n", "must be YAML, got"),
    ],
)
def test_a_bad_file_is_refused(text, message, tmp_path):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        kitchen("--config", str(tmp_path / "bad.yaml"))


def test_bad_values_are_refused(tmp_path):
    with pytest.raises(UserError, match="--set must name options of the command, got heet"):
        kitchen("--set", "heet=1")
    with pytest.raises(UserError, match="--set must be NAME=VALUE, got 'heat'"):
        kitchen("--set", "heat")
    with pytest.raises(UserError, match="--weights must be NAME=NUMBER, got 'a'"):
        kitchen("--weights", "a")
    with pytest.raises(UserError, match=r"--config .*nowhere\.yaml does not exist"):
        kitchen("--config", str(tmp_path / "nowhere.yaml"))
    for typed, message in (
        (["--heat", "20"], r"--heat must be in \[50, 300\], got 20"),
        (["--mode", "left"], "--mode must be one of top, bottom; got 'left'"),
        (["--door", "up"], "--door must be one of left, right; got 'up'"),
        (["--heat", "hot"], "--heat must be a whole number, got 'hot'"),
        (["--recipe", "y"], "--recipe y does not exist"),
    ):
        with pytest.raises(ValueError, match=message):
            kitchen(*typed)


def test_a_recipe_written_as_yaml_is_what_was_typed(tmp_path):
    command = "valign train alignguard --model shapes --data d --all --out o"
    typed = parse(f"{command} --steps 5 --beta 2000 --no-flip --tracker tensorboard --set 'targets=[to_q]' --set alpha=2")
    recipe = AlignGuardRecipe().changed(**changes(typed, PreferenceConfig, DiffusionDPO))
    assert (recipe.training.steps, recipe.training.trackers, recipe.objective.beta) == (5, ("tensorboard",), 2000.0)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(asdict(recipe)))
    read = parse(f"{command} --config {tmp_path / 'recipe.yaml'}")
    found = AlignGuardRecipe.sdxl().changed(**changes(read, PreferenceConfig, DiffusionDPO))
    assert replace(found, training=replace(found.training, memory=recipe.training.memory)) == recipe
    (tmp_path / "sparing.yaml").write_text("training: {steps: 5, memory: {accumulation: 2}}\n")
    assert changes(parse(f"{command} --config {tmp_path / 'sparing.yaml'}"), MemoryConfig) == {"accumulation": 2}


def test_a_mistake_in_a_file_stops_before_any_model_is_loaded(tmp_path):
    (tmp_path / "bad.yaml").write_text("steps: 5\nspeed: 3\nbeeta: 2\n")
    for command in (
        "train alignguard --data d --all",
        "data build",
        "evaluate",
        "align --detector oracle",
        "baseline dpo --data d",
    ):
        with pytest.raises(UserError, match="must name options of the command, got speed, beeta"):
            parse(f"valign {command} --model nowhere --out {tmp_path / 'out'} --config {tmp_path / 'bad.yaml'}")
    assert not (tmp_path / "out").exists()


def test_other_names_may_belong_to_something_else():
    assert kitchen("--set", "rank=4", "--set", "adamw.beta=1", rest="the method")["rest"] == {"rank": 4, "adamw.beta": 1}


def test_a_rare_field_is_set_or_read():
    assert kitchen("--set", "self_cleaning=true")["oven"].self_cleaning
    with pytest.raises(UserError, match="No such option: --self-cleaning"):
        kitchen("--self-cleaning")


def test_only_some_fields_may_be_typed():
    only = {"oven": ("heat",)}
    assert kitchen("--heat", "60", "--set", "hours=2", typed=only)["oven"] == Oven(heat=60, hours=2.0)
    with pytest.raises(UserError, match="No such option: --hours"):
        kitchen("--hours", "2", typed=only)


def test_a_declaration_is_checked_when_the_config_is_made():
    with pytest.raises(ValueError, match=r"Oven.heat must be in \[50, 300\], got 20"):
        Oven(heat=20)
    with pytest.raises(ValueError, match=r"Oven\.mode must be one of top, bottom; got 'left'"):
        Oven(mode="left")
    assert Oven(timer=None).timer is None


def test_headings_of_the_help_are_words_and_not_classes():
    assert [_panel(name) for name in ("SamplingConfig", "TableOptions", "DiffusionDPO", "Amounts")] == [
        "Sampling options",
        "Table options",
        "Diffusion DPO",
        "Amounts",
    ]
