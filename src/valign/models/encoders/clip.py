"""CLIP: unit vectors of images and texts, and the cosine between an image and its prompt."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL.Image import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from valign.checks import UserError, first_line
from valign.files import hash_file, hash_value, read_json
from valign.models.devices import choose_device
from valign.models.files.finite import check_finite
from valign.models.images import pil_to_tensor

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of the published models, for pixels in [0, 1]
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipEncoder:
    """A transformers ``CLIPModel`` folder (model and tokenizer, safetensors), run in float32.

    Args:
        folder: As ``save_pretrained`` makes it; the pixel statistics come from ``preprocessor_config.json`` where there is one.
        batch_size: Images or texts per pass; bounds the memory.
        adapters: peft folders of LoRAs, in safetensors, that are merged into the model in this order.
    Raises: UserError if the folder is missing, broken, or does not hold a CLIP model, and if an adapter does not fit it.
    """

    def __init__(
        self, folder: str | Path, *, device: str = "auto", batch_size: int = 32, adapters: Sequence[str | Path] = ()
    ) -> None:
        self.folder, self.adapters = Path(folder), tuple(map(Path, adapters))
        self.batch_size = batch_size
        place = choose_device(device)
        if not (self.folder / "config.json").exists():
            raise UserError(f"{folder} has no config.json, so it is not a CLIP folder. Give the folder that save_pretrained made.")
        if (kind := read_json(self.folder / "config.json").get("model_type")) != "clip":
            raise UserError(f"{folder} must hold a CLIP model, got {kind}. Choose another folder.")
        if not list(self.folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no safetensors file; pickles are not opened. Save the model again as safetensors.")
        try:
            transformers_logging.disable_progress_bar()
            model = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
            self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
            raise UserError(f"{folder} could not be loaded as a CLIP model: {error}. Save or download it again.") from error
        check_finite(folder, model.state_dict())
        for adapter in self.adapters:
            model = merge_adapter(model, adapter)
        self.model = model.requires_grad_(False).eval().to(place)
        config: Any = model.config
        self.image_size: int = config.vision_config.image_size
        self.dim: int = config.projection_dim

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @cached_property
    def weights_sha256(self) -> str:
        """One hash over all weight files, and over those of the adapters where there are any, hex."""
        own = hash_value({file.name: hash_file(file) for file in sorted(self.folder.glob("*.safetensors"))})
        added = [[hash_file(adapter / name) for name in ADAPTER_FILES] for adapter in self.adapters]
        return hash_value([own, *added]) if added else own

    @cached_property
    def _statistics(self) -> tuple[Tensor, Tensor]:
        file = self.folder / "preprocessor_config.json"
        settings = read_json(file) if file.exists() else {}
        values = (settings.get("image_mean", CLIP_MEAN), settings.get("image_std", CLIP_STD))
        mean, std = (torch.tensor(value).view(1, 3, 1, 1) for value in values)
        return mean, std

    def prepare(self, images: Sequence[Image] | Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 size size"]:
        """Images, or tensors in [-1, 1], resized (shorter side, bicubic), cropped to a square and normalized."""
        if isinstance(images, Tensor):
            height, width = images.shape[-2:]
            scale = self.image_size / min(height, width)
            size = (round(height * scale), round(width * scale))
            pixels = images.float()
            if scale != 1:
                pixels = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
            top, left = (size[0] - self.image_size) // 2, (size[1] - self.image_size) // 2
            pixels = pixels[..., top : top + self.image_size, left : left + self.image_size].clamp(-1, 1)
        else:
            pixels = pil_to_tensor(images, self.image_size)
        mean, std = (values.to(self.device) for values in self._statistics)
        return (pixels.to(self.device) / 2 + 0.5 - mean) / std

    @torch.no_grad()
    def image_features(self, images: Sequence[Image] | Float[Tensor, "batch 3 height width"]) -> Float[np.ndarray, "batch dim"]:
        """Unit vectors, float32; no image gives no row."""
        return self._unit(self.image_projections(images))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[str]) -> Float[np.ndarray, "batch dim"]:
        """Unit vectors, float32; a text is cut off at the model's length (77 tokens)."""
        return self._unit(self.text_projections(prompts))

    @torch.no_grad()
    def image_projections(self, images: Sequence[Image] | Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """As the model projects them, of any length."""
        batches = [images[first : first + self.batch_size] for first in range(0, len(images), self.batch_size)]
        return self._joined([self.model.get_image_features(self.prepare(batch)).pooler_output for batch in batches])

    @torch.no_grad()
    def text_projections(self, prompts: Sequence[str]) -> Float[Tensor, "batch dim"]:
        """As the model projects them, of any length; a text is cut off at the model's length."""
        batches = [list(prompts[first : first + self.batch_size]) for first in range(0, len(prompts), self.batch_size)]
        return self._joined([self.model.get_text_features(self.tokens(batch)).pooler_output for batch in batches])

    def tokens(self, prompts: Sequence[str], *, short: bool = False) -> Int[Tensor, "batch token"]:
        """Token ids, cut off at the model's length and padded to it, or to the longest prompt with ``short``: what follows the end
        of a text changes its features by rounding alone."""
        length = self.model.config.text_config.max_position_embeddings
        padding = "longest" if short else "max_length"
        found = self.tokenizer(list(prompts), padding=padding, max_length=length, truncation=True, return_tensors="pt")
        return found.input_ids.to(self.device)

    def score(self, images: Sequence[Image], prompts: Sequence[str]) -> Float[np.ndarray, " batch"]:
        """Cosine in [-1, 1] between each image and its prompt; CLIPScore is 100 times their mean."""
        if len(images) != len(prompts):
            raise ValueError(f"ClipEncoder.score must get one prompt per image, got {len(prompts)} for {len(images)} images.")
        return (self.image_features(images) * self.text_features(prompts)).sum(axis=1)

    def _joined(self, parts: list[Tensor]) -> Float[Tensor, "batch dim"]:
        return torch.cat(parts) if parts else torch.zeros(0, self.dim, device=self.device)

    def _unit(self, rows: Float[Tensor, "batch dim"]) -> Float[np.ndarray, "batch dim"]:
        return normalize(rows, dim=1).cpu().numpy()


def merge_adapter(model: CLIPModel, folder: Path) -> CLIPModel:
    """The model with a peft LoRA in its own weights. Raises: UserError if the folder does not hold one that fits."""
    from peft import PeftModel

    missing = [name for name in ADAPTER_FILES if not (folder / name).is_file()]
    if missing:
        raise UserError(f"{folder} must be a peft adapter's folder, it has no {missing[0]}. Fit the detector again.")
    try:
        check_finite(folder, load_file(folder / ADAPTER_FILES[1]))
        loaded = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
        merged: CLIPModel = loaded.merge_and_unload()  # type: ignore[operator]
        return merged
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} could not be loaded as an adapter of this CLIP: {first_line(error)}. Fit it again.") from error
