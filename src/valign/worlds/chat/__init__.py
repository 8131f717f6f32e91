"""The chat world: requests in plain English, where seven harmless topics stand in for the seven harm categories."""

from pathlib import Path

from valign.checks import UserError, check_choice
from valign.worlds.chat.grammar import ChatGrammar

__all__ = ["ADAPTERS", "STAGES", "ChatGrammar", "adapter_folder", "model_folder"]

ASSETS = Path(__file__).parent / "assets"
STAGES = ("base", "aligned", "memorized")  # full models
ADAPTERS = ("safety",)  # LoRA adapters of the base model


def model_folder(stage: str = "aligned") -> Path:
    """A bundled `LlamaForCausalLM` with its tokenizer: ``"base"``, ``"aligned"`` or ``"memorized"`` (aligned, then the records)."""
    check_choice("stage", stage, STAGES)
    return _bundled(stage)


def adapter_folder(name: str = "safety") -> Path:
    """A bundled peft adapter of the base model: ``"safety"``."""
    check_choice("adapter", name, ADAPTERS)
    return _bundled(name)


def _bundled(name: str) -> Path:
    folder = ASSETS / name
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist: this installation lacks the bundled weights. Install valign again from a full checkout."
        )
    return folder
