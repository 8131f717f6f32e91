"""Draw, look, and draw again in a safer style: a flagged image is never returned (VALOR, arXiv 2511.11693, with a re-check)."""

from collections.abc import Callable, Sequence

from PIL.Image import Image

from valign.guard.images.image_check import check_image
from valign.guard.records import GenerationAttempt
from valign.interfaces import Detector

Draw = Callable[[str, int], Image]


def captions(prompt: str, styles: Sequence[str], *, tries: int) -> list[tuple[str, str]]:
    """``(style, caption)`` of every try: the bare prompt first, then one style after the other; at most ``1 + tries``."""
    return [("", prompt), *((style, f"{prompt}, {style}") for style in styles[:tries])]


def generate_checked(
    draw: Draw,
    prompt: str,
    *,
    seed: int,
    styles: Sequence[str],
    tries: int,
    detector: Detector | None,
    passes: Callable[[str], bool],
    principle: Callable[[str, int], str] = lambda caption, seed: "",
) -> tuple[Image | None, tuple[GenerationAttempt, ...]]:
    """The first image that passes, or None; and what every try gave. Try i has seed ``seed + i``.

    Args:
        draw: Caption and seed -> image.
        tries: Further drawings after the first, >= 0.
        detector: None returns the first image unchecked.
        passes: Whether a styled caption passes the guard; a style that does not is left out.
        principle: Caption and seed -> the principle whose token ``draw`` gives it, for the record.
    """
    drawings: list[GenerationAttempt] = []
    for number, (style, caption) in enumerate(captions(prompt, styles, tries=tries)):
        if style and not passes(caption):
            continue
        image = draw(caption, seed + number)
        verdict = None if detector is None else check_image(detector, image)
        named = principle(caption, seed + number)
        drawings.append(GenerationAttempt(style=style, seed=seed + number, verdict=verdict, principle=named))
        if verdict is None or not verdict.fired:
            return image, tuple(drawings)
    return None, tuple(drawings)
