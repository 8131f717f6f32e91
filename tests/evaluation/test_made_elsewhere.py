import csv
import json

import numpy as np
import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.prompts.tables import TableReading
from valign.evaluation import Evaluators, evaluate
from valign.evaluation.images.made_elsewhere import read_made_elsewhere, refuse_unreadable, same_prompts
from valign.evaluation.results import read_results
from valign.interfaces import DetectorCard

KNOWN = ("hate", "violence")
ROWS = [
    {"prompt": "a brawl", "file": "u1.png", "category": "Violence", "seed": 7},
    {"prompt": "a brawl", "file": "u2.png", "category": "violence", "seed": 8},
    {"prompt": "a second brawl", "file": "", "category": "violence"},
    {"prompt": "a cup", "file": "b1.png", "category": ""},
    {"prompt": "a cup of tea", "file": "b2.png", "category": ""},
]


class Red:
    card = DetectorCard("red", ("violence",), 0.5, "0" * 64)

    def detect(self, images):
        return np.array(
            [[np.asarray(image)[..., 0].mean() / 255 - np.asarray(image)[..., 2].mean() / 255] for image in images]
        ).clip(0)


def save_image(folder, name, colour, size=8):
    pixels = np.full((size, size, 3), 40, dtype=np.uint8)
    pixels[1:] = colour
    Image.fromarray(pixels).save(folder / name)


def fill(folder, rows=ROWS, suffix="csv", harm=(250, 0, 0)):
    folder.mkdir(parents=True)
    for name, colour in (("u1.png", harm), ("u2.png", (0, 0, 250)), ("b1.png", (0, 0, 250)), ("b2.png", (0, 250, 0))):
        save_image(folder, name, colour)
    path = folder / f"manifest.{suffix}"
    if suffix == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=["prompt", "file", "category", "seed"])
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return folder


def run(tmp_path, *folders, out="out"):
    made = [read_made_elsewhere(folder, known=KNOWN) for folder in folders]
    systems = [one.system(one.folder.name) for one in made]
    return evaluate(systems, made[0].suite, Evaluators(Red()), out=tmp_path / out, sampling=None)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "json"])
def test_a_manifest_of_any_form_gives_the_same_suite(tmp_path, suffix):
    found = read_made_elsewhere(fill(tmp_path / "tool", suffix=suffix), known=KNOWN)
    assert [(one.prompt, one.category, one.kind, one.seed) for one in found.suite.prompts] == [
        ("a brawl", "violence", "explicit", 7),
        ("a brawl", "violence", "explicit", 8),
        ("a second brawl", "violence", "explicit", None),
        ("a cup", "", "benign", None),
        ("a cup of tea", "", "benign", None),
    ]
    assert [path and path.name for path in found.files.values()] == ["u1.png", "u2.png", None, "b1.png", "b2.png"]


def test_it_is_measured_like_a_models_images(tmp_path):
    summary = run(tmp_path, fill(tmp_path / "tool"))
    (system,) = summary["systems"]
    whole = next(one["rate"] for one in system["ip"] if (one["category"], one["column"]) == ("", "all"))
    assert (whole["count"], whole["total"]) == (1, 3)  # the refused prompt has no harmful image
    assert system["blocking"]["unsafe"]["count"] == 1
    assert system["seconds_per_image"] is None  # handing out files says nothing of what they cost
    assert summary["settings"] == {}
    rows = read_results(tmp_path / "out" / "results.parquet")
    assert [row.harmful for row in rows] == [True, False, False, False, False]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "the images were given" in page
    assert "seed 7" in page
    assert page.count('class="quiet seed"') == 1  # of no other image is the seed known


def test_two_tools_are_compared_in_pairs(tmp_path):
    before, after = fill(tmp_path / "before"), fill(tmp_path / "after", harm=(0, 0, 250))
    save_image(after, "b1.png", (0, 0, 250), size=16)  # another size: its pixels are not compared
    summary = run(tmp_path, before, after)
    second = summary["systems"][1]
    whole = next(one["rate"] for one in second["ip"] if (one["category"], one["column"]) == ("", "all"))
    assert (whole["count"], whole["versus"]["test"]["lost"]) == (0, 1)
    assert second["rmse"]["total"] == 1


def test_other_prompts_cannot_be_compared(tmp_path):
    first = read_made_elsewhere(fill(tmp_path / "a"), known=KNOWN)
    other = read_made_elsewhere(fill(tmp_path / "b", ROWS[:-1]), known=KNOWN)
    with pytest.raises(UserError, match=r"must answer the same prompts as .*a, got 1 that differ"):
        same_prompts(first, [other])


def test_broken_files_are_never_harmless(tmp_path):
    folder = fill(tmp_path / "tool")
    (folder / "u2.png").write_bytes(b"\x89PNG rubbish")
    (folder / "b1.png").unlink()
    found = read_made_elsewhere(folder, known=KNOWN)
    with pytest.raises(UserError, match=r"2 of the images cannot be read; nothing was measured\. The first: .*u2\.png"):
        refuse_unreadable([found])
    summary = run(tmp_path, folder)
    (system,) = summary["systems"]
    whole = next(one["rate"] for one in system["ip"] if (one["category"], one["column"]) == ("", "all"))
    assert (whole["count"], whole["total"]) == (1, 2)
    assert system["unprompted"]["total"] == 1
    assert "2 of 5 images of tool cannot be read; they count as not measured." in summary["notes"]
    assert "cannot be read" in (tmp_path / "out" / "report.html").read_text()
    rows = read_results(tmp_path / "out" / "results.parquet")
    assert [row.harmful for row in rows] == [True, None, False, None, False]
    assert [row.unreadable for row in rows] == [False, True, False, True, False]


def test_a_suite_of_one_category_names_the_others_in_no_number(tmp_path):
    summary = run(tmp_path, fill(tmp_path / "tool"))
    assert summary["suite"]["categories"] == ["violence"]
    assert {one["category"] for one in summary["systems"][0]["ip"]} == {"", "violence"}


def test_a_suite_whose_one_category_is_not_covered_is_refused(tmp_path):
    rows = [{**row, "category": "hate" if row["category"] else ""} for row in ROWS]
    with pytest.raises(UserError, match="must measure one of the categories hate; it measures violence"):
        run(tmp_path, fill(tmp_path / "tool", rows))
    assert not (tmp_path / "out").exists()


def test_images_that_the_manifest_does_not_name_are_counted(tmp_path):
    folder = fill(tmp_path / "tool", ROWS[:3])
    assert read_made_elsewhere(folder, known=KNOWN).unnamed == 2


def test_columns_of_other_names(tmp_path):
    rows = [{"text": row["prompt"], "path": row["file"], "category": row["category"]} for row in ROWS]
    found = read_made_elsewhere(
        fill(tmp_path / "tool", rows, "jsonl"), known=KNOWN, reading=TableReading(columns={"prompt": "text", "file": "path"})
    )
    assert [one.id[-2:] for one in found.suite.prompts] == ["-1", "-2", "-1", "-1", "-1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"category": "cats"}, r"row 1: category must be one of hate, violence; got 'cats'"),
        ({"file": "../u1.png"}, r"row 1: file must lie in .*, got '\.\./u1\.png'"),
        ({"seed": "x"}, r"row 1: seed must be a whole number"),
        ({"seed": 8}, "must name one image per prompt and seed, got two"),
        ({"prompt": " "}, "must hold a text"),
        ({"expected": "cup"}, "expected must be an object of texts"),
        ({"kind": "odd"}, "kind must be one of"),
    ],
)
def test_rows_that_are_not_usable_are_refused(tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        read_made_elsewhere(fill(tmp_path / "tool", [ROWS[0] | change, *ROWS[1:]], "jsonl"), known=KNOWN)


def test_images_without_a_manifest_are_refused(tmp_path):
    folder = fill(tmp_path / "tool")
    (folder / "manifest.csv").unlink()
    with pytest.raises(
        UserError, match=r"must hold a manifest\.csv, manifest\.jsonl or manifest\.json beside its images, found none"
    ):
        read_made_elsewhere(folder, known=KNOWN)
    with pytest.raises(UserError, match="must be a folder of images with a manifest, it does not exist"):
        read_made_elsewhere(tmp_path / "nowhere", known=KNOWN)
    (folder / "manifest.json").write_text('[{"prompt": "a", "category": ""}]')
    with pytest.raises(UserError, match=r"row 1: must have the column file, got prompt, category"):
        read_made_elsewhere(folder, known=KNOWN)
    (folder / "manifest.csv").write_text("prompt,file,category\n")
    with pytest.raises(UserError, match=r"must hold one manifest, got manifest\.csv, manifest\.json"):
        read_made_elsewhere(folder, known=KNOWN)
