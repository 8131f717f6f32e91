"""Images that a command hands out: in the format that the name says, with what they were made from in the file and a manifest."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from mimetypes import guess_type
from pathlib import Path
from typing import TYPE_CHECKING, Any

from valign.checks import UserError, check_choice
from valign.files import atomic_folder, atomic_path

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}  # by a file's suffix
MANIFEST, GRID = "manifest.jsonl", "grid"
KEY = "valign"  # of a PNG's text; the others have it as their description
DESCRIPTION = 0x010E  # EXIF's ImageDescription
QUALITY = 95


def check_target(target: Path) -> Path:
    """Refuse what exists, and images of other formats: a callback of typer, before the command imports a library."""
    if target.exists():
        raise UserError(f"{target} exists. Choose another --out, or delete it first.")
    if target.suffix.lower() not in FORMATS and (guess_type(target.name)[0] or "").startswith("image/"):
        raise _other_suffix(target)
    return target


def format_of(target: Path, *, several: bool, wanted: str = "") -> str:
    """The suffix of the files to write: of the target, or ``wanted`` for a folder, PNG if nothing was said.

    Raises: UserError for another suffix, for a folder where there is a file's name, and if the target exists.
    """
    check_target(target)
    suffix = target.suffix.lower()
    if several:
        if suffix in FORMATS:
            raise UserError(f"--out must be a new folder for several images, got {target}. Leave the ending {suffix} out.")
        check_choice("--format", wanted or "png", tuple(name.removeprefix(".") for name in FORMATS))
        return f".{wanted or 'png'}"
    if suffix not in FORMATS:
        raise _other_suffix(target)
    if wanted and FORMATS[suffix] != FORMATS.get(f".{wanted}"):
        raise UserError(f"--format {wanted} does not fit --out {target}. Leave one of them out.")
    return suffix


def _other_suffix(target: Path) -> UserError:
    return UserError(f"--out must end in {', '.join(FORMATS)}, got {target}. For example --out image.png.")


def write_image(image: Image, path: Path, about: Mapping[str, Any]) -> None:
    """Write one image atomically, ``about`` as JSON in its metadata."""
    from PIL.Image import Exif
    from PIL.PngImagePlugin import PngInfo

    kind, text = FORMATS[path.suffix.lower()], json.dumps(about, ensure_ascii=True)
    options: dict[str, Any] = {}
    if kind == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text(KEY, text)
    else:
        options["exif"], options["quality"] = Exif(), QUALITY
        options["exif"][DESCRIPTION] = text
    with atomic_path(path) as temporary:
        image.convert("RGB").save(temporary, format=kind, **options)


def write_all(
    images: Sequence[Image | None],
    records: Sequence[Mapping[str, Any]],
    target: Path,
    suffix: str,
    *,
    several: bool,
    columns: int = 0,
) -> None:
    """Write images as ``target``, or numbered into the new folder ``target``; None was blocked, and has a manifest's line alone.

    Args:
        records: What the manifest says of each image, beside its file.
        columns: Of a further image with all of them in a grid; 0 for none.
    """
    if not several:
        if images[0] is not None:
            write_image(images[0], target, records[0])
        _extend(target.parent / MANIFEST, [{"file": target.name if images[0] is not None else None, **records[0]}])
        return
    with atomic_folder(target) as folder:
        lines = []
        for number, (image, about) in enumerate(zip(images, records, strict=True)):
            name = f"{number:04d}{suffix}"
            if image is not None:
                write_image(image, folder / name, about)
            lines.append({"file": name if image is not None else None, **about})
        if columns:
            write_image(grid(images, columns), folder / f"{GRID}{suffix}", {"columns": columns, "images": list(records)})
        _extend(folder / MANIFEST, lines)


def grid(images: Sequence[Image | None], columns: int) -> Image:
    """All images in rows of ``columns``; what was blocked is an empty place. Raises: UserError if all were blocked."""
    from PIL import Image as Pillow

    shown = [image for image in images if image is not None]
    if not shown:
        raise UserError("A grid must have an image, got none. Leave the grid out.")
    width, height = shown[0].size
    sheet = Pillow.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for number, image in enumerate(images):
        if image is not None:
            sheet.paste(image, (number % columns * width, number // columns * height))
    return sheet


def _extend(manifest: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Further lines of a manifest; those that it has stay."""
    manifest.parent.mkdir(parents=True, exist_ok=True)
    with manifest.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
