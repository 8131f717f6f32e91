"""One opener for every image file, one way to turn an image into pixels as a browser shows them, one writer of animations."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ExifTags, Image, ImageCms
from torch import Tensor

from valign.checks import UserError
from valign.files import atomic_path

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".ppm", ".pgm")
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")  # Pillow's names; other plug-ins of it start programs
TURNS = {  # value of the orientation tag -> what undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SCREEN_GAMMA = 2.2


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What an image may have at most; asked before anything is decoded."""

    pixels: int = 89_478_485  # of all frames that are read; Pillow warns from here on
    frames: int = 256
    proportion: float = 100.0  # of the longer side to the shorter


def open_image(source: Path | bytes, *, name: str = "", limits: ImageLimits = ImageLimits()) -> Image.Image:
    """The image of a file, or of a file's bytes, as `as_shown` makes it, decoded to the end; of an animation the first frame.

    Args: name: What messages call it; the path if left out.
    Raises: UserError with the name if it is missing, broken, cut short, of another format, or beyond ``limits``.
    """
    with _opened(source, name) as image:
        _check_limits(image, 1, limits)
        return as_shown(image)


def open_frames(
    source: Path | bytes, *, name: str = "", limits: ImageLimits = ImageLimits(), formats: tuple[str, ...] = FORMATS
) -> list[Image.Image]:
    """Every frame of an animation in order, one for a still image; otherwise as `open_image`."""
    with _opened(source, name, formats) as image:
        count = _frames(image)
        _check_limits(image, count, limits)
        shown = []
        for frame in range(count):
            image.seek(frame)
            shown.append(as_shown(image))
        return shown


def count_frames(source: Path | bytes, *, name: str = "") -> int:
    """Frames of an animation, 1 for a still image; nothing is decoded. Raises: UserError if it is not an image."""
    with _opened(source, name) as image:
        return _frames(image)


def count_pixels(source: Path | bytes, *, name: str = "", formats: tuple[str, ...] = FORMATS) -> int:
    """Pixels of all frames together; nothing is decoded. Raises: UserError if it is not an image."""
    with _opened(source, name, formats) as image:
        return image.width * image.height * _frames(image)


def as_shown(image: Image.Image) -> Image.Image:
    """An image as viewers show it: RGB of 8 bits on white, turned as its tag says, colours by its profile or gamma.

    Raises: UserError for pixels that have no white (32 bits), and for a transparent colour of 16 bits, which Pillow rounds.
    """
    tiles = getattr(image, "tile", None)  # of a file; gone once it is decoded
    rawmode = str(tiles[0].args) if tiles else ""
    turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    colours, alpha = _split(image, rawmode)
    colours = _by_profile(colours, image.info)
    if alpha is not None:
        shown = Image.merge("RGBA", (*colours.split(), alpha))
        colours = Image.alpha_composite(Image.new("RGBA", image.size, "white"), shown).convert("RGB")
    if turn is not None:
        colours = colours.transpose(turn)
    colours.info = {}  # what was in it has been done
    return colours


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """`fit` into ``size`` x ``size`` pixels."""
    return fit(image, size, size)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """RGB, ``width`` x ``height`` pixels: scaled (bicubic) to cover them, and cropped about its middle.

    Only what is kept is scaled, so memory is bounded by the result however long the other side is.
    """
    image, wanted = as_shown(image), (width, height)
    if image.size == wanted:
        return image
    scale = max(kept / side for kept, side in zip(wanted, image.size, strict=True))
    box = []
    for kept, side in zip(wanted, image.size, strict=True):
        scaled = max(kept, round(side * scale))
        first = (scaled - kept) // 2
        box.append((first * side / scaled, (first + kept) * side / scaled))
    (left, right), (top, bottom) = box
    return image.resize(wanted, Image.Resampling.BICUBIC, box=(left, top, right, bottom))


def image_tensor(image: Image.Image, width: int, height: int | None = None) -> Float[Tensor, "3 height width"]:
    """An image in [-1, 1], float32, brought to size by `fit`; square without ``height``."""
    return torch.from_numpy(np.array(fit(image, width, height or width))).permute(2, 0, 1).float() / 127.5 - 1.0


def write_animation(path: Path, clips: Sequence[Sequence[Image.Image]], *, milliseconds: int = 250) -> None:
    """Animations of one length side by side in one lossless WebP, each frame shown so long, there and back without an end.

    Raises: ValueError for no animation, or animations of several lengths.
    """
    lengths = {len(clip) for clip in clips}
    if len(lengths) != 1 or not min(lengths):
        raise ValueError(f"write_animation.clips must be animations of one length, got {sorted(lengths)}. Cut the longer ones.")
    sheets = []
    for images in zip(*clips):
        width, height = images[0].size
        sheet = Image.new("RGB", (width * len(images), height))
        for place, image in enumerate(images):
            sheet.paste(fit(image, width, height), (place * width, 0))
        sheets.append(sheet)
    sheets += sheets[-2:0:-1]
    with atomic_path(path) as temporary:
        options = {"duration": milliseconds, "loop": 0, "lossless": True, "minimize_size": False}
        sheets[0].save(temporary, format="WEBP", save_all=True, append_images=sheets[1:], **options)


def image_files(folder: Path) -> list[Path]:
    """The image files directly in ``folder``, by their endings, sorted; hidden ones (as of macOS) are left out."""
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != "." and path.is_file())


@contextmanager
def _opened(source: Path | bytes, name: str, formats: tuple[str, ...] = FORMATS) -> Iterator[Image.Image]:
    name = name or (str(source) if isinstance(source, Path) else "image")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats) as image:
            yield image
    except FileNotFoundError:
        raise UserError(f"{name} does not exist. Check the path.") from None
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} must have at most {ImageLimits.pixels} pixels: {error}. Scale it down.") from None
    except Image.UnidentifiedImageError:
        listed = ", ".join(formats)
        raise UserError(f"{name} must be an image that is read ({listed}), got another format. Convert it, or remove it.") from None
    except Exception as error:  # Pillow's plug-ins raise errors of many kinds on a broken file
        raise UserError(f"{name} must be a whole image, it could not be decoded: {error}. Save it again, or remove it.") from error


def _frames(image: Image.Image) -> int:
    """MPO is a photo with a second one behind it for other devices; viewers show the first."""
    return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)


def _check_limits(image: Image.Image, frames: int, limits: ImageLimits) -> None:
    width, height = image.size
    if frames > limits.frames:
        raise UserError(f"must have at most {limits.frames} frames, got {frames}. Shorten the animation.")
    if width * height * frames > limits.pixels:
        of = f" of {frames} frames" if frames > 1 else ""
        raise UserError(f"must have at most {limits.pixels} pixels, got {width} x {height}{of}. Scale it down.")
    if max(width, height) > limits.proportion * min(width, height):
        raise UserError(
            f"must be at most {limits.proportion:g} times as long as wide, got {width} x {height} pixels. Cut out what matters."
        )


def _split(image: Image.Image, rawmode: str) -> tuple[Image.Image, Image.Image | None]:
    """Colours (L, RGB or CMYK) and, if any pixel can be transparent, opacity (L), both of 8 bits."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        return _deep(image, clear)
    if image.mode == "F":
        raise UserError("must have 8 or 16 bits a channel, got 32-bit floats, whose white is not known. Save it with 8 bits.")
    if clear is not None and "RGB;16" in rawmode:
        raise UserError("must not have a transparent colour of 16 bits. Save it with an alpha channel, or with 8 bits.")
    step = next((step for bits, step in {"L;2": 85, "L;4": 17}.items() if bits in rawmode), 0)
    if clear is not None and step:  # Pillow spreads the few shades of such a file, and leaves the transparent one as it is
        return image.copy(), _opaque_but(np.asarray(image), clear * step)
    if image.has_transparency_data:
        full = image.convert("RGBA")
        return full.convert("RGB"), full.getchannel("A")
    return (image.copy() if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")), None


def _deep(image: Image.Image, clear: object) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 bits, in Pillow's modes ``I;16`` and ``I``."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise UserError("must have 8 or 16 bits a channel, got 32, whose white is not known. Save it with 8 bits.")
    alpha = None if clear is None else _opaque_but(values, clear)
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)), alpha


def _opaque_but(values: np.ndarray, clear: object) -> Image.Image:
    return Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))


def _by_profile(colours: Image.Image, info: dict[str | tuple[int, int], object]) -> Image.Image:
    """RGB in sRGB. A profile that does not fit the image is ignored, as viewers do."""
    profile, gamma = info.get("icc_profile"), info.get("gamma")
    if isinstance(profile, bytes):
        try:
            made = ImageCms.profileToProfile(
                colours, ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
            assert made is not None
            return made
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass
    elif isinstance(gamma, float) and gamma > 0 and "srgb" not in info:
        exponent = 1 / (SCREEN_GAMMA * gamma)
        if abs(exponent - 1) > 0.05:  # nearly every file says 1 / 2.2, rounded
            return colours.convert("RGB").point([round(255 * (value / 255) ** exponent) for value in range(256)] * 3)
    return colours.convert("RGB")
