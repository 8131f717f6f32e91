"""How likely a text is to a causal language model: a measure of its grammar, not of its sense."""

from collections.abc import Sequence
from math import exp
from pathlib import Path
from typing import Any

import torch

from valign.checks import UserError
from valign.models.language.loading import load_causal


class LanguageModel:
    """A causal language model from a local folder, float32 on the CPU.

    Raises: UserError if the folder is missing, broken, or holds its weights as pickles only.
    """

    def __init__(self, folder: str | Path) -> None:
        tokenizer, model = load_causal(Path(folder).expanduser(), torch.float32)
        self._tokenizer: Any = tokenizer
        self._model: Any = model.eval()
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if start is None:
            raise UserError(f"{folder} must have a token that begins or ends a text, got none. Choose another model.")
        self._start = int(start)

    @torch.inference_mode()
    def perplexity(self, text: str) -> float:
        """``exp`` of the mean negative log-probability of the text's tokens, each given those before it; >= 1.

        Raises: UserError for a text without a token.
        """
        ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError("LanguageModel.perplexity.text must have a token, got none. Give a text with words.")
        inputs = torch.tensor([[self._start, *ids]])
        losses = self._model(input_ids=inputs, labels=inputs).loss  # the first token is given, and predicts the second
        return exp(float(losses))

    def perplexities(self, texts: Sequence[str]) -> list[float]:
        return [self.perplexity(text) for text in texts]
