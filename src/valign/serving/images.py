"""Images in JSON: decode a data URL, encode an image as base64."""

import base64
import binascii
import hashlib
import io
import re
from dataclasses import dataclass

from PIL import Image

from valign.serving import errors

DATA_URL = re.compile(r"data:image/(?:png|jpe?g|webp|gif);base64,", re.IGNORECASE)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


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


def decode(url: str, *, max_pixels: int, param: str) -> Image.Image:
    """The image of a data URL. Other URLs are refused: the server must not fetch what a client names.

    Raises: ApiError 400 if it is not such an image, or has more than ``max_pixels``.
    """
    match = DATA_URL.match(url)
    if match is None:
        raise errors.invalid("An image must be a data URL of a PNG, JPEG, WebP or GIF in base64.", param=param)
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise errors.invalid(f"An image must have at most {max_pixels} pixels.", param=param)
        return image.convert("RGB")
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise errors.invalid("The image could not be decoded.", param=param) from None
