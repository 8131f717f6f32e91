"""Folders of images as trainers keep them: every form is read alike, and what is missing or broken is named before any work."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from valign.checks import UserError
from valign.data.prompts.tables import TableReading
from valign.data.tasks.captions import CaptionTask, read_captions
from valign.data.tasks.image_folders import bucket_of, buckets, list_images

TASK = CaptionTask(name="diffusion", kind="diffusion")


def image(number, size=(12, 8)):
    return Image.new("RGB", size, (number * 20, 10, 30))


def encoded(number):
    file = io.BytesIO()
    image(number).save(file, "PNG")
    return file.getvalue()


def save(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        image(number).save(folder / name)
    return folder


def listed(place, **options):
    return [(one.caption, one.repeats, one.extent) for one in list_images(place, "file_name", "text", **options)]


def test_caption_files_and_repeats_in_the_names_of_folders(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "a.txt").write_text("a lamp\nsecond line\n")
    save(tmp_path / "3_red_boat", "b.png", "c.jpg")
    (tmp_path / "3_red_boat" / "c.caption").write_text("a boat")
    save(tmp_path / "0_never", "d.png")
    assert listed(tmp_path) == [("a lamp", 1, (12, 8)), ("red boat", 3, (12, 8)), ("a boat", 3, (12, 8))]
    data = read_captions(TASK, tmp_path)
    assert len({*data.train, *data.held_out}) == 3
    assert len(data.held_out) == len(set(data.held_out))  # repeats are for training alone
    assert len(data.train) in (3, 4, 6)


@pytest.mark.parametrize("column", ["text", "caption"])
def test_tables_beside_images(tmp_path, column):
    save(tmp_path, "a.png", "b.png")
    lines = [json.dumps({"file_name": name, column: f"the {name}"}) for name in ("a.png", "b.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    as_lines = listed(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text(f"file_name,{column}\na.png,the a.png\nb.png,the b.png\n")
    assert listed(tmp_path) == as_lines == [("the a.png", 1, (12, 8)), ("the b.png", 1, (12, 8))]


def test_tables_that_hold_the_images(tmp_path):
    rows = [{"image": {"bytes": encoded(number), "path": None}, "text": f"lamp {number}"} for number in range(4)]
    for shard in (0, 1):
        pq.write_table(pa.Table.from_pylist(rows[2 * shard : 2 * shard + 2]), tmp_path / f"train-{shard}.parquet")
    assert [caption for caption, _, _ in listed(tmp_path)] == [f"lamp {number}" for number in range(4)]
    data = read_captions(TASK, tmp_path)
    assert data.train[0].pixels(4).shape == (3, 4, 4)


def test_own_columns_are_named(tmp_path):
    save(tmp_path, "a.png")
    (tmp_path / "metadata.csv").write_text("where,words\na.png,a lamp\n")
    with pytest.raises(UserError, match=r"row 1 must have the column text, got where, words\. Name yours: --column text=NAME"):
        listed(tmp_path)
    assert listed(tmp_path, reading=TableReading(columns={"file_name": "where", "text": "words"})) == [("a lamp", 1, (12, 8))]


def test_unreadable_images_are_named_and_may_be_skipped(tmp_path, capsys):
    save(tmp_path, "a.png", "b.png", "c.png")
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name)
    (tmp_path / "b.png").write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"b\.png must name an image: .* 1 of 3 images cannot be read; --skip-unreadable"):
        listed(tmp_path)
    assert [caption for caption, _, _ in listed(tmp_path, skip_unreadable=True)] == ["a", "c"]
    said = capsys.readouterr().err
    assert "left out:" in said
    assert "2 images are few" in said  # a warning, not a refusal


def test_eight_images_are_enough(tmp_path, capsys):
    save(tmp_path / "1_lamp", *(f"{number}.png" for number in range(8)))
    data = read_captions(TASK, tmp_path)
    assert len(data.train) + len(data.held_out) == 8
    assert data.held_out
    assert "8 images are few" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"x.txt": "a"}, r"x\.txt must be the caption of an image of its name, got no image for 1"),
        ({"a.txt": ""}, r"a\.txt must hold a caption, got an empty file"),
        ({}, r"must hold a caption for every image, got 1 of 1 without one, first .*a\.png"),
    ],
)
def test_captions_without_images_and_images_without_captions_are_refused(tmp_path, files, message):
    save(tmp_path, "a.png")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        listed(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="must hold images with captions, or metadata"):
        listed(tmp_path)


def test_buckets_keep_the_shape_within_the_pixels_of_the_square():
    every = buckets(512, 64)
    assert (512, 512) in every
    assert all(width * height <= 512 * 512 and width % 64 == height % 64 == 0 for width, height in every)
    assert bucket_of(512, 512, side=512, step=64) == (512, 512)
    assert bucket_of(1600, 900, side=512, step=64) == (640, 384)
    assert bucket_of(900, 1600, side=512, step=64) == (384, 640)
