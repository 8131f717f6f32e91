"""Images to tensors and back, without torchvision."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from valign.checks import UserError
from valign.images import image_tensor


def pil_to_tensor(images: Sequence[Image.Image], size: int) -> Float[Tensor, "batch 3 size size"]:
    """Images as float32 in [-1, 1], each by `image_tensor`."""
    return torch.stack([image_tensor(image, size) for image in images])


def tensor_to_pil(images: Float[Tensor, "batch 3 height width"]) -> list[Image.Image]:
    """Values in [-1, 1] (others are clipped) as 8-bit images, rounded as diffusers does.

    Raises: UserError for NaN and infinity, which would become black images that look harmless.
    """
    if not images.isfinite().all():
        raise UserError("Generated images must be finite, got NaN or infinity: the model, or an adapter on it, is broken.")
    scaled = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(pixels) for pixels in (scaled * 255).round().astype(np.uint8)]
