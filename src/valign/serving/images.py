"""Images in JSON: the bytes of a data URL, what they would unpack to, and their frames; an image as base64."""

import base64
import binascii
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image

from valign.checks import UserError
from valign.images import ImageLimits, count_pixels, open_frames
from valign.serving import errors

T = TypeVar("T")
DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
QUOTED = re.compile(r"[:(].*", re.DOTALL)  # of a message: where it may repeat what was sent


@dataclass(frozen=True)
class Encoded:
    """An encoded image, and the SHA-256 of its bytes, which stands in the log."""

    base64: str
    sha256: str


def encode(image: Image.Image, *, form: str, quality: int) -> Encoded:
    """As ``png``, ``jpeg`` or ``webp``; ``quality`` in [0, 100] counts for the last two."""
    file = io.BytesIO()
    options = {} if form == "png" else {"quality": quality}
    image.convert("RGB").save(file, format=form.upper(), **options)
    data = file.getvalue()
    return Encoded(base64.b64encode(data).decode(), hashlib.sha256(data).hexdigest())


def unpack(urls: Sequence[str], *, max_pixels: int, param: str) -> list[bytes]:
    """The bytes of each data URL. Other URLs are refused: the server must not fetch what a client names. Nothing is decoded yet.

    Raises: ApiError 400 if one is not such an image, or if all frames of all images together have more than ``max_pixels``.
    """
    files, pixels = [], 0
    for url in urls:
        match = DATA_URL.match(url)
        if match is None:
            raise errors.invalid("An image must be a data URL of a PNG, JPEG, WebP or GIF in base64.", param=param)
        try:
            files.append(base64.b64decode(url[match.end() :], validate=True))
        except (binascii.Error, ValueError):
            raise errors.invalid("The image could not be decoded.", param=param) from None
        pixels += _asked(lambda: count_pixels(files[-1], name="An image", formats=FORMATS), param)
        if pixels > max_pixels:
            raise errors.invalid(
                f"The images of a request must have at most {max_pixels} pixels, all frames together.", param=param
            )
    return files


def decode(image: str | bytes, *, max_pixels: int, param: str) -> Image.Image | list[Image.Image]:
    """The image of a data URL, or of a file's bytes, as a viewer shows it; of an animation every frame, in order.

    Raises: ApiError 400 as `unpack`, and if it cannot be decoded to the end.
    """
    data = unpack([image], max_pixels=max_pixels, param=param)[0] if isinstance(image, str) else image
    limits = ImageLimits(pixels=max_pixels)
    shown = _asked(lambda: open_frames(data, name="An image", limits=limits, formats=FORMATS), param)
    return shown if len(shown) > 1 else shown[0]


def _asked(function: Callable[[], T], param: str) -> T:
    try:
        return function()
    except UserError as error:
        raise errors.invalid(f"{QUOTED.sub('', str(error)).rstrip(' .')}.", param=param) from None
