"""A chat model from a local folder, through transformers: safetensors only, no code of the model's own, no network."""

from pathlib import Path
from threading import Lock
from typing import Any

import torch

from valign.checks import UserError, check_choice, check_range
from valign.models.devices import DTYPES
from valign.models.language.chat import ChatRefused, Message, Schema
from valign.models.language.loading import load_chat


class LocalChat:
    """Answers with the folder's own chat template. One question at a time.

    Args:
        folder: With ``config.json``, safetensors and a tokenizer that has a chat template.
        device: ``"auto"`` (CUDA where there is one, else CPU) or a torch device.
        dtype: ``"auto"``, or a name in `valign.models.devices.DTYPES`.
        temperature: In [0, 2]; 0 takes the likeliest token every time.
        top_p: Share of the likeliest tokens to sample from, (0, 1].
        seed: Of every answer's random draws: the same question has the same answer.
        max_tokens: Length of an answer.
    Raises: UserError if the folder is missing, broken, without a chat template, or holds its weights as pickles only.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        temperature: float = 0.0,
        top_p: float = 0.9,
        seed: int = 0,
        max_tokens: int = 256,
    ) -> None:
        check_range("LocalChat.temperature", temperature, low=0.0, high=2.0)
        check_range("LocalChat.top_p", top_p, above=0.0, high=1.0)
        check_range("LocalChat.max_tokens", max_tokens, low=1)
        check_choice("LocalChat.dtype", dtype, ("auto", *DTYPES))
        self.seed, self.max_tokens = seed, max_tokens
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self._options: dict[str, Any] = {"max_new_tokens": max_tokens, **(draws if temperature > 0 else {"do_sample": False})}
        self._lock = Lock()
        loaded = load_chat(folder, device=device, dtype=dtype)
        self.folder, self._model, self._renderer, self._window = loaded.folder, loaded.model, loaded.renderer, loaded.window
        self._options["eos_token_id"] = sorted(self._renderer.stop_ids)
        if self._renderer.tokenizer.pad_token_id is None:
            self._options["pad_token_id"] = self._renderer.tokenizer.eos_token_id

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        """The answer's text, stripped. A schema is not enforced.

        Raises: ChatRefused if the messages and the answer do not fit the model's context; UserError if the answer is empty.
        """
        ids = self._renderer.prompt(messages)
        length = len(ids)
        if self._window is not None and length + self.max_tokens > self._window:
            raise ChatRefused(
                f"The chat model in {self.folder} must have room for {length} tokens and {self.max_tokens} of answer, "
                f"got {self._window}. Ask for less, or lower max_tokens."
            )
        tokens = torch.tensor([ids], device=self._model.device)
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with self._lock, torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(self.seed)
            answer = self._model.generate(tokens, attention_mask=torch.ones_like(tokens), **self._options)
        text = self._renderer.text(answer[0, length:].tolist())
        if not text:
            raise UserError(f"The chat model in {self.folder} sent an empty text. Raise max_tokens, or choose another model.")
        return text
