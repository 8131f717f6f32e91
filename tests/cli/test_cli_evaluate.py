"""``valign evaluate``, on a miniature pipeline with random weights and on nothing at all."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import evaluate as cli
from valign.evaluation import EvalPrompt, Suite, write_suite
from valign.interfaces import DetectorCard

pytestmark = pytest.mark.usefixtures("hub")
runner = CliRunner(env={"COLUMNS": "200"})
app = typer.Typer()
app.command(**cli.command.options)(cli.command)


class Brightness:
    card = DetectorCard("brightness", ("bright",), 0.5, "0" * 64, 0.9, 0.8, 50, 50, covers="all")

    def detect(self, images):
        return np.array([[np.asarray(image).mean() / 255] for image in images])

    def features(self, images):
        return np.stack([np.asarray(image.resize((2, 2)), dtype=float).ravel() for image in images])


@pytest.fixture
def suite_file(tmp_path):
    prompts = [
        EvalPrompt("u1", "a red thing", "hate", "explicit"),
        EvalPrompt("u2", "a blue thing", "violence", "implicit", held_out=True),
        *(EvalPrompt(f"b{i}", f"{i} green things") for i in range(3)),
    ]
    write_suite(tmp_path / "suite.jsonl", Suite("things", tuple(prompts)))
    return tmp_path / "suite.jsonl"


@pytest.fixture(scope="module")
def adapter(tiny_sd, tmp_path_factory):
    """A LoRA that moves the miniature's images, saved as training saves it."""
    import torch

    from valign.models.diffusion.loading import load_model
    from valign.models.diffusion.lora import adapted, attach_lora
    from valign.models.files.adapter_files import LoraFactors, save_adapter

    model = load_model(str(tiny_sd), device="cpu")
    attach_lora(model, rank=2)
    generator = torch.Generator().manual_seed(0)
    factors = {}
    for name, layer in adapted(model.denoiser, "expert").items():
        up = layer.lora_B["expert"].weight.detach()
        factors[name] = LoraFactors(layer.lora_A["expert"].weight.detach().clone(), torch.randn(up.shape, generator=generator), 1.0)
    folder = tmp_path_factory.mktemp("expert") / "adapter"
    save_adapter(folder, factors, metadata={})
    return folder


def test_end_to_end_on_a_pipeline_that_knows_no_world(tiny_sd, adapter, suite_file, tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "resolve_detector", lambda name, model: Brightness())
    out = tmp_path / "run"
    arguments = ["--model", str(tiny_sd), "--suite", str(suite_file), "-o", str(out), "--detector", "oracle"]
    arguments += ["--adapter", f"moved={adapter}", "--baseline", "negative-prompt", "--baseline", "sld-medium", "--steps", "2"]
    result = runner.invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert result.stdout.strip() == str(out / "report.html")
    summary = json.loads((out / "summary.json").read_text())
    systems = {system["name"]: system for system in summary["systems"]}
    assert list(systems) == ["base", "negative-prompt", "sld-medium", "moved"]
    assert systems["moved"]["rmse"]["mean"]["value"] > 0
    assert systems["moved"]["frechet"]["to_reference"] is None
    assert [systems[name]["extra_evaluations"] for name in systems] == [0, 0, 1, 0]
    assert "misses 10.00 % and falsely flags 20.00 %" in " ".join(result.stderr.split())
    for name in systems:
        assert name in result.stderr
    again = runner.invoke(app, arguments, catch_exceptions=False)
    assert again.stdout == result.stdout


def test_one_table_row_per_system():
    rate = {"share": {"value": 0.25, "low": 0.2, "high": 0.3}, "corrected": None}
    system = {"name": "a", "ip": [{"category": "", "column": "all", "rate": rate}], "fidelity": {}, "seconds_per_image": 0.5}
    system |= {"drift": None, "frechet": {"to_reference": None, "to_base": 3.0}, "clip_score": None}
    card = {"name": "d", "sensitivity": None, "specificity": None}
    table = cli.summary_table({"systems": [system], "suite": {"name": "s", "unsafe": 4, "benign": 2}, "detector": card})
    cells = [next(iter(column.cells)) for column in table.columns]
    assert str(cells[0]) == "a"
    assert [str(cell) for cell in cells[1:]] == ["25.0\n20–30", "–", "–", "3.00", "–", "0.50"]
    assert "never measured" in table.caption
    suite = {"name": "s", "unsafe": 9, "counted": 4, "benign": 2}
    apart = cli.summary_table({"systems": [system], "suite": suite, "detector": card})
    assert apart.title == "s: 4 unsafe (5 of other categories apart) and 2 benign prompts"


@pytest.mark.parametrize(
    ("sensitivity", "specificity", "said"),
    [
        (0.9, 0.8, "misses 10.00 % and falsely flags 20.00 %; → corrected"),
        (0.5, 0.4, "no better than chance .* nothing is corrected"),
    ],
)
def test_the_caption_says_whether_rates_are_corrected(sensitivity, specificity, said):
    card = {"name": "d", "sensitivity": sensitivity, "specificity": specificity}
    suite = {"name": "s", "unsafe": 4, "benign": 2}
    assert re.search(said, cli.summary_table({"systems": [], "suite": suite, "detector": card}).caption)


def test_held_out_benign_prompts_stand_beside_held_out_harm_and_lists_are_marked():
    rate = {"share": {"value": 0.25, "low": 0.2, "high": 0.3}, "corrected": None}
    ip = [{"category": "", "column": name, "rate": rate} for name in ("all", "held-out")]
    system = {"name": "a", "ip": ip, "fidelity": {}, "seconds_per_image": 0.5, "drift": None, "frechet": None, "clip_score": None}
    system |= {"benign_right": {"held-out": rate}}
    card = {"name": "d", "sensitivity": None, "specificity": None}
    summary = {"systems": [system | {"listed": listed} for listed in (False, True)], "detector": card}
    table = cli.summary_table(summary | {"suite": {"name": "s", "unsafe": 4, "benign": 2}})
    assert [column.header for column in table.columns][2:5] == ["harm %\nheld-\nout", "benign\nright %", "held-\nout\nright %"]
    held_out = [[str(cell) for cell in table.columns[place].cells] for place in (2, 4)]
    assert held_out == [["25.0\n20–30", "25.0\n20–30\nlisted"], ["25.0\n20–30", "25.0\n20–30"]]


def test_explicit_held_out_and_composed_stand_apart():
    rate = {"share": {"value": 0.25, "low": 0.2, "high": 0.3}, "corrected": None}
    ip = [{"category": "", "column": name, "rate": rate} for name in ("all", "composed", "explicit", "crowded", "held-out")]
    system = {"name": "a", "ip": ip, "fidelity": {}, "seconds_per_image": 0.5, "drift": None, "frechet": None, "clip_score": None}
    card = {"name": "d", "sensitivity": None, "specificity": None}
    table = cli.summary_table({"systems": [system], "suite": {"name": "s", "unsafe": 4, "benign": 2}, "detector": card})
    headers = [f"harm %\n{name}" for name in ("all", "explicit", "held-\nout", "composed")]
    assert [column.header for column in table.columns][1:5] == headers
    assert "\nFID" not in [column.header for column in table.columns]  # the table is for 80 columns; the report has it


@pytest.mark.parametrize("composed", [True, False])
def test_no_header_is_cut_at_80_columns(composed, capsys):
    rate = {"share": {"value": 1.0, "low": 0.9, "high": 1.0}, "corrected": {"value": 0.98, "low": 0.9, "high": 1.0}}
    names = ("all", "explicit", "held-out", *(("composed",) if composed else ()))
    system = {"ip": [{"category": "", "column": name, "rate": rate} for name in names], "seconds_per_image": 0.5, "drift": None}
    system |= {"counterpart": rate, "kept": {"everything asked": rate}, "fidelity": {"everything asked": rate}}
    system |= {"benign_right": {"held-out": rate}, "frechet": {"to_base": 12.34, "to_reference": None}, "clip_score": None}
    card = {"name": "d", "sensitivity": None, "specificity": None}
    long = "sld-strong-and-an-adapter-with-a-long-name"
    summary = {"systems": [system | {"name": "base"}, system | {"name": long}], "detector": card}
    Console(width=80).print(cli.summary_table(summary | {"suite": {"name": "s", "unsafe": 4, "benign": 2}}))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    assert long in "".join(line.split(" ")[0] for line in printed.splitlines())  # the name gives way, and is all there


def refusal(tmp_path, *arguments):
    result = runner.invoke(app, ["--model", "owner/nowhere", "-o", str(tmp_path / "run"), *map(str, arguments)])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "run").exists()
    return str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--baseline", "sld-huge"], "--baseline must be one of negative-prompt, sld-weak"),
        (["--adapter", "a=/nowhere"], "--adapter /nowhere does not exist"),
        (["--suite", __file__], "--detector must name what judges the images"),
        (["--policy", "shapes"], "--policy has no effect without --baseline or --values"),
        (
            ["--detector", "oracle"],
            "world-oracle judges images of models of the world shapes only, and owner/nowhere is not one of them",
        ),
        ([], "world-oracle judges images of models of the world shapes only"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(arguments, message, tmp_path):
    assert message in refusal(tmp_path, *arguments)


def test_a_detector_that_measures_nothing_asked_and_a_small_limit_are_refused(suite_file, tmp_path, monkeypatch):
    blind = Brightness()
    blind.card = replace(Brightness.card, covers={"bright": "sexual"})
    monkeypatch.setattr(cli, "resolve_detector", lambda name, model: blind)
    said = refusal(tmp_path, "--suite", suite_file, "--detector", "oracle")
    assert "must measure one of the categories hate, violence; it measures sexual" in said
    assert "must keep at least 3 prompts" in refusal(tmp_path, "--suite", suite_file, "--detector", "oracle", "--limit", "2")


def test_adapters_take_their_name_from_their_folder(tmp_path):
    (tmp_path / "violence" / "adapter").mkdir(parents=True)
    unnamed, named = tmp_path / "violence" / "adapter", f"b={tmp_path}"
    assert "got violence twice" in refusal(tmp_path, "--adapter", unnamed, "--adapter", named, "--adapter", f"violence={tmp_path}")
    assert "got b twice" in refusal(tmp_path, "--adapter", named, "--adapter", unnamed, "--adapter", named)


def test_trained_prompts_are_refused(suite_file, tmp_path):
    (tmp_path / "trained.csv").write_text("prompt,category\nA  blue thing,violence\n")
    said = refusal(tmp_path, "--suite", suite_file, "--detector", "oracle", "--trained-on", tmp_path / "trained.csv")
    assert "trained on, got 1 of 5: u2" in said


def test_a_reference_folder_needs_images(tiny_sd, suite_file, tmp_path, monkeypatch):
    seen = []

    class Watched(Brightness):
        def features(self, images):
            seen.append([image.getpixel((0, 0)) for image in images])
            return super().features(images)

    monkeypatch.setattr(cli, "resolve_detector", lambda name, model: Watched())
    (tmp_path / "real").mkdir()
    arguments = ["--suite", str(suite_file), "--detector", "oracle", "--reference", str(tmp_path / "real")]
    assert "--reference must be a folder of at least 2 images" in refusal(tmp_path, *arguments)
    for name, red in (("b.png", 2), ("a.png", 1)):
        Image.new("RGB", (2, 2), (red, 0, 0)).save(tmp_path / "real" / name)
    arguments += ["--model", str(tiny_sd), "-o", str(tmp_path / "run"), "--steps", "1"]
    runner.invoke(app, arguments, catch_exceptions=False)
    assert [(1, 0, 0), (2, 0, 0)] in seen  # by name
    (system,) = json.loads((tmp_path / "run" / "summary.json").read_text())["systems"]
    assert system["frechet"]["to_reference"] > 0


def test_what_holds_for_every_system_is_said_once(monkeypatch, capsys):
    monkeypatch.setattr("valign.cli.evaluate.summary_table", lambda summary: "table")
    same, own = "The detector found nothing.", "tuned shows less harm."
    systems = [{"text": same}, {"text": same}, {"text": own}]
    conclusions = {"headline": f"base shows no harm. {same}", "systems": systems}
    cli.print_summary({"conclusions": conclusions, "agreement": [], "notes": []}, Path("out"))
    said = capsys.readouterr().err
    assert (said.count(same), said.count(own)) == (1, 1)
