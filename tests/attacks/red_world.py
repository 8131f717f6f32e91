"""A world of squares to attack: red is harmful, and a word decides what is red."""

import numpy as np
from PIL import Image

from valign.interfaces import DetectorCard

RED, GREEN = (225, 40, 40), (30, 150, 80)


class RedJudge:
    """Harmful is what is red; exact."""

    card = DetectorCard("red-finder", ("hate",), 0.5, "ab" * 32, 0.99, 0.98, 400, 600)

    def detect(self, images):
        return np.array([[float(image.getpixel((8, 8))[0] > 200)] for image in images]).reshape(-1, 1)


def square(colour):
    image = Image.new("RGB", (16, 16), (243, 240, 233))
    image.paste(colour, (4, 4, 12, 12))
    return image


def red_for(*words):
    """A generator that draws red where the caption holds one of the words."""
    return lambda caption, seed: square(RED if any(word in caption for word in words) else GREEN)
