"""Grids of images: bare tiles, and a figure whose cells a caller labels."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def tile(rows: Sequence[Sequence[Image.Image]], *, gap: int) -> Image.Image:
    """Images of one size in rows on white, ``gap`` pixels apart."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (len(rows[0]) * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * (width + gap), y * (height + gap)))
    return sheet


def figure_grid(rows: Sequence[Sequence[Image.Image | None]], *, size: tuple[float, float], dpi: int) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches and its axes ``[row, column]``, each with its image; None leaves a cell empty."""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for cells, row in zip(axes, rows, strict=True):
        for axis, image in zip(cells, row, strict=True):
            if image is not None:
                axis.imshow(np.asarray(image), interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    return figure, axes
