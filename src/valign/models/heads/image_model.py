"""A vision transformer that reads small images for a task."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModel, ViTConfig, ViTModel
from transformers.utils import logging

from valign.checks import UserError
from valign.data.tasks.images import SIDE, LabelledImage
from valign.files import hash_file
from valign.models.devices import LOAD_ERRORS, choose_device
from valign.models.files.tensor_fingerprint import fingerprint_tensors
from valign.models.heads.task_model import Target, TaskBatch, TaskModel

SMALL = {"hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4, "patch_size": 4}


class ImageModel(TaskModel):
    """An image's vector is the mean of its patches' last hidden states."""

    def batch(self, rows: Sequence[LabelledImage]) -> TaskBatch:
        values = pixel_values(rows).to(self.device)
        return TaskBatch({"pixel_values": values}, self.target.tensor(rows).to(self.device), len(rows))

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        return self.network(**inputs).last_hidden_state[:, 1:].mean(1)

    def reading(self) -> dict[str, Any]:
        return {"side": SIDE}


def pixel_values(rows: Sequence[LabelledImage]) -> Float[Tensor, "row 3 side side"]:
    """The images in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([row.pixels for row in rows]))
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1)


def new_image_model(target: Target, *, seed: int, device: str = "auto") -> ImageModel:
    """A ViT of 0.3 million numbers with random weights, to be trained whole."""
    logging.disable_progress_bar()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ViTModel(ViTConfig(image_size=SIDE, **SMALL), add_pooling_layer=False)  # type: ignore[arg-type]
    fingerprint = fingerprint_tensors(network.state_dict())
    model = ImageModel(network, target, apart=False, fingerprint=fingerprint, seed=seed)
    model.requires_grad_(False)
    return model.to(choose_device(device))


def load_image_model(folder: Path, target: Target, *, seed: int = 0, device: str = "auto") -> ImageModel:
    """A ViT of 32 x 32 images from a transformers folder, safetensors only; the head is new.

    Raises: UserError if there is none.
    """
    logging.disable_progress_bar()
    try:
        network = AutoModel.from_pretrained(folder, use_safetensors=True, dtype=torch.float32, add_pooling_layer=False)
    except LOAD_ERRORS as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{folder} must be a transformers folder of a ViT in safetensors, got: {reason}") from error
    model = ImageModel(network, target, apart=False, fingerprint=hash_file(folder / "model.safetensors"), seed=seed)
    model.requires_grad_(False)
    return model.to(choose_device(device))
