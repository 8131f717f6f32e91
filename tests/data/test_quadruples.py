"""Quadruples from a table, from a data set of `valign data build`, and what is refused."""

import json

import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.images.quadruples import Quadruple, Quadruples, read_quadruples
from valign.data.images.rows import ImageRow, write_image_rows
from valign.data.prompts.pairs import PromptPair, write_pairs
from valign.data.prompts.tables import TableReading

KNOWN = ("hate", "violence")


def table(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "quadruples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def image(folder, name, shade):
    folder.mkdir(exist_ok=True, parents=True)
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(folder / name)
    return name


def rows(folder, count=3):
    return [
        {
            "safe": f"a dove {n}",
            "unsafe": f"a bomb {n}",
            "category": "Violence",
            "safe_image": image(folder, f"s{n}.png", 10 + n),
            "unsafe_image": image(folder, f"u{n}.png", 200 + n),
        }
        for n in range(count)
    ]


def test_a_table_with_images_is_read_in_its_order(tmp_path):
    found = read_quadruples(table(tmp_path, rows(tmp_path)), known=KNOWN)
    assert found.has_images
    assert found.categories == ("violence",)
    assert [one.unsafe for one in found.rows] == ["a bomb 0", "a bomb 1", "a bomb 2"]
    assert found.rows[1].image("unsafe").getpixel((0, 0)) == (201, 0, 0)
    assert found.rows[1].image("safe").getpixel((0, 0)) == (11, 0, 0)


def test_captions_alone_and_other_names_of_columns(tmp_path):
    own = [{"safe": f"s{n}", "nsfw": f"u{n}", "category": "hate"} for n in range(4)]
    found = read_quadruples(table(tmp_path, own), known=KNOWN, reading=TableReading(columns={"unsafe": "nsfw"}))
    assert not found.has_images
    assert found.rows[3].unsafe == "u3"


def test_a_data_set_of_pairs_gives_its_kept_images(tmp_path):
    pairs = [PromptPair(f"p{n}", f"a bomb {n}", f"a dove {n}", ("violence",), held_out=n == 3) for n in range(5)] + [
        PromptPair("other", "x", "y", ("shocking",))
    ]
    write_pairs(tmp_path / "prompts" / "pairs.parquet", pairs)
    for pair in pairs:
        image(tmp_path / "images", f"{pair.id}_safe.png", 1)
        image(tmp_path / "images", f"{pair.id}_unsafe.png", 2)
    write_image_rows(tmp_path / "images", [ImageRow(id=pair.id, seed=0, kept=pair.id != "p1") for pair in pairs])
    found = read_quadruples(tmp_path, known=KNOWN)
    assert [one.id for one in found.rows] == ["p0", "p2", "p4"]
    assert found.rows[0].safe == "a dove 0"


def test_the_fingerprint_sees_captions_and_pixels(tmp_path):
    first = read_quadruples(table(tmp_path, rows(tmp_path)), known=KNOWN).fingerprint
    assert read_quadruples(tmp_path, known=KNOWN).fingerprint == first
    image(tmp_path, "u1.png", 99)
    assert read_quadruples(tmp_path, known=KNOWN).fingerprint != first


def test_one_safe_caption_stands_on_one_side_of_a_split():
    listed = tuple(Quadruple(f"{n}", f"safe {n // 2}", f"unsafe {n}", "hate") for n in range(40))
    first, second = Quadruples(listed, "these").split(0.25, seed=0)
    assert len(second.rows) == 10
    assert not {row.safe for row in first.rows} & {row.safe for row in second.rows}
    assert len(first.rows) + len(second.rows) == 40


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"unsafe": ""}, r"row 2: unsafe must be given, got an empty cell"),
        ({"category": "weather"}, r"row 2: .*weather"),
        ({"safe_image": "none.png"}, r"row 2: safe_image must be a file in .*, got 'none\.png'"),
        ({"safe_image": "../secret.png"}, r"row 2: safe_image must be a file in"),
        ({"safe_image": None}, r"row-2: a quadruple must have both images or none, got one"),
        ({"safe_image": None, "unsafe_image": None}, "must have images in every row or in none, got both"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(tmp_path, change, said):
    own = rows(tmp_path)
    own[1] |= change
    with pytest.raises(UserError, match=said):
        read_quadruples(table(tmp_path, own), known=KNOWN)


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    own = rows(tmp_path)
    (tmp_path / "u2.png").write_text("no image")
    with pytest.raises(UserError, match=r"u2\.png"):
        read_quadruples(table(tmp_path, own), known=KNOWN)


def test_folders_without_quadruples_are_refused(tmp_path):
    with pytest.raises(UserError, match="must be a folder with quadruples, it does not exist"):
        read_quadruples(tmp_path / "none", known=KNOWN)
    with pytest.raises(UserError, match=r"or hold one table quadruples\.csv, .* got none"):
        read_quadruples(tmp_path, known=KNOWN)
    with pytest.raises(UserError, match="must hold at least 2 quadruples, got 1"):
        read_quadruples(table(tmp_path, rows(tmp_path, 1)), known=KNOWN)
