import numpy as np
from PIL import Image

from valign.data.images.grid import figure_grid, tile


def test_tiles_lie_a_gap_apart():
    red, blue = Image.new("RGB", (2, 2), "red"), Image.new("RGB", (2, 2), "blue")
    sheet = tile([[red, blue]], gap=4)
    assert sheet.size == (8, 2)
    assert sheet.getpixel((0, 0)) == (255, 0, 0)
    assert sheet.getpixel((2, 0)) == (255, 255, 255)
    assert sheet.getpixel((6, 1)) == (0, 0, 255)


def test_a_figure_shows_each_image_in_its_cell():
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    figure, axes = figure_grid([[red, None], [None, red]], size=(2, 2), dpi=50)
    assert axes.shape == (2, 2)
    assert [[len(axis.images) for axis in row] for row in axes] == [[1, 0], [0, 1]]
    assert (np.asarray(axes[1, 1].images[0].get_array()) == np.asarray(red)).all()
    assert tuple(figure.get_size_inches()) == (2, 2)
