"""Tokens that an attacker can type: whole words of a tokenizer, and whether a text is read as the same tokens again."""

import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.attacks.base import Scope
from valign.checks import UserError
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.soft_prompts import encode_ids, one_encoder, padded_ids, token_vectors, tokens_read

WHOLE_WORD = re.compile(r"([a-z]+)</w>")
FEWEST = 8  # words that a search needs to choose from
CHUNK = 64  # texts per pass of the text encoder


class TypedTokens:
    """The whole-word tokens of a model's tokenizer that are not on the guard's word lists.

    Args: listed: Folded words that no prompt of the attack may hold.
    Raises: UserError for a model with two text encoders, or one whose tokenizer has too few words left.
    """

    def __init__(self, model: DiffusionModel, listed: frozenset[str]) -> None:
        self.model = model
        self.tokenizer, _ = one_encoder(model)
        words = {row: match[1] for token, row in self.tokenizer.get_vocab().items() if (match := WHOLE_WORD.fullmatch(token))}
        kept = sorted(row for row, word in words.items() if word not in listed)
        if len(kept) < FEWEST:
            raise UserError(f"The tokenizer of {model.folder} must have at least {FEWEST} words to search in, got {len(kept)}.")
        self.ids: Int[Tensor, " word"] = torch.tensor(kept, device=model.device)
        self.vectors: Float[Tensor, "word dim"] = token_vectors(model)[self.ids].float()

    def of(self, text: str) -> list[int]:
        """The tokens of a text, without markers, as far as they are read."""
        found: list[int] = self.tokenizer(text, truncation=True, max_length=tokens_read(self.model)).input_ids[1:-1]
        return found

    def text(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def typed(self, ids: Sequence[int]) -> str:
        """The text of token ids; "" if the tokenizer reads it as other tokens: then it cannot be typed."""
        text = self.text(ids)
        return text if self.of(text) == list(ids) else ""

    def nearest(self, vectors: Float[Tensor, "place dim"]) -> Int[Tensor, " place"]:
        """For each vector the word with the highest cosine, as a token id."""
        unit = torch.nn.functional.normalize(self.vectors, dim=1)
        return self.ids[(torch.nn.functional.normalize(vectors.float(), dim=1) @ unit.T).argmax(1)]

    def states(self, rows: Sequence[Sequence[int]], scope: Scope) -> Float[Tensor, "row token dim"]:
        """The text encoder's states of token ids, float32, without gradients; counted as encodings."""
        scope.meter.encodings += len(rows)
        parts = [list(rows[first : first + CHUNK]) for first in range(0, len(rows), CHUNK)]
        with torch.no_grad():
            return torch.cat([encode_ids(self.model, padded_ids(self.model, part)).embeds.float() for part in parts])

    def end(self, ids: Sequence[int]) -> int:
        """Place of the end marker behind these tokens, where the encoder has read all of them."""
        return min(len(ids), tokens_read(self.model) - 2) + 1
