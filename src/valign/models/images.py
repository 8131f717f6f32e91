"""Images to tensors and back, without torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor


def fit_square(image: Image.Image, size: int) -> Image.Image:
    """RGB, ``size`` x ``size`` pixels: the shorter side scaled to ``size`` (bicubic), the longer one cropped about its middle."""
    image = image.convert("RGB")
    if image.size != (size, size):
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    return image


def pil_to_tensor(images: Sequence[Image.Image], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Images as float32 in [-1, 1], made square by `fit_square`."""
    pixels = np.stack([np.asarray(fit_square(image, size)) for image in images])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0


def tensor_to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Values in [-1, 1] (others are clipped) as 8-bit images, rounded as diffusers does."""
    scaled = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(pixels) for pixels in (scaled * 255).round().astype(np.uint8)]
