"""A chat model from a local folder, through transformers: safetensors only, no code of the model's own, no network."""

from pathlib import Path
from threading import Lock
from typing import Any

import torch

from valign.checks import UserError, check_choice, check_range
from valign.models.devices import DTYPES, LOAD_ERRORS, choose_device, choose_dtype, first_line
from valign.models.language.chat import ChatRefused, Message, Schema


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
        self.folder, self.seed, self.max_tokens = Path(folder).expanduser(), seed, max_tokens
        draws = {"do_sample": True, "temperature": temperature, "top_p": top_p}
        self._options: dict[str, Any] = {"max_new_tokens": max_tokens, **(draws if temperature > 0 else {"do_sample": False})}
        self._lock = Lock()
        place = choose_device(device)
        self._tokenizer, model = _load(self.folder, DTYPES[dtype] if dtype != "auto" else choose_dtype(place))
        self._model = model.to(place).eval()
        if self._tokenizer.pad_token_id is None:
            self._options["pad_token_id"] = self._tokenizer.eos_token_id
        known = {*self._tokenizer.all_special_tokens, *self._tokenizer.get_added_vocab()}
        self._markers = sorted(marker for marker in known if len(marker) > 1 and len(marker.split()) == 1)

    def complete(self, messages: list[Message], *, schema: Schema | None = None) -> str:
        """The answer's text, stripped. A schema is not enforced.

        Raises: ChatRefused if the messages and the answer do not fit the model's context; UserError if the answer is empty.
        """
        plain = [message | {"content": self.without_markers(message["content"])} for message in messages]
        tokens = self._tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        length = tokens["input_ids"].shape[1]
        limit = getattr(self._model.config, "max_position_embeddings", None)
        if limit is not None and length + self.max_tokens > limit:
            raise ChatRefused(
                f"The chat model in {self.folder} must have room for {length} tokens and {self.max_tokens} of answer, got {limit}. "
                "Ask for less, or lower max_tokens."
            )
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        with self._lock, torch.random.fork_rng(devices), torch.inference_mode():
            torch.manual_seed(self.seed)
            answer = self._model.generate(**tokens.to(self._model.device), **self._options)
        text = self._tokenizer.decode(answer[0, length:], skip_special_tokens=True).strip()
        if not text:
            raise UserError(f"The chat model in {self.folder} sent an empty text. Raise max_tokens, or choose another model.")
        return str(text)

    def without_markers(self, text: str) -> str:
        """The text with every marker of the template ("<|im_end|>") broken up, so that no message can pretend to be another."""
        for marker in self._markers:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
        return text


def _load(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    if not (folder / "config.json").exists():
        raise UserError(
            f"{folder} must be a folder with config.json, safetensors and a tokenizer, got none. Download the model first."
        )
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"{folder} has no safetensors file, and pickles are never opened. Save the model as safetensors where you trust it."
        )
    logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **options)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} could not be loaded: {first_line(error)}. Download or save the model again.") from error
    if not tokenizer.chat_template:
        raise UserError(f"{folder} has no chat template, so it is not a chat model. Choose an instruction-tuned model.")
    return tokenizer, model
