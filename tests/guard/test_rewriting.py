import pytest

from valign.guard.rewriting.acceptance import Acceptor, jaccard
from valign.guard.rewriting.caption import parse_caption, subject_of, with_subject


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        (
            "oil painting of a fox in a forest, golden light, 35 mm",
            ("oil painting of", "a fox", "in a forest", ("golden light", "35 mm")),
        ),
        ("Generate an image of two men at the harbour", ("an image of", "two men", "at the harbour", ())),
        ("a lighthouse", ("", "a lighthouse", "", ())),
        ("in the rain", ("", "in the rain", "", ())),
        ("", ("", "", "", ())),
    ],
)
def test_a_caption_falls_into_parts(prompt, parts):
    caption = parse_caption(prompt)
    assert (caption.medium, caption.scene, caption.place, caption.details) == parts


def test_parts_make_the_caption_again():
    prompt = "oil painting of a fox in a forest, golden light"
    assert parse_caption(prompt).text() == prompt


@pytest.mark.parametrize(
    ("scene", "subject"),
    [("a tall angry woman shouting", "a woman"), ("three soldiers running", "three soldiers"), ("a red vase", "")],
)
def test_subject(scene, subject):
    assert subject_of(scene) == subject


def test_the_subject_plays_the_safe_scene():
    assert with_subject("a person in a coat", "two women") == "two women in a coat"
    assert with_subject("a field of poppies", "two women") == "a field of poppies"


def test_jaccard_by_hand():  # {a, red, fox} and {a, red, hen}: 2 of 4
    assert jaccard("a red fox", "A red hen!") == 0.5
    assert jaccard("", "") == 1.0
    assert jaccard("fox", "hen") == 0.0


class Fixed:
    """Two unit vectors with the given cosine."""

    name = "fixed"

    def __init__(self, cosine):
        self.cosine = cosine

    def encode(self, texts):
        import numpy as np

        return np.array([[1.0, 0.0], [self.cosine, (1 - self.cosine**2) ** 0.5]], np.float32)


LITTLE = "keeps too little of the meaning"


@pytest.mark.parametrize(("cosine", "reason"), [(0.71, ""), (0.69, LITTLE), (float("nan"), LITTLE)])
def test_meaning_has_a_limit(cosine, reason):
    assert Acceptor(encoder=Fixed(cosine))("a red fox", "a red hen").reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("a red\nfox", "more than one line"),
        ("A  red fox.", "unchanged"),
        ("I'm sorry, but no.", "a refusal"),
        ("a red " + "hen " * 200, "too long"),
        ("You rewrite captions for an image model, a red fox", "repeats the instruction"),
        ("a blue whale", "keeps too few words"),
        ("a red hen", ""),
    ],
)
def test_acceptance_says_why(text, reason):
    assert Acceptor(instructions=("You rewrite captions for an image model. Take care.",))("a red fox", text).reason == reason


def test_refuses_an_impossible_limit():
    with pytest.raises(ValueError, match=r"Acceptor\.keep_words must be in \[0, 1\], got 2"):
        Acceptor(keep_words=2)
