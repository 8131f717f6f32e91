"""A chat model as something to fine-tune: it learns its answers, and nothing else that stands in a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.checks import UserError, check_choice
from valign.data.chats import Conversation
from valign.files import hash_value
from valign.models.files.tensor_fingerprint import fingerprint_tensors
from valign.models.heads.task_model import NOT_COUNTED, Target, TaskBatch, TaskModel
from valign.models.language.loading import LoadedChat
from valign.models.language.renderer import RenderedChat


@dataclass(frozen=True)
class TokenRow:
    """A row that is ids already, with the mask of what is learnt; a row of a task."""

    ids: tuple[int, ...]
    supervised: tuple[bool, ...]
    turn: tuple[int, ...]  # number of the assistant's turn of each id, from 0; ids before the first turn have 0
    target: ClassVar[None] = None

    @property
    def size(self) -> int:
        return len(self.ids)

    @property
    def content(self) -> str:
        return " ".join(map(str, self.ids))


class ChatTaskModel(TaskModel):
    """``network`` is the causal language model. The loss is the cross-entropy of the answers' tokens and their end marks.

    Chats are rendered by the model's own `ChatRenderer`. One that is too long is refused, or with ``overlong="drop"`` left out and
    counted in ``dropped``: an answer is never cut.

    Args:
        loaded: Its model is changed by training; float32, or bfloat16 with an adapter in float32.
        max_tokens: Of a rendered chat; the model's window, if that is smaller.
        overlong: What becomes of a chat that is longer.
    """

    def __init__(self, loaded: LoadedChat, *, max_tokens: int = 512, overlong: str = "refuse") -> None:
        check_choice("ChatTaskModel.overlong", overlong, ("refuse", "drop"))
        super().__init__(
            loaded.model, Target("chat"), apart=False, fingerprint=fingerprint_tensors(loaded.model.state_dict()), seed=None
        )
        self.renderer, self.folder, self.overlong = loaded.renderer, loaded.folder, overlong
        self.loaded = loaded
        self.max_tokens = min(max_tokens, loaded.window or max_tokens)
        self.requires_grad_(False)

    def fitting(self, rows: Sequence[Conversation], what: str = "row") -> list[Conversation]:
        """Those that fit; each is rendered once here, so that mistakes are found before long work.

        Raises: UserError for one that is too long, unless they are dropped; if none is left; and what `ChatRenderer.chat` refuses.
        """
        sizes = [len(self.renderer.chat(row.messages).ids) for row in rows]
        long = [place for place, size in enumerate(sizes) if size > self.max_tokens]
        if long and self.overlong == "refuse":
            raise UserError(
                f"{what} {long[0] + 1} must have at most {self.max_tokens} tokens, got {sizes[long[0]]} ({len(long)} of "
                f"{len(rows)} are too long). Raise --max-tokens, or leave them out by --overlong drop."
            )
        if len(long) == len(rows):
            raise UserError(f"At least one {what} must have at most {self.max_tokens} tokens, got none. Raise --max-tokens.")
        return [row for place, row in enumerate(rows) if place not in set(long)]

    def tokens(self, row: Conversation | TokenRow) -> TokenRow:
        """The row as ids."""
        return row if isinstance(row, TokenRow) else token_row(self.renderer.chat(row.messages))

    def batch(self, rows: Sequence[Any]) -> TaskBatch:
        known = [self.tokens(row) for row in rows]
        width = max(len(row.ids) for row in known)
        ids = _padded([row.ids for row in known], width, 0)
        mask = _padded([[1] * len(row.ids) for row in known], width, 0)
        taught = _padded([row.supervised for row in known], width, 0).bool()
        taught[:, 0] = False  # the first token has nothing before it
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return TaskBatch(inputs, ids.masked_fill(~taught, NOT_COUNTED).to(self.device), int(taught.sum()))

    def turns(self, rows: Sequence[Any]) -> Int[Tensor, "row token"]:
        """Number of the assistant's turn of each token of `batch`."""
        known = [self.tokens(row) for row in rows]
        return _padded([row.turn for row in known], max(len(row.ids) for row in known), 0).to(self.device)

    def vectors(self, inputs: Mapping[str, Tensor]) -> Float[Tensor, "input width"]:
        raise TypeError("A chat model gives words, not one vector per input.")

    def reading(self) -> dict[str, Any]:
        template = hash_value(self.renderer.tokenizer.chat_template)
        return {"max_tokens": self.max_tokens, "overlong": self.overlong, "template": template}


def token_row(chat: RenderedChat) -> TokenRow:
    """A rendered chat as a row."""
    turn = [0] * len(chat.ids)
    for number, (first, _) in enumerate(chat.turns):
        turn[first:] = [number] * (len(chat.ids) - first)
    return TokenRow(tuple(chat.ids), tuple(chat.supervised), tuple(turn))


def _padded(rows: Sequence[Sequence[int]], width: int, value: int) -> Int[Tensor, "row token"]:
    """On the right: no trained token ever reads what stands there."""
    return torch.tensor([[*map(int, row), *[value] * (width - len(row))] for row in rows])
