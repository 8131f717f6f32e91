"""``valign generate``: formats, what stands in a file and in the manifest, several prompts and seeds, and nothing overwritten."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.image_output import DESCRIPTION, KEY, format_of, grid, write_all, write_image
from valign.cli.root import build


def run(*arguments):
    result = CliRunner(env={"COLUMNS": "300"}).invoke(build(), [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def lines(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text(encoding="utf-8").splitlines()]


def inside(path):
    """The record in a file's own metadata."""
    with Image.open(path) as image:
        return json.loads(image.text[KEY] if image.format == "PNG" else image.getexif()[DESCRIPTION])


@pytest.mark.parametrize(("name", "kind"), [("a.png", "PNG"), ("a.JPG", "JPEG"), ("a.webp", "WEBP")])
def test_the_suffix_is_the_format_and_the_record_is_in_the_file(tmp_path, name, kind):
    path, about = tmp_path / name, {"prompt": "ein Mädchen \U0001f600", "seed": 3}
    assert format_of(path, several=False) == path.suffix.lower()
    write_image(Image.new("RGB", (16, 16), "red"), path, about)
    with Image.open(path) as image:
        assert (image.format, image.size) == (kind, (16, 16))
    assert inside(path) == about


@pytest.mark.parametrize(
    ("name", "several", "wanted", "message"),
    [
        ("a.gif", False, "", r"--out must end in \.png, \.jpg, \.jpeg, \.webp, got .*a\.gif"),
        ("a", False, "", "--out must end in"),
        ("a.png", False, "webp", "--format webp does not fit"),
        ("a.png", True, "", "must be a new folder for several images"),
        ("a", True, "gif", "--format must be one of png, jpg, jpeg, webp"),
        ("there.png", False, "", r"there\.png exists\. Choose another --out, or delete it first"),
        ("there.png", True, "", r"there\.png exists"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is_made(tmp_path, name, several, wanted, message):
    (tmp_path / "there.png").write_bytes(b"mine")
    with pytest.raises((UserError, ValueError), match=message):
        format_of(tmp_path / name, several=several, wanted=wanted)
    assert (tmp_path / "there.png").read_bytes() == b"mine"


def test_a_grid_has_a_row_per_prompt_and_an_empty_place_for_what_was_blocked():
    red, blue = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    sheet = grid([red, None, blue, red], 2)
    assert sheet.size == (8, 8)
    assert [sheet.getpixel(place) for place in ((0, 0), (4, 0), (0, 4), (4, 4))] == [
        (255, 0, 0),
        (255, 255, 255),
        (0, 0, 255),
        (255, 0, 0),
    ]
    with pytest.raises(UserError, match="A grid must have an image, got none"):
        grid([None], 1)


def test_a_manifest_grows_and_names_what_was_blocked(tmp_path):
    image = Image.new("RGB", (4, 4))
    for name in ("a.png", "b.png"):
        write_all([image], [{"seed": 1}], tmp_path / name, ".png", several=False)
    write_all([None], [{"seed": 2}], tmp_path / "c.png", ".png", several=False)
    assert lines(tmp_path) == [{"file": "a.png", "seed": 1}, {"file": "b.png", "seed": 1}, {"file": None, "seed": 2}]


def test_prompts_and_seeds_in_a_folder_with_a_grid(tiny_sd, tmp_path):
    out, shared = tmp_path / "out", ("--model", tiny_sd, "--device", "cpu", "--steps", "1")
    found = run("generate", "a heart", "a corpse on the beach", *shared, "--seeds", "3,7", "--grid", "--format", "webp", "-o", out)
    assert found.exit_code == 0
    assert {path.name for path in out.iterdir()} == {*(f"{n:04d}.webp" for n in range(4)), "grid.webp", "manifest.jsonl"}
    told = lines(out)
    assert [(line["file"], line["seed"]) for line in told] == [(f"{n:04d}.webp", (3, 7)[n % 2]) for n in range(4)]
    assert (told[0]["prompt"], told[0]["guard"]["action"]) == ("a heart", "allow")
    assert told[2]["guard"]["action"] == "rewrite"
    assert "corpse" not in told[2]["guard"]["result"]
    assert told[2]["guard"]["result"].endswith("on the beach")
    assert len(told[0]["model_sha256"]) == 64
    assert inside(out / "0002.webp") == {key: value for key, value in told[2].items() if key != "file"}
    assert len(inside(out / "grid.webp")["images"]) == 4
    with pytest.raises(UserError, match="exists"):
        run("generate", "a heart", "a tree", *shared, "-o", out)


@pytest.mark.parametrize("guard", ["default", "none"])
def test_off_a_terminal_a_line_says_how_far_it_is(tiny_sd, tmp_path, monkeypatch, guard):
    monkeypatch.setenv("VALIGN_PROGRESS", "1")
    monkeypatch.setattr("valign.progress.LINE_EVERY", 0)
    shared = ("--model", tiny_sd, "--device", "cpu", "--steps", "1", "--batch-size", "1", "--guard", guard)
    said = run("generate", "a heart", "a tree", *shared, "-o", tmp_path / "out").stderr
    assert "Generating: 1 of 2" in said
    assert "Generating: 2 of 2" in said


def test_nothing_of_a_prompt_that_a_block_rule_stopped_is_kept(tiny_sd, tmp_path):
    out, shared = tmp_path / "out.png", ("--model", tiny_sd, "--device", "cpu", "--steps", "1")
    assert run("generate", "a nude toddler", *shared, "-o", out).exit_code == 3
    (line,) = lines(tmp_path)
    assert (line["file"], line["prompt"], line["guard"]["action"]) == (None, None, "block")
    assert "toddler" not in json.dumps(line)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "3,x"], "--seeds must be whole numbers"),
        (["--seeds", "3,3"], "--seeds must be distinct"),
        (["--seeds", "3,4", "--count", "2"], "--seeds and --count were both given"),
        (["--grid"], "--grid needs several images"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_model_is_loaded(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        run("generate", "a heart", "--model", "shapes", *options, "-o", tmp_path / "a.png")
