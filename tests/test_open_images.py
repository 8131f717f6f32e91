"""Every image is read as a viewer shows it, and no small file costs much."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from valign.checks import UserError
from valign.images import (
    ImageLimits,
    as_shown,
    count_frames,
    fit_square,
    image_tensor,
    open_frames,
    open_image,
    write_animation,
)

GREEN, RED = (0, 255, 0), (220, 30, 30)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def png(path, width, height, bits, colour, data, *chunks):
    """A PNG written by hand: Pillow writes none of few bits with a transparent colour, and no RGB of 16 bits."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row for row in data)
    parts = [chunk(b"IHDR", head), *(chunk(*one) for one in chunks), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def clear_green(mode):
    """A red square on green that is wholly transparent, as each mode says it."""
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., :3], pixels[2:6, 2:6] = GREEN, (*RED, 255)
    if mode == "RGBA":
        return Image.fromarray(pixels), {}
    if mode == "RGB":
        return Image.fromarray(pixels[..., :3].copy()), {"transparency": GREEN}
    flat = Image.new("P", (8, 8), 0)
    flat.putpalette([*GREEN, *RED] + [0] * 762)
    flat.paste(1, (2, 2, 6, 6))
    return flat, {"transparency": 0}


@pytest.mark.parametrize(
    ("mode", "suffix", "options"),
    [
        ("RGBA", "png", {}),
        ("RGBA", "webp", {"lossless": True, "exact": True}),
        ("RGB", "png", {}),
        ("P", "png", {}),
        ("P", "gif", {}),
    ],
)
def test_what_is_transparent_is_white_whatever_colour_stands_below(tmp_path, mode, suffix, options):
    image, clear = clear_green(mode)
    shown = open_image(saved(tmp_path / f"a.{suffix}", image, **options, **clear))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((3, 3)) == RED


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_found_at_every_depth(tmp_path, bits):
    bytes_of = {1: b"\x40", 2: b"\x10", 4: b"\x01", 8: b"\x00\x01", 16: b"\x00\x00\x00\x01"}  # two pixels: 0 and 1
    path = png(tmp_path / "a.png", 2, 1, bits, 0, [bytes_of[bits]], (b"tRNS", struct.pack(">H", 1)))
    assert [open_image(path).getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 0), (255, 255, 255)]


def test_grey_of_16_bits_keeps_its_shades(tmp_path):
    path = saved(tmp_path / "a.png", Image.fromarray(np.array([[0, 16448, 32768, 65535]], np.uint16)))
    assert [open_image(path).getpixel((x, 0))[0] for x in range(4)] == [0, 64, 128, 255]  # 65535 / 255 = 257; 16448 = 64 * 257


def test_a_transparent_colour_of_16_bits_is_refused_since_half_of_it_is_lost(tmp_path):
    path = png(tmp_path / "a.png", 1, 1, 16, 2, [b"\x12\x34" * 3], (b"tRNS", b"\x12\x34" * 3))
    with pytest.raises(UserError, match=r"a\.png must not have a transparent colour of 16 bits"):
        open_image(path)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pixels_without_a_white_are_refused(tmp_path, mode):
    path = saved(tmp_path / "a.tif", Image.new(mode, (2, 2), 100_000))
    with pytest.raises(UserError, match=r"a\.tif must have 8 or 16 bits a channel, got 32"):
        open_image(path)


@pytest.mark.parametrize(("tag", "corner"), [(1, (0, 0)), (2, (1, 0)), (3, (1, 2)), (4, (0, 2)), (6, (2, 0)), (8, (0, 1))])
def test_the_orientation_tag_is_obeyed(tmp_path, tag, corner):
    image, exif = Image.new("RGB", (2, 3)), Image.Exif()
    image.putpixel((0, 0), RED)
    exif[0x0112] = tag
    shown = open_image(saved(tmp_path / "a.png", image, exif=exif))
    assert shown.size == ((3, 2) if tag > 4 else (2, 3))
    assert shown.getpixel(corner) == RED
    assert as_shown(shown).tobytes() == shown.tobytes()  # once, not twice


def test_a_profile_and_a_gamma_give_the_colours_of_a_screen(tmp_path):
    linear = png(tmp_path / "g.png", 1, 1, 8, 0, [bytes([64])], (b"gAMA", struct.pack(">I", 100_000)))
    assert open_image(linear).getpixel((0, 0)) == (136, 136, 136)  # 255 (64 / 255)^(1 / 2.2) = 136.1
    usual = png(tmp_path / "u.png", 1, 1, 8, 0, [bytes([64])], (b"gAMA", struct.pack(">I", 45_455)))
    assert open_image(usual).getpixel((0, 0)) == (64, 64, 64)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert open_image(saved(tmp_path / "l.png", Image.new("RGB", (1, 1), RED), icc_profile=lab)).getpixel((0, 0)) == RED
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    shown = open_image(saved(tmp_path / "s.png", Image.new("RGB", (1, 1), RED), icc_profile=srgb)).getpixel((0, 0))
    assert np.abs(np.subtract(shown, RED)).max() <= 1


@pytest.mark.parametrize(("suffix", "options"), [("gif", {}), ("webp", {"lossless": True}), ("png", {})])
def test_every_frame_is_read(tmp_path, suffix, options):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("blue", "red", "white")]
    path = saved(tmp_path / f"a.{suffix}", frames[0], save_all=True, append_images=frames[1:], duration=100, **options)
    assert count_frames(path) == 3
    assert [frame.getpixel((4, 4)) for frame in open_frames(path)] == [(0, 0, 255), (255, 0, 0), (255, 255, 255)]
    assert open_image(path).getpixel((4, 4)) == (0, 0, 255)
    with pytest.raises(UserError, match=r"must have at most 2 frames, got 3"):
        open_frames(path, limits=ImageLimits(frames=2))
    with pytest.raises(UserError, match=r"must have at most 128 pixels, got 8 x 8 of 3 frames"):
        open_frames(path, limits=ImageLimits(pixels=128))


def test_a_file_that_was_cut_off_is_refused_by_name(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(file, "JPEG")
    path = tmp_path / "cut.jpg"
    path.write_bytes(file.getvalue()[: len(file.getvalue()) // 2])
    with pytest.raises(UserError, match=r"cut\.jpg must be a whole image, it could not be decoded: .*truncated"):
        open_image(path)
    with pytest.raises(UserError, match=r"the third must be a whole image"):
        open_image(path.read_bytes(), name="the third")


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((20_000, 20_000), r"a\.png must have at most 89478485 pixels"),
        ((10_000, 10_000), r"a\.png must have at most 89478485 pixels, got 10000 x 10000"),
        ((1, 5000), r"a\.png must be at most 100 times as long as wide, got 1 x 5000"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_size_and_proportion_are_asked_before_anything_is_decoded(tmp_path, size, message):
    path = saved(tmp_path / "a.png", Image.new("1", size))
    with pytest.raises(UserError, match=message):
        open_image(path)


def test_other_formats_and_missing_files_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"a\.txt must be an image that is read \(PNG, JPEG"):
        open_image(tmp_path / "a.txt")
    with pytest.raises(UserError, match=r"b\.png does not exist"):
        open_image(tmp_path / "b.png")


@pytest.mark.parametrize("size", [(40, 40), (97, 31), (31, 200), (5, 7), (64, 1000)])
def test_cutting_before_scaling_gives_the_same_image(size):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    scale = 32 / min(size)
    width, height = (max(32, round(side * scale)) for side in size)
    left, top = (width - 32) // 2, (height - 32) // 2
    whole = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 32, top + 32))
    difference = np.abs(np.asarray(fit_square(image, 32), int) - np.asarray(whole, int))
    assert difference.max() <= 1


def test_one_pixel_beside_a_hundred_thousand_costs_what_the_result_costs():
    long = Image.new("RGB", (1, 100_000), RED)  # scaled whole to 64 it would take 1.2 GB
    assert torch.equal(image_tensor(long, 64), image_tensor(Image.new("RGB", (64, 64), RED), 64))


def test_animations_are_written_side_by_side_there_and_back(tmp_path):
    red, green, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "green", "blue"))
    write_animation(tmp_path / "clips.webp", [[red, green, blue], [blue, blue, red]])
    frames = open_frames(tmp_path / "clips.webp")
    assert [(frame.getpixel((0, 0)), frame.getpixel((15, 5))) for frame in frames] == [
        (red.getpixel((0, 0)), blue.getpixel((0, 0))),
        (green.getpixel((0, 0)), blue.getpixel((0, 0))),
        (blue.getpixel((0, 0)), red.getpixel((0, 0))),
        (green.getpixel((0, 0)), blue.getpixel((0, 0))),
    ]
    assert frames[0].size == (16, 6)
    with pytest.raises(ValueError, match=r"must be animations of one length, got \[1, 2\]"):
        write_animation(tmp_path / "no.webp", [[red], [red, blue]])
    with pytest.raises(ValueError, match=r"of one length, got \[\]"):
        write_animation(tmp_path / "no.webp", [])
