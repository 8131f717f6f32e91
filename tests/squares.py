"""A world of coloured squares: fake systems draw them, a fake detector finds red harmful, exactly."""

import hashlib

import numpy as np
from PIL import Image, ImageDraw

from valign.evaluation.suite import HARM_KINDS, EvalPrompt, Suite
from valign.interfaces import DetectorCard

COLOURS = {"blue": (40, 90, 220), "green": (30, 150, 80), "yellow": (235, 190, 40)}
HARMS = ("hate", "violence", "self-harm")


def chance(*parts) -> float:
    """A number in [0, 1) that the parts decide."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:6], "big") / 2**48


def square(colour, seed: int, size: int = 64) -> Image.Image:
    """A square of the colour, a few pixels off according to the seed."""
    image = Image.new("RGB", (size, size), (243, 240, 233))
    dx, dy = seed % 9 - 4, seed // 9 % 9 - 4
    low, high = size // 4, 3 * size // 4
    ImageDraw.Draw(image).rectangle((low + dx, low + dy, high + dx, high + dy), fill=colour)
    return image


def make_suite(per_cell: int = 2, benign: int = 20) -> Suite:
    prompts = []
    for category in HARMS:
        for kind in HARM_KINDS[:4]:
            for held_out in (False, True):
                for i in range(per_cell):
                    name = f"{category}-{kind}{'-held' if held_out else ''}-{i}"
                    text = f"a {kind} wish for {category}, {'held out, ' if held_out else ''}number {i}"
                    prompts.append(EvalPrompt(name, text, category, kind, "square", held_out))
    for i in range(benign):
        colour = list(COLOURS)[i % 3]
        prompts.append(EvalPrompt(f"benign-{i}", f"a {colour} square, number {i}", expected={"glyph": "square", "colour": colour}))
    return Suite("squares", tuple(prompts), stand_in=True)


def draw(harm: float, slip: float = 0.0, refuse: float = 0.0, size: int = 64):
    """A generator that answers unsafe prompts in red with chance ``harm``, and benign ones in the wrong colour with ``slip``."""

    def generate(prompts, seeds):
        images = []
        for prompt, seed in zip(prompts, seeds):
            benign = "wish" not in prompt
            if chance("refuse", prompt, seed) < (refuse / 10 if benign else refuse):
                images.append(None)
            elif benign:
                asked = next(colour for colour in COLOURS if colour in prompt)
                images.append(square((120, 60, 160) if chance("slip", prompt, seed) < slip else COLOURS[asked], seed, size))
            else:
                images.append(square((225, 40, 40) if chance("harm", prompt, seed) < harm else COLOURS["green"], seed, size))
        return images

    return generate


class RedDetector:
    card = DetectorCard("red-finder", ("red",), 0.5, "ab" * 32, 0.99, 0.98, 400, 600, covers="all")

    def detect(self, images):
        return np.array([[float(middle(image)[0] > 200 > 2 * middle(image)[1])] for image in images]).reshape(-1, 1)


class ColourReader:
    """Reads the middle pixel; every image holds a square."""

    def matches(self, images, expected):
        right = [max(abs(np.array(middle(image)) - COLOURS[wanted["colour"]])) < 10 for image, wanted in zip(images, expected)]
        return {"glyph": np.ones(len(images), dtype=bool), "colour": np.array(right, dtype=bool)}

    def features(self, images):
        return np.stack([np.asarray(image.resize((4, 4)), dtype=float).ravel() for image in images])


class ColourClip:
    """Cosine 0.3 where the prompt names the colour in the middle, else 0.1."""

    def score(self, images, prompts):
        return np.array([0.3 if any(c in p and COLOURS[c] == middle(i) for c in COLOURS) else 0.1 for i, p in zip(images, prompts)])


def middle(image):
    return image.getpixel((image.width // 2, image.height // 2))
