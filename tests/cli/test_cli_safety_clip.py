"""``valign train hysac``, ``detector search`` and ``detector adapt`` on a CLIP of some ten thousand numbers."""

import json

import pytest
from typer.testing import CliRunner

from clip_models import SAFE, UNSAFE, build_clip, coloured_quadruples, square
from valign.checks import UserError
from valign.cli.root import build

runner = CliRunner(env={"COLUMNS": "200"})
app = build()
TRAIN = ("--steps", 40, "--batch-size", 8, "--learning-rate", 0.02, "--validate-every", 20, "--rank", 4, "--alpha", 4)


def call(*arguments):
    result = runner.invoke(app, [str(one) for one in arguments])
    if result.exception and not isinstance(result.exception, UserError | SystemExit):
        raise result.exception
    return result


def said(*arguments):
    result = call(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("data"), []
    for row in coloured_quadruples(12).rows:
        images = {f"{side}_image": f"{row.id}-{side}.png" for side in ("safe", "unsafe")}
        for side in ("safe", "unsafe"):
            row.image(side).save(folder / images[f"{side}_image"])
        rows.append({"safe": row.safe, "unsafe": row.unsafe, "category": row.category, **images})
    (folder / "quadruples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def trained(clip, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors") / "hysac"
    result = call("train", "hysac", "--clip", clip, "--data", data, "--policy", "shapes", "--out", folder, *TRAIN)
    assert result.stdout.strip() == str(folder), result.output
    assert "prompts" in result.stderr
    return folder


def test_what_was_trained_is_shown_and_evaluated(trained):
    shown = json.loads(call("detector", "show", trained, "--json").stdout)
    assert (shown["kind"], shown["classes"]) == ("hysac", ["unsafe"])
    assert shown["measured"]["prompts"][0]["positives"] == 4
    assert "prompts" in call("detector", "show", trained).stdout


def test_a_search_moves_unsafe_queries(trained, tmp_path):
    for number, colour in enumerate((SAFE[1], UNSAFE["violence"][1])):
        square(colour, number).save(tmp_path / f"{number}.png")
    ask = ("detector", "search", trained, "flame in the photo", tmp_path / "1.png", "--images", tmp_path, "--top", 2, "--margin", 0)
    prompt, image = json.loads(call(*ask, "--json").stdout)
    assert {one["item"] for one in prompt["found"]} == {"0.png", "1.png"}
    assert isinstance(prompt["unsafe"], bool)
    assert image["query"].endswith("1.png")
    assert not any(row["moved"] for row in json.loads(call(*ask, "--plain", "--json").stdout))
    assert "probability of harm" in call(*ask).stdout
    (tmp_path / "texts.txt").write_text("heart in the photo\nflame in the photo\n")
    (found,) = json.loads(call("detector", "search", trained, "heart in the", "--texts", tmp_path / "texts.txt", "--json").stdout)
    assert {one["item"] for one in found["found"]} == {"heart in the photo", "flame in the photo"}
    assert "needs --images FOLDER or --texts FILE" in said("detector", "search", trained, "x")


def test_the_guard_takes_the_folder(trained, tmp_path):
    policy = tmp_path / "mine.yaml"
    policy.write_text("version: 1\nid: mine\ntitle: Mine\nextends: shapes\nguard: {stages: [hysac]}\n")
    found = json.loads(call("guard", "check", "flame in the photo", "--policy", policy, "--hysac", trained, "--json").stdout)
    assert "hysac" in [verdict["stage"] for verdict in found["trace"]]
    assert "which needs a hyperbolic CLIP, got none" in said("guard", "check", "a", "--policy", policy)


def test_a_detector_is_adapted_by_command(trained, tmp_path):
    labelled, clean = tmp_path / "labelled", tmp_path / "clean"
    for name, colour in (("hate", UNSAFE["hate"][1]), ("violence", UNSAFE["violence"][1]), ("harmless", SAFE[1])):
        (labelled / name).mkdir(parents=True)
        for number in range(4):
            square(colour, 30 + number).save(labelled / name / f"{number}.png")
    clean.mkdir()
    for number in range(4):
        square(SAFE[1], number).save(clean / f"{number}.png")
    adapt = ("detector", "adapt", trained)
    quick = ("--steps", 2, "--batch-size", 2, "--condition", "night", "--test", labelled, "--policy", "shapes")
    result = call(*adapt, "--images", clean, "-o", tmp_path / "robust", *quick, "--json")
    found = json.loads(result.stdout)
    assert list(found) == ["clean", "night"]
    assert found["night"]["after"]["positives"] == 8
    assert "hysac" in call("detector", "show", tmp_path / "robust").stdout
    assert "exists. Choose another --out" in said(
        "detector", "adapt", trained, "--images", clean, "-o", tmp_path / "robust", *quick
    )
    assert "needs --images IMAGES or --pairs FOLDER" in said(*adapt, "-o", tmp_path / "x", *quick)
    assert "no does not exist" in said(*adapt, "--images", "no", "-o", tmp_path / "x", *quick)
    file = tmp_path / "notes.txt"
    file.write_text("words")
    assert "must be a folder of images or a world's name" in said(*adapt, "--images", file, "-o", tmp_path / "x", *quick)


def test_mistakes_stop_before_the_model_is_loaded(data, tmp_path):
    train = ("train", "hysac", "--out", tmp_path / "o")
    assert "--rank must be in [1, inf), got 0." in said(*train, "--clip", "x", "--data", data, "--rank", 0)
    assert "does not exist. Check the path" in said(*train, "--clip", "shapes", "--data", tmp_path / "no")
