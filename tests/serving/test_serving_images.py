"""Images of requests: a still is decoded as a viewer shows it, an animation is refused where one image is asked for."""

import base64
import io

import pytest
from PIL import Image

from valign.serving.errors import ApiError
from valign.serving.images import decode


def url(image, **options):
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def test_a_still_is_shown_on_white():
    assert decode(url(Image.new("RGBA", (4, 4))), max_pixels=100, param="input").getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_refused():
    moving = url(Image.new("RGB", (4, 4), "red"), save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    with pytest.raises(ApiError):
        decode(moving, max_pixels=100, param="input")
