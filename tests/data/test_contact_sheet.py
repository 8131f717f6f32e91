import pytest
from PIL import Image, ImageColor, ImageFont

from valign.data.images.contact_sheet import CALM, HARM, SheetLayout, wrap, write_contact_sheet
from valign.data.images.rows import ImageRow
from valign.data.prompts.pairs import PromptPair

PAIRS = [PromptPair(f"p{i}", f"a mean prompt number {i}", f"a kind prompt number {i}", ("hate",)) for i in range(5)]
PAIRS.append(PromptPair("none", "mean", "kind", ("sexual",)))


@pytest.fixture
def images(tmp_path):
    for pair in PAIRS[:-1]:
        Image.new("RGB", (8, 8), "#ff0000").save(tmp_path / f"{pair.id}_unsafe.png")
        Image.new("RGB", (8, 8), "#0000ff").save(tmp_path / f"{pair.id}_safe.png")
    return tmp_path


def draw(images, name, **layout):
    rows = [ImageRow(id=pair.id, seed=0, kept=pair.id != "none") for pair in PAIRS]
    write_contact_sheet(PAIRS, rows, images, images / name, layout=SheetLayout(image=64, columns=2, **layout))
    return Image.open(images / name).convert("RGB")


def pixels(sheet, colour):
    return sum(count for count, found in sheet.getcolors(sheet.width * sheet.height) if found == ImageColor.getrgb(colour))


def test_every_card_shows_both_images_over_their_colour(images):
    sheet = draw(images, "sheet.png", per_category=3)
    assert pixels(sheet, "#ff0000") == pixels(sheet, "#0000ff") == 3 * 64 * 64
    assert pixels(sheet, HARM) >= 3 * 64 * 4
    assert pixels(sheet, CALM) >= 3 * 64 * 4


def test_prompts_are_drawn_only_when_asked(images):
    hidden, shown = draw(images, "hidden.png"), draw(images, "shown.png", show_prompts=True)
    assert shown.height > hidden.height
    assert shown.width == hidden.width


def test_the_same_pairs_give_the_same_bytes(images):
    draw(images, "one.png")
    draw(images, "two.png")
    assert (images / "one.png").read_bytes() == (images / "two.png").read_bytes()


def test_long_prompts_wrap_within_the_image():
    font = ImageFont.load_default(11)
    lines = wrap("word " * 100 + "x" * 200, 64, font)
    assert len(lines) == 6
    assert lines[-1].endswith("…")
    assert all(font.getlength(line.rstrip("…")) <= 64 for line in lines)
    assert wrap("", 64, font) == [""]
