"""A prompt as a whole, as the model reads it: the states of its text encoders at the end-of-text token, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.models.diffusion.base import DiffusionModel
from valign.models.files.fingerprint import TEXT_PARTS, fingerprint_folder

CHUNK = 64  # prompts per pass of a text encoder; bounds its memory


def prompt_states(model: DiffusionModel, prompts: Sequence[str]) -> Float[Tensor, "prompt dim"]:
    """Float32 on the CPU, after each encoder's final layer norm; ``dim`` is `state_width`. Tokens beyond the 77th are cut off.

    The encoders are causal, so the end-of-text state has read the whole prompt and none of the padding behind it.
    """
    found = [torch.empty(0, state_width(model))]
    model.pool.need("text")
    with torch.no_grad():
        for start in range(0, len(prompts), CHUNK):
            chunk, parts = list(prompts[start : start + CHUNK]), []
            for tokenizer, encoder in zip(model.tokenizers, model.text_encoders, strict=True):
                ids = tokenizer(chunk, padding=True, truncation=True, return_tensors="pt").input_ids.to(model.device)
                parts.append(end_states(encoder(ids).last_hidden_state, ids, int(tokenizer.eos_token_id)).float().cpu())
            found.append(torch.cat(parts, dim=-1))
    return torch.cat(found)


def end_states(
    states: Float[Tensor, "prompt token dim"], ids: Int[Tensor, "prompt token"], end: int
) -> Float[Tensor, "prompt dim"]:
    """Each row's state at its first token ``end``; Stable Diffusion 1.x pads with more of them."""
    return states[torch.arange(len(ids), device=ids.device), (ids == end).int().argmax(1)]


def state_width(model: DiffusionModel) -> int:
    """Width of all text encoders together: 768 for Stable Diffusion 1.x, 2048 for SDXL."""
    encoders: list[Any] = model.text_encoders
    return sum(encoder.config.hidden_size for encoder in encoders)


def text_fingerprint(model: DiffusionModel) -> str:
    """SHA-256 of the files of the model's text encoders and tokenizers, hex: the same for two models that differ elsewhere."""
    return fingerprint_folder(Path(model.folder), TEXT_PARTS)
