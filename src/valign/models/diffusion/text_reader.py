"""How much of a prompt a diffusers pipeline reads: its text encoder has room for so many tokens, and drops the rest."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any


def encoder_limit(pipe: Any) -> Callable[[Any], int]:
    """The tokens that the first text encoder of a pipeline reads: what it says, and its tokenizer."""
    return lambda tokenizer: int(min(tokenizer.model_max_length, pipe.text_encoder.config.max_position_embeddings))


class TextReader:
    """Tokenizes as the pipeline does, with a tokenizer of its own: generation changes the other one's settings in its own thread.

    Args: limit: Tokenizer -> tokens that are read of a text, with the two markers.
    """

    def __init__(self, pipe: Any, limit: Callable[[Any], int]) -> None:
        self._pipe, self._limit = pipe, limit
        self._tokenizer: Any = None

    def text_read(self, prompts: Sequence[str]) -> list[str]:
        """The part of each prompt that is read; the prompt itself where that is all."""
        if self._tokenizer is None or len(self._tokenizer) != len(self._pipe.tokenizer):  # a word that was added since
            self._tokenizer = deepcopy(self._pipe.tokenizer)
        limit, read = self._limit(self._tokenizer), []
        for prompt in prompts:
            ids = self._tokenizer(self._pipe.maybe_convert_prompt(prompt, self._tokenizer)).input_ids
            cut = self._tokenizer.decode(ids[: limit - 1], skip_special_tokens=True) if len(ids) > limit else prompt
            read.append(cut)
        return read
