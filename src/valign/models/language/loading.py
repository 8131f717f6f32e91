"""A chat model from a local folder: safetensors only, no code of the model's own, no network; model and tokenizer must match."""

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from valign.checks import UserError, check_choice, first_line
from valign.models.devices import DTYPES, LOAD_ERRORS, choose_device, choose_dtype
from valign.models.files.adapter_base import chat_record, check_record
from valign.models.files.adapter_index import PEFT_CONFIG, PEFT_WEIGHTS, read_record
from valign.models.language.renderer import ChatRenderer


@dataclass(frozen=True)
class LoadedChat:
    """A causal language model in evaluation mode, and the renderer of its chats."""

    model: Any
    renderer: ChatRenderer
    folder: Path

    @property
    def window(self) -> int | None:
        """How many tokens a chat may have; None if the model does not say."""
        return getattr(self.model.config, "max_position_embeddings", None)


def load_chat(
    folder: str | Path,
    *,
    adapter: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    four_bit: bool = False,
    anyway: bool = False,
) -> LoadedChat:
    """Load a folder with ``config.json``, safetensors and a tokenizer with a chat template.

    Args:
        adapter: Folder of a peft adapter for this model, which is added to its weights; None for none.
        device: ``"auto"`` (CUDA where there is one, else CPU) or a torch device.
        dtype: ``"auto"``, or a name in `valign.models.devices.DTYPES`; with ``four_bit`` that of the products.
        four_bit: Linear layers' weights in 4 bits a number, NF4 with quantized ranges, as QLoRA has them (arXiv 2305.14314), by
            bitsandbytes. They cannot be trained, only adapters on them.
        anyway: Also take an adapter whose record names another model.
    Raises: UserError if the folder is missing, broken, without a chat template, holds its weights as pickles only, or if tokenizer,
        model and adapter do not belong together.
    """
    check_choice("load_chat.dtype", dtype, ("auto", *DTYPES))
    path, place = Path(folder).expanduser(), choose_device(device)
    number = DTYPES[dtype] if dtype != "auto" else choose_dtype(place)
    tokenizer, model = load_causal(path, number, **(_in_four_bits(number, place) if four_bit else {}))
    if not tokenizer.chat_template:
        raise UserError(f"{path} has no chat template, so it is not a chat model. Choose an instruction-tuned model.")
    check_match(tokenizer, model, name=str(path))
    renderer = ChatRenderer(tokenizer, model.generation_config, name=str(path))
    if adapter is not None:
        model = _adapted(model, Path(adapter).expanduser(), path, anyway=anyway)
    return LoadedChat((model if four_bit else model.to(place)).eval(), renderer, path)


def check_match(tokenizer: Any, model: Any, *, name: str) -> None:
    """Refuse a tokenizer whose ids the model has no row for, or that knows the model's end of an answer as an ordinary word.

    Raises: UserError that names both.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"{name}'s tokenizer must have ids below the model's {rows} embeddings, got ids up to {highest}. "
            "Use the tokenizer that the model was trained with, or resize the model's embeddings."
        )
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    for where, config in (("config.json", model.config), ("generation_config.json", model.generation_config)):
        listed = getattr(config, "eos_token_id", None)
        for end in listed if isinstance(listed, Iterable) else [listed]:
            if end is not None and end not in special:
                raise UserError(
                    f"{name}/{where} must have an eos_token_id that is a special token of the tokenizer, got {end} "
                    f"({tokenizer.convert_ids_to_tokens(end) if end <= highest else 'unknown'!r}). "
                    "Use the tokenizer that the model was trained with, or correct the id."
                )


def check_four_bit() -> None:
    """Raises: UserError if bitsandbytes is missing."""
    if find_spec("bitsandbytes") is None:
        raise UserError("A base in 4 bits needs the package bitsandbytes, which is missing. pip install 'valign[eight-bit]'.")


def _in_four_bits(dtype: torch.dtype, place: torch.device) -> dict[str, Any]:
    from transformers import BitsAndBytesConfig

    check_four_bit()
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return {"quantization_config": config, "device_map": {"": place}}


def load_causal(folder: Path, dtype: torch.dtype, **more: Any) -> tuple[Any, Any]:
    """Tokenizer and causal language model of a folder. Raises: UserError if it is missing, broken or without safetensors.

    Args: more: Of transformers' ``from_pretrained``.
    """
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
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, dtype=dtype, **options, **more)
    except LOAD_ERRORS as error:
        raise UserError(f"{folder} could not be loaded: {first_line(error)}. Download or save the model again.") from error
    return tokenizer, model


def check_adapter(adapter: Path, folder: Path, *, anyway: bool = False) -> None:
    """Refuse an adapter whose record names another model than the one in ``folder``, unless ``anyway``; nothing is loaded.

    Raises: UserError for this, and for a folder without an adapter of peft's.
    """
    from safetensors import safe_open

    weights = adapter / PEFT_WEIGHTS
    if not (adapter / PEFT_CONFIG).exists() or not weights.exists():
        raise UserError(f"{adapter} must be a folder with {PEFT_CONFIG} and {weights.name}, got none. Check the path.")
    try:
        with safe_open(weights, framework="pt") as file:
            record = read_record(weights, file.metadata() or {})
    except LOAD_ERRORS as error:
        raise UserError(
            f"{adapter} must be an adapter for the model in {folder}, got: {first_line(error)}. "
            "Name the model that it was made for."
        ) from error
    check_record(adapter, record, chat_record(folder), anyway=anyway)


def _adapted(model: Any, adapter: Path, folder: Path, *, anyway: bool) -> Any:
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    check_adapter(adapter, folder, anyway=anyway)
    weights = adapter / PEFT_WEIGHTS
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
        with safe_open(weights, framework="pt") as file:
            differing = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
    except LOAD_ERRORS as error:
        raise UserError(
            f"{adapter} must be an adapter for the model in {folder}, got: {first_line(error)}. "
            "Name the model that it was made for."
        ) from error
    if differing:  # peft would leave out what does not match, with a warning at most
        raise UserError(
            f"{adapter} must be an adapter for the model in {folder}, got {len(differing)} tensors that stand in only one of them, "
            f"such as {min(differing)}. Name the model that it was made for."
        )
    return adapted.merge_and_unload(safe_merge=True)
