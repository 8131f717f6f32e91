"""The records that models speak in, and images as tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from valign.images import fit_square
from valign.models.diffusion.base import Conditioning, LatentDist
from valign.models.images import pil_to_tensor, tensor_to_pil


def conditioning(rows, pooled=True):
    ramp = torch.arange(rows, dtype=torch.float32)
    extra = (ramp[:, None].repeat(1, 5), ramp[:, None].repeat(1, 6)) if pooled else ()
    return Conditioning(ramp[:, None, None].repeat(1, 2, 3), *extra)


def rows_of(c):
    parts = [part for part in (c.embeds, c.pooled, c.time_ids) if part is not None]
    first = [part.flatten(1)[:, 0].tolist() for part in parts]
    assert all(column == first[0] for column in first)  # the parts never come apart
    return first[0]


@pytest.mark.parametrize("pooled", [True, False])
def test_rows_are_selected_repeated_and_joined_together(pooled):
    c = conditioning(3, pooled)
    assert len(c) == 3
    assert rows_of(c.select([2, 0, 2])) == [2, 0, 2]
    assert rows_of(c.select(slice(1, None))) == [1, 2]
    assert rows_of(c.select(torch.tensor([True, False, True]))) == [0, 2]
    assert rows_of(c.repeat(2)) == [0, 1, 2, 0, 1, 2]
    assert rows_of(Conditioning.cat([c.select([1]), c])) == [1, 0, 1, 2]
    assert c.repeat(2).embeds.shape == (6, 2, 3)
    assert c.to(dtype=torch.float16).embeds.dtype == torch.float16
    assert (c.to(dtype=torch.float16).pooled is None) == (not pooled)


def test_latents_are_sampled_from_the_posterior():
    dist = LatentDist(torch.full((1, 1, 1, 1), 3.0), torch.full((1, 1, 1, 1), 2.0))
    assert dist.sample(torch.full((1, 1, 1, 1), -0.5)).item() == 2.0


def test_images_survive_the_way_to_tensors_and_back():
    pixels = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    tensor = pil_to_tensor([Image.fromarray(pixels)], 8)
    assert (tensor.dtype, tensor.min() >= -1, tensor.max() <= 1) == (torch.float32, True, True)
    assert np.array_equal(np.asarray(tensor_to_pil(tensor)[0]), pixels)


def test_values_beyond_the_range_are_clipped():
    assert np.asarray(tensor_to_pil(torch.tensor([-9.0, 0.0, 9.0]).view(1, 3, 1, 1))[0]).tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (33, 64), (1, 1), (64, 64)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P"])
def test_any_image_becomes_a_square(size, mode):
    assert fit_square(Image.new("RGB", size, "red").convert(mode), 32).size == (32, 32)
