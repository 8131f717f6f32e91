"""What cross-attention reads of a prompt: the text encoder's states, and the layers that read them."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from valign.models.diffusion.base import DiffusionModel

TEXT_READERS = ("attn2.to_k", "attn2.to_v")  # keys and values of every cross-attention


def text_readers(model: DiffusionModel) -> dict[str, nn.Linear]:
    """The denoiser's linear layers whose input is the text encoder's states alone, by name, sorted; none in other families."""
    return {
        name: module
        for name, module in sorted(model.denoiser.named_modules())
        if name.endswith(TEXT_READERS) and isinstance(module, nn.Linear)
    }


def padded_states(model: DiffusionModel, texts: Sequence[str]) -> Float[Tensor, "text token dim"]:
    """All states of the padded texts; SDXL's two encoders side by side.

    Blank instead of empty: SDXL replaces the empty prompt by zeros, which encode nothing.
    """
    return model.encode_prompts([text if text.strip() else " " for text in texts]).embeds


def token_mask(model: DiffusionModel, texts: Sequence[str], tokens: int) -> Bool[Tensor, "text token"]:
    """Which of ``tokens`` states are begin, words and end of a text; the others are padding."""
    listed = [text if text.strip() else " " for text in texts]
    encoded = model.tokenizers[0](listed, padding="max_length", max_length=tokens, truncation=True, return_tensors="pt")
    return encoded.attention_mask.bool()


def token_states(model: DiffusionModel, texts: Sequence[str], tokens: str = "last") -> Float[Tensor, "state dim"]:
    """What cross-attention reads of each text: its last word's state, or all states of the padded text, text after text.

    The last word stands right before the end-of-text token; of an empty text it is the begin-of-text token.
    """
    states = padded_states(model, texts)
    if tokens == "all":
        return states.flatten(0, 1)
    last = token_mask(model, texts, states.shape[1]).sum(1).to(states.device) - 2
    return states[torch.arange(len(states), device=states.device), last]
