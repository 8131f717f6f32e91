"""Conditions under which one content looks otherwise: compression, blur, darkness, style, upscaling, noise; and pairs of images.

Each keeps the size and what an image shows. The strength is drawn for every image, from mild to strong.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from valign.checks import UserError, check_choice
from valign.images import image_files, open_image

Condition = Callable[[Image.Image, np.random.Generator], Image.Image]
CLEAN, ADVERSE = "clean", "adverse"  # sub-folders of a folder of pairs


def jpeg(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Saved as JPEG at a quality of 4 to 12."""
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=int(rng.integers(4, 13)))
    return Image.open(stream, formats=["JPEG"]).convert("RGB")


def blur(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian blur with a radius of 2.5 to 4.5 % of the shorter side."""
    return image.filter(ImageFilter.GaussianBlur(min(image.size) * rng.uniform(0.025, 0.045)))


def night(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A sixth to a third of the light, bluish, with the noise of a sensor."""
    light = rng.uniform(0.16, 0.33) * np.array([0.75, 0.85, 1.15])
    pixels = np.asarray(image, dtype=np.float64) * light
    return _image(pixels + rng.normal(0, rng.uniform(3, 8), pixels.shape))


def style(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Another palette: mean and spread of each colour channel drawn anew, channels mixed, four to six tones."""
    pixels = np.asarray(image, dtype=np.float64)[..., rng.permutation(3)]
    plain = (pixels - pixels.mean((0, 1))) / np.maximum(pixels.std((0, 1)), 1.0)
    recoloured = rng.uniform(80, 180, 3) + plain * rng.uniform(30, 60, 3) * rng.choice([-1.0, 1.0])
    step = 256 / int(rng.integers(4, 7))
    return _image((recoloured.clip(0, 255) // step + 0.5) * step)


def upscaling(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Made smaller by a factor of 2.5 to 4, and larger again by an interpolation that rings."""
    factor = rng.uniform(2.5, 4.0)
    small = [max(2, round(side / factor)) for side in image.size]
    return image.resize((small[0], small[1]), Image.Resampling.BILINEAR).resize(image.size, Image.Resampling.LANCZOS)


def noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Gaussian noise with a standard deviation of 30 to 60 of 255."""
    pixels = np.asarray(image, dtype=np.float64)
    return _image(pixels + rng.normal(0, rng.uniform(30, 60), pixels.shape))


CONDITIONS: Mapping[str, Condition] = {
    "jpeg": jpeg,
    "blur": blur,
    "night": night,
    "style": style,
    "upscaling": upscaling,
    "noise": noise,
}


def under(name: str, image: Image.Image, *key: int) -> Image.Image:
    """The image under a condition, with the draw of these numbers. Raises: ValueError for a name that is not in `CONDITIONS`."""
    check_choice("condition", name, CONDITIONS)
    return CONDITIONS[name](image, np.random.default_rng([*name.encode(), *key]))


@dataclass(frozen=True)
class ImagePair:
    """One content under a good condition, and under a bad one if it was photographed; else a condition of `CONDITIONS` is made."""

    name: str
    clean: Path | Image.Image
    adverse: Path | Image.Image | None = None

    def images(self, condition: str, *key: int) -> tuple[Image.Image, Image.Image]:
        """Both, as RGB and of one size. Raises: UserError if their sizes differ."""
        clean = _opened(self.clean)
        adverse = under(condition, clean, *key) if self.adverse is None else _opened(self.adverse)
        if clean.size != adverse.size:
            raise UserError(f"{self.name} must have two images of one size, got {clean.size} and {adverse.size}. Crop both alike.")
        return clean, adverse


def read_pairs(folder: Path) -> list[ImagePair]:
    """Images of equal names in ``folder/clean`` and ``folder/adverse``. Raises: UserError for one without a partner."""
    places = [folder / name for name in (CLEAN, ADVERSE)]
    if missing := [place for place in places if not place.is_dir()]:
        raise UserError(f"{missing[0]} must be a folder: pairs stand in {CLEAN}/ and {ADVERSE}/ under equal names.")
    found = [{file.stem: file for file in image_files(place)} for place in places]
    if alone := sorted(set(found[0]) ^ set(found[1])):
        raise UserError(
            f"{folder} must hold each image in {CLEAN}/ and in {ADVERSE}/, got {alone[0]} in one of them. For images without "
            "partners use plain self-training, or let conditions be made of clean images alone (--images)."
        )
    if not found[0]:
        raise UserError(f"{folder} must hold pairs of images, got none. Put them into {CLEAN}/ and {ADVERSE}/.")
    return [ImagePair(name, found[0][name], found[1][name]) for name in sorted(found[0])]


def pairs_of(images: Sequence[tuple[str, Path | Image.Image]]) -> list[ImagePair]:
    """Clean images by name, whose bad conditions are made."""
    return [ImagePair(name, source) for name, source in images]


def _opened(source: Path | Image.Image) -> Image.Image:
    return open_image(source) if isinstance(source, Path) else source


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))
