"""A guard's scores of growing answers, as one weight per token of a chat."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError
from valign.data.chats import Conversation
from valign.models.language.chat_task import ChatTaskModel
from valign.objectives.preserving.star_dss import chunk_texts, star_weights
from valign.progress import track
from valign.training.tasks.preserving.data import PartialGuard


def score_chats(
    model: ChatTaskModel, rows: Sequence[Conversation], guard: PartialGuard, *, words: int = 5
) -> dict[str, Float[Tensor, " token"]]:
    """V of every token, by the row's content; each of a chat's answers is scored in chunks of ``words`` words.

    The end mark has the score of the whole answer; tokens of the prompts have a score too, which the mask leaves out.
    Raises: UserError for scores outside [0, 1], or not one per text.
    """
    found = {}
    for row in track(list({row.content: row for row in rows}.values()), "score the answers"):
        found[row.content] = _scored(model, row, guard, words)
    return found


def _scored(model: ChatTaskModel, row: Conversation, guard: PartialGuard, words: int) -> Tensor:
    messages = row.messages
    rendered = model.renderer.chat(messages)
    weights = torch.ones(len(rendered.ids))
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    for place, (first, last) in zip(answers, rendered.turns, strict=True):
        before = messages[:place]
        texts = [text for text, _ in chunk_texts(messages[place]["content"], words)]
        scores = guard([(before, text) for text in texts]).float().cpu()
        if scores.shape != (len(texts),) or not ((scores >= 0) & (scores <= 1)).all():
            raise UserError(f"The guard must give one score in [0, 1] per text, got {scores.tolist()[:4]} for {len(texts)} texts.")
        ends = [_boundary(model, before, text) for text in texts[:-1]]
        boundaries = torch.tensor([*(min(end, last) for end in ends), last])
        weights[first:last] = star_weights(scores, boundaries.cummax(0).values, length=last)[first:]
    return weights


def _boundary(model: ChatTaskModel, before: Sequence[dict[str, str]], text: str) -> int:
    """Tokens of conversation and beginning, without the end mark that a whole answer would have."""
    return model.renderer.chat([*before, {"role": "assistant", "content": text}]).turns[-1][1] - 1
