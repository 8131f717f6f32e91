"""A prompt as token ids and as vectors that gradients reach: what an optimization of tokens needs of a model's text encoder."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from valign.checks import UserError
from valign.models.diffusion.base import Conditioning, DiffusionModel


def one_encoder(model: DiffusionModel) -> tuple[Any, Any]:
    """The model's tokenizer and text encoder. Raises: UserError for a family with two of them."""
    if len(model.text_encoders) != 1:
        raise UserError(
            f"{model.folder} must have one text encoder for an optimization of tokens, got {len(model.text_encoders)}. "
            "Use an attack that needs no gradients, or a Stable Diffusion 1.x or 2.x folder."
        )
    return model.tokenizers[0], model.text_encoders[0]


def token_vectors(model: DiffusionModel) -> Float[Tensor, "token dim"]:
    """The input vector of every token, as the text encoder holds them; not to be changed."""
    table: nn.Embedding = one_encoder(model)[1].get_input_embeddings()
    return table.weight.detach()


def tokens_read(model: DiffusionModel) -> int:
    """Tokens of a padded prompt, with the two markers."""
    tokenizer, encoder = one_encoder(model)
    return int(min(tokenizer.model_max_length, encoder.config.max_position_embeddings))


def padded_ids(model: DiffusionModel, rows: Sequence[Sequence[int]]) -> Int[Tensor, "row token"]:
    """Token ids without markers -> with begin, end and padding, cut at the tokens that are read; on the model's device."""
    tokenizer, _ = one_encoder(model)
    length = tokens_read(model)
    begin, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    whole = [[begin, *list(row)[: length - 2], end] for row in rows]
    return torch.tensor([row + [pad] * (length - len(row)) for row in whole], device=model.device)


def encode_ids(
    model: DiffusionModel,
    ids: Int[Tensor, "row token"],
    vectors: Float[Tensor, "row place dim"] | None = None,
    places: Sequence[int] = (),
) -> Conditioning:
    """What the denoiser reads of padded token ids; gradients flow where the caller lets them.

    Args:
        vectors: Stand at ``places`` (1 is the first token behind the begin marker) instead of the ids' own input vectors.
    """
    tokenizer, encoder = one_encoder(model)
    table: nn.Module = encoder.get_input_embeddings()

    def put(_: nn.Module, __: Any, found: Tensor) -> Tensor | None:
        if vectors is None:
            return None
        found = found.clone()
        found[:, list(places)] = vectors.to(found.dtype)
        return found

    mask = None
    if getattr(encoder.config, "use_attention_mask", False):
        mask = (ids != tokenizer.pad_token_id).long()
    handle = table.register_forward_hook(put)
    try:
        states: Tensor = encoder(ids, attention_mask=mask)[0]
    finally:
        handle.remove()
    return Conditioning(states.to(next(model.denoiser.parameters()).dtype))
