"""One image of many image pairs, unsafe beside safe, by category: the quickest look at what a data set teaches."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from valign.data.images.rows import ImageRow
from valign.data.prompts.pairs import PromptPair
from valign.files import atomic_path
from valign.images import open_image

PAPER, CARD, INK, SOFT, HARM, CALM = "#f4f4f1", "#ffffff", "#1d1f23", "#7a7d85", "#c2412d", "#2f7d4f"
MARGIN, GAP, PAD = 28, 18, 10  # pixels


@dataclass(frozen=True, kw_only=True)
class SheetLayout:
    """Sizes of a sheet."""

    image: int = 128  # side of one image, pixels
    columns: int = 4  # cards in a row
    per_category: int = 4  # cards of one category
    show_prompts: bool = False  # off: prompts of real unsafe sets hold slurs and explicit text


def write_contact_sheet(
    pairs: Sequence[PromptPair],
    rows: Sequence[ImageRow],
    images: Path,
    path: Path,
    *,
    titles: dict[str, str] | None = None,
    layout: SheetLayout | None = None,
) -> None:
    """Draw kept pairs of every category, spread evenly, into the PNG ``path``. ``titles``: category id -> heading, in order."""
    layout, titles = layout or SheetLayout(), titles or {}
    kept = [pair for pair, row in zip(pairs, rows, strict=True) if row.kept]
    found = {name for pair in pairs for name in pair.categories}
    groups = {
        name: [pair for pair in kept if name in pair.categories]
        for name in [*titles, *sorted(found - set(titles))]
        if name in found
    }
    fonts = {size: ImageFont.load_default(size) for size in (11, 12, 17, 24)}
    width = 2 * MARGIN + layout.columns * _card_width(layout) + (layout.columns - 1) * GAP
    parts = [_heading(width, fonts, len(kept), len(pairs))]
    for name, group in groups.items():
        count = min(layout.per_category, len(group))
        cards = [_card(group[i * len(group) // count], images, layout, fonts) for i in range(count)]
        parts.append(_section(width, fonts, titles.get(name, name), len(group), cards, layout))
    sheet = Image.new("RGB", (width, sum(part.height for part in parts) + MARGIN // 2), PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)


def _card_width(layout: SheetLayout) -> int:
    return 2 * layout.image + 3 * PAD


def _heading(width: int, fonts: dict, kept: int, total: int) -> Image.Image:
    part = Image.new("RGB", (width, 86), PAPER)
    draw = ImageDraw.Draw(part)
    draw.text((MARGIN, 24), "Image pairs", INK, font=fonts[24])
    draw.text((MARGIN, 56), f"{kept} kept of {total}", SOFT, font=fonts[12])
    _legend(draw, width - MARGIN, 60, fonts)
    return part


def _legend(draw: ImageDraw.ImageDraw, right: int, top: int, fonts: dict) -> None:
    for text, colour in (("safe twin, preferred", CALM), ("unsafe prompt", HARM)):
        left = right - draw.textlength(text, font=fonts[12])
        draw.text((left, top - 4), text, INK, font=fonts[12])
        draw.rounded_rectangle((left - 18, top - 2, left - 8, top + 8), 2, fill=colour)
        right = int(left) - 36


def _section(width: int, fonts: dict, title: str, count: int, cards: Sequence[Image.Image], layout: SheetLayout) -> Image.Image:
    lines = [cards[i : i + layout.columns] for i in range(0, len(cards), layout.columns)]
    heights = [max(card.height for card in line) + GAP for line in lines]
    part = Image.new("RGB", (width, 40 + sum(heights) + (0 if cards else 26)), PAPER)
    draw = ImageDraw.Draw(part)
    draw.text((MARGIN, 8), title, INK, font=fonts[17])
    beside = MARGIN + draw.textlength(title, font=fonts[17]) + 10
    draw.text((beside, 13), f"{count} pair{'' if count == 1 else 's'}", SOFT, font=fonts[12])
    if not cards:
        draw.text((MARGIN, 36), "no pair was kept", SOFT, font=fonts[12])
    top = 40
    for line, height in zip(lines, heights, strict=True):
        for column, card in enumerate(line):
            part.paste(card, (MARGIN + column * (_card_width(layout) + GAP), top))
        top += height
    return part


def _card(pair: PromptPair, images: Path, layout: SheetLayout, fonts: dict) -> Image.Image:
    side, texts = layout.image, ((pair.unsafe, HARM), (pair.safe, CALM))
    wrapped = [wrap(text, side, fonts[11]) if layout.show_prompts else [] for text, _ in texts]
    card = Image.new("RGB", (_card_width(layout), side + 2 * PAD + 6 + 14 * max(map(len, wrapped))), PAPER)
    draw = ImageDraw.Draw(card)
    draw.rounded_rectangle((0, 0, card.width - 1, card.height - 1), 6, fill=CARD, outline="#e2e2dc")
    for column, (word, (_, colour), lines) in enumerate(zip(("unsafe", "safe"), texts, wrapped, strict=True)):
        left = PAD + column * (side + PAD)
        image = open_image(images / f"{pair.id}_{word}.png")
        card.paste(image.resize((side, side), Image.Resampling.LANCZOS), (left, PAD))
        draw.rectangle((left, PAD + side, left + side - 1, PAD + side + 3), fill=colour)
        for row, line in enumerate(lines):
            draw.text((left, PAD + side + 8 + 14 * row), line, INK, font=fonts[11])
    return card


def wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Words in lines of at most ``width`` pixels; a longer word is cut, the sixth line ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        while font.getlength(word) > width:
            word = word[:-1]
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") > width:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= 6 else [*lines[:5], lines[5][:-1] + "…"]
