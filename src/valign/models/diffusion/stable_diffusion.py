"""Stable Diffusion 1.x and 2.x: one CLIP text encoder; noise (1.x, 2.x-base) or velocity (2.x, 768 pixels) prediction."""

from typing import ClassVar

from diffusers import StableDiffusionPipeline

from valign.models.diffusion.base import Conditioning
from valign.models.diffusion.pipeline import PipelineModel


class StableDiffusion(PipelineModel):
    """``diffusers.StableDiffusionPipeline`` as a `DiffusionModel`."""

    family = "stable-diffusion"
    pipeline = StableDiffusionPipeline
    networks = ("unet", "vae", "text_encoder")
    load_options: ClassVar = {"requires_safety_checker": False}

    def _encode_chunk(self, prompts: list[str], length: int | None) -> Conditioning:
        tokens = self._tokens(self.pipe.tokenizer, prompts, length)
        encoder = self.pipe.text_encoder
        mask = tokens.attention_mask if getattr(encoder.config, "use_attention_mask", False) else None
        return Conditioning(encoder(tokens.input_ids, attention_mask=mask)[0].to(self.dtype))
