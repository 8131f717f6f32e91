"""Stable Diffusion XL: two text encoders side by side, a pooled text vector, and the image's size as a condition."""

from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from valign.models.diffusion.base import Conditioning
from valign.models.diffusion.pipeline import PipelineModel


class StableDiffusionXL(PipelineModel):
    """``diffusers.StableDiffusionXLPipeline`` as a `DiffusionModel`.

    The empty prompt is all zeros where the pipeline's config says so (``force_zeros_for_empty_prompt``, true for the published
    base model): that is what its unconditional branch was trained on.
    """

    family = "sdxl"
    pipeline = StableDiffusionXLPipeline
    networks = ("unet", "vae", "text_encoder", "text_encoder_2")
    load_options: ClassVar = {"add_watermarker": False}
    components = {**PipelineModel.components, "text_encoder_2": "text_encoder_2."}  # noqa: RUF012  # as the base class has it

    @property
    def tokenizers(self) -> list[Any]:
        return [self.pipe.tokenizer, self.pipe.tokenizer_2]

    def _encode_chunk(self, prompts: list[str], length: int | None) -> Conditioning:
        hidden = []
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders):
            answer = encoder(self._tokens(tokenizer, prompts, length).input_ids, output_hidden_states=True)
            hidden.append(answer.hidden_states[-2])  # the last layer but one, without the final norm
        embeds, pooled = torch.cat(hidden, dim=-1), answer[0]  # pooled: the second encoder's projected end-of-text state
        if self.pipe.config.force_zeros_for_empty_prompt:
            empty = torch.tensor([prompt == "" for prompt in prompts], device=self.device)
            embeds, pooled = embeds.masked_fill(empty[:, None, None], 0), pooled.masked_fill(empty[:, None], 0)
        size = self.image_size
        time_ids = torch.tensor([[size, size, 0, 0, size, size]], device=self.device, dtype=self.dtype)
        return Conditioning(embeds.to(self.dtype), pooled.to(self.dtype), time_ids.repeat(len(prompts), 1))

    def _added(self, conditioning: Conditioning) -> dict[str, Tensor]:
        assert conditioning.pooled is not None, "SDXL needs the pooled vector"
        assert conditioning.time_ids is not None, "SDXL needs the time ids"
        return {"text_embeds": conditioning.pooled, "time_ids": conditioning.time_ids}
