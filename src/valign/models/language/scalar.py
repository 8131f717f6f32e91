"""Chat models with one number per token instead of words: reward models, cost models, critics."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from valign.checks import UserError, first_line
from valign.files import atomic_folder, read_json
from valign.models.devices import LOAD_ERRORS
from valign.models.language.chat import Message
from valign.models.language.loading import LoadedChat
from valign.models.language.renderer import ChatRenderer
from valign.randomness import generator_for

HEAD = "score.weight"


@dataclass(frozen=True)
class ScalarChat:
    """A transformers model for sequence classification with one output, whose head gives each token a number."""

    model: Any
    renderer: ChatRenderer

    def values(self, ids: Int[Tensor, "row token"], mask: Int[Tensor, "row token"]) -> Float[Tensor, "row token"]:
        """One number per token, float32."""
        states = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return self.model.score(states)[..., 0].float()

    def scores(self, chats: Sequence[Sequence[Message]]) -> Float[Tensor, " chat"]:
        """The number at the last token of each chat, which ends with an assistant's turn; with gradients where they are on."""
        rows = [self.renderer.chat(chat).ids for chat in chats]
        width, device = max(map(len, rows)), next(self.model.parameters()).device
        ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        return self.values(ids, mask).gather(1, last[:, None])[:, 0]

    @torch.no_grad()
    def scored(self, chats: Sequence[Sequence[Message]], *, batch_size: int = 128) -> Float[Tensor, " chat"]:
        """`scores` in batches, without gradients, in evaluation mode, on the CPU; chats of like length are read together."""
        self.model.eval()
        order = sorted(range(len(chats)), key=lambda place: sum(len(message["content"]) for message in chats[place]))
        found = torch.zeros(len(chats))
        for first in range(0, len(order), batch_size):
            places = order[first : first + batch_size]
            found[places] = self.scores([chats[place] for place in places]).cpu()
        return found

    def save(self, folder: Path) -> None:
        """As a folder that `load_scalar` and transformers load."""
        with atomic_folder(folder, force=True) as temporary:
            self.model.save_pretrained(str(temporary))
            self.renderer.tokenizer.save_pretrained(str(temporary))


def new_scalar(chat: LoadedChat, *, seed: int) -> ScalarChat:
    """The body of a chat model with a fresh head of small random weights.

    Raises: UserError if transformers has no such model of its architecture.
    """
    from transformers import AutoModelForSequenceClassification

    config = chat.model.config.__class__.from_dict(chat.model.config.to_dict() | {"num_labels": 1})
    if config.pad_token_id is None:
        config.pad_token_id = chat.renderer.tokenizer.eos_token_id
    try:
        model = AutoModelForSequenceClassification.from_config(config)
    except LOAD_ERRORS as error:
        raise UserError(f"{chat.folder} must have a scalar form in transformers, got: {first_line(error)}.") from error
    model.base_model.load_state_dict(chat.model.base_model.state_dict())
    with torch.no_grad():
        model.score.weight.normal_(std=0.02, generator=generator_for("scalar head", seed))
    return ScalarChat(model.to(chat.model.device).eval(), chat.renderer)


def load_scalar(folder: str | Path, chat: LoadedChat, *, what: str) -> ScalarChat:
    """A reward or cost model from a folder, for answers of ``chat``.

    Args: what: Such as ``"--cost"``, for messages.
    Raises: UserError if the folder is missing or holds no safetensors, if the model has no scalar head, or another tokenizer.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    path = Path(folder).expanduser()
    files = sorted(path.glob("*.safetensors"))
    if not (path / "config.json").exists() or not files:
        raise UserError(f"{what} must be a folder with config.json and safetensors, got {str(path)!r}. Train one first.")
    shapes = [_head_shape(file) for file in files]
    outputs = next((shape for shape in shapes if shape), None)
    if outputs is None or outputs[0] != 1:
        got = "no head" if outputs is None else f"a head of {outputs[0]} outputs"
        kind = ", ".join(read_json(path / "config.json").get("architectures") or ["an unnamed architecture"])
        raise UserError(
            f"{what} must be a model with a scalar head ({HEAD} of one output), got {kind} with {got} in {path}. "
            "Train one from two preferences, or save it with num_labels=1."
        )
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            path, use_safetensors=True, dtype=torch.float32, local_files_only=True, trust_remote_code=False
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except LOAD_ERRORS as error:
        raise UserError(f"{what} could not be loaded from {path}: {first_line(error)}.") from error
    if tokenizer.get_vocab() != chat.renderer.tokenizer.get_vocab():
        raise UserError(
            f"{what} must read the tokens of {chat.folder}, got a tokenizer of {len(tokenizer)} other tokens in {path}. "
            "Train it from the same model."
        )
    return ScalarChat(model.to(chat.model.device).eval(), chat.renderer)


def _head_shape(file: Path) -> list[int] | None:
    with safe_open(file, framework="pt") as tensors:
        return list(tensors.get_slice(HEAD).get_shape()) if HEAD in tensors.keys() else None  # noqa: SIM118  # no iterator
