"""``valign detector`` and detectors by name, on miniature models."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.root import build
from vision_endpoint import running

runner = CliRunner(env={"COLUMNS": "200"})
app = build()


def call(*arguments):
    result = runner.invoke(app, [str(one) for one in arguments])
    if result.exception and not isinstance(result.exception, UserError | SystemExit):
        raise result.exception
    return result


def said(*arguments):
    result = call(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


def coloured(folder, name, channel, count, seed):
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 120, (24, 24, 3))
        if channel is not None:
            pixels[..., channel] += 120
        Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i:02d}.png")


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    for place, (name, channel) in enumerate((("violence", 0), ("hate", 1), ("harmless", 2))):
        coloured(folder, name, channel, 12, place)
    return folder


@pytest.fixture(scope="module")
def probe(labelled, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shelf") / "mine"
    result = call("detector", "fit", labelled, "--clip", "shapes", "-o", folder)
    assert result.stdout.strip() == str(folder), result.output
    return folder


def test_fit_show_and_list(probe, monkeypatch):
    shown = json.loads(call("detector", "show", probe, "--json").stdout)
    assert shown["classes"] == ["hate", "violence"]
    assert shown["measured"]["categories"][0]["positives"] == 6
    assert shown["made"]["fitted"] == 18
    assert 0 <= shown["sensitivity"] <= 1
    monkeypatch.setenv("VALIGN_DETECTORS", str(probe.parent))
    listed = json.loads(call("detector", "list", "--json").stdout)
    assert list(listed["detectors"]) == ["mine"]
    assert "image-classifier" in listed["kinds"]
    for command in (("list",), ("show", "mine"), ("show", "oracle")):
        text = call("detector", *command).stdout
        assert re.search(r"measures +hate.*violence", text) if command[0] == "show" else "violence" in text, text


def test_evaluate_measures_and_keeps_the_error(probe, labelled, tmp_path):
    fresh = tmp_path / "fresh"
    for place, (name, channel) in enumerate((("violence", 0), ("hate", 1), ("harmless", 2))):
        coloured(fresh, name, channel, 8, 100 + place)
    found = json.loads(call("detector", "evaluate", probe, fresh, "--json", "--save").stdout)
    whole = found["errors"][0]
    assert (whole["positives"], whole["negatives"]) == (16, 8)
    assert whole["sensitivity"]["low"] <= whole["sensitivity"]["value"] <= whole["sensitivity"]["high"]
    kept = json.loads((probe / "detector.json").read_text())
    assert kept["card"]["positives"] == 16
    assert kept["measured"]["images"] == str(fresh)
    assert "must not be the images that" in said("detector", "evaluate", probe, labelled)
    assert "harmful and harmless images, got 8 and 0" in said("detector", "evaluate", probe, one_sort(tmp_path, fresh))
    assert "--save needs a detector's folder" in said("detector", "evaluate", "oracle", "shapes", "--save")
    assert "judges images of models of the world shapes only" in said("detector", "evaluate", "oracle", fresh)


def one_sort(tmp_path, fresh):
    (tmp_path / "one").mkdir()
    (fresh / "hate").rename(tmp_path / "one" / "hate")
    return tmp_path / "one"


def test_a_worlds_renders_are_labelled_images(monkeypatch):
    found = json.loads(call("detector", "evaluate", "oracle", "shapes", "--per-category", "6", "--json").stdout)
    whole = found["errors"][0]
    assert (whole["positives"], whole["negatives"]) == (42, 18)
    assert whole["sensitivity"]["value"] > 0.9


def test_import_with_a_map(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, id2label={0: "nsfw", 1: "sfw"}, **sizes)
    ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "nsfw"
    made = json.loads(call("detector", "import", source, "--map", "nsfw=sexual", "--threshold", "0.4", "-o", out, "--json").stdout)
    assert (made["kind"], made["classes"], made["threshold"]) == ("image-classifier", ["sexual"], 0.4)
    (tmp_path / "map.yaml").write_text("map: {nsfw: Sexual}\nthresholds: {sexual: 0.3}\n")
    call("detector", "import", source, "--map-file", tmp_path / "map.yaml", "-o", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "detector.json").read_text())["card"]["threshold"] == 0.3
    new = ("-o", tmp_path / "new")
    assert "must name the category of at least one class" in said("detector", "import", source, *new)
    assert "--threshold must be in (0, 1], got 1.5" in said(
        "detector", "import", source, "--map", "nsfw=sexual", "--threshold", "1.5", *new
    )
    assert "--threshold must be NAME=NUMBER" in said("detector", "import", source, "--map", "nsfw=sexual", "--threshold", "x", *new)
    assert "--category has no effect on a classifier" in said("detector", "import", source, "--category", "hate", *new)
    assert "--repeats has no effect on a classifier" in said("detector", "import", source, "--repeats", "2", *new)
    assert "--map must be NAME=CATEGORY, got 'nsfw'" in said("detector", "import", source, "--map", "nsfw", *new)
    assert "exists. Choose another --out" in said("detector", "import", source, "--map", "nsfw=sexual", "-o", out)
    assert not (tmp_path / "new").exists()


def test_a_judge_is_asked_only_where_the_user_said(labelled, tmp_path):
    folder = tmp_path / "judge"
    call("detector", "import", "judge", "--category", "violence", "--repeats", "1", "-o", folder)
    assert "no endpoint was named" in said("detector", "evaluate", folder, labelled)
    assert "address is named when it is used" in said("detector", "import", "http://x/v1", "-o", tmp_path / "other")
    assert "--map has no effect on a judge" in said("detector", "import", "judge", "--map", "a=hate", "-o", tmp_path / "other")
    with running() as endpoint:
        found = json.loads(call("detector", "evaluate", f"{folder}@{endpoint.url('good')}", labelled, "--json", "--save").stdout)
        whole = found["errors"][0]
        assert (whole["flagged"], whole["positives"], whole["passed"]) == (12, 12, 12)
        assert "had the same answer" in found["remarks"][0] or "asked once" in found["remarks"][0]
        assert "must answer" in said("detector", "evaluate", f"{folder}@{endpoint.url('prose')}", labelled)
        assert "cannot be reached" in said("detector", "evaluate", f"{folder}@{endpoint.url('dead')}", labelled)
    assert call("detector", "show", folder).exit_code == 0


def test_bad_input_to_fit(labelled, tmp_path):
    new = ("-o", tmp_path / "new")
    assert "--clip must name a CLIP model's folder" in said("detector", "fit", labelled, "--clip", "none", *new)
    assert "does not exist" in said("detector", "fit", tmp_path / "nowhere", "--clip", "shapes", *new)
    assert "--map has no effect on renders" in said("detector", "fit", "shapes", "--clip", "shapes", "--map", "a=hate", *new)
    assert not (tmp_path / "new").exists()
