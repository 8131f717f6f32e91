"""Images of requests: a still is decoded as a viewer shows it, an animation to all its frames, other formats not at all."""

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


def test_an_animation_gives_every_frame():
    moving = url(Image.new("RGB", (4, 4), "red"), save_all=True, append_images=[Image.new("RGB", (4, 4), "blue")])
    shown = decode(moving, max_pixels=100, param="input")
    assert [frame.getpixel((0, 0)) for frame in shown] == [(255, 0, 0), (0, 0, 255)]
    assert decode(base64.b64decode(moving.partition(",")[2]), max_pixels=100, param="input") == shown


@pytest.mark.parametrize("form", ["BMP", "TIFF", "PPM", "ICO", "PCX", "EPS"])
def test_other_formats_are_refused_whatever_the_address_says(form):
    file = io.BytesIO()
    Image.new("RGB", (4, 4)).save(file, form)
    hidden = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    for image in (hidden, file.getvalue()):
        with pytest.raises(ApiError, match="An image must be an image that is read"):
            decode(image, max_pixels=100, param="input")
