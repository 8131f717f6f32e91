"""How far a model's next-token distributions moved, token by token of an answer: shallow alignment sits in the first few.

``KL_k = sum_v P(v) (log P(v) - log Q(v))`` at the k-th token of an answer, P of the first model and Q of the second, over the whole
vocabulary, both reading the same answer up to there (Qi et al., arXiv 2406.05946, section 2).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, check_range
from valign.evaluation.statistics import Interval, mean_interval
from valign.methods import Method
from valign.models.language.chat import Message
from valign.models.language.loading import LoadedChat
from valign.models.language.renderer import RenderedChat
from valign.progress import track

METHOD = Method(
    slug="kl-profile",
    title="KL divergence by token of the answer: how deep a change of refusals goes",
    paper="arXiv 2406.05946",
    room="evaluation",
    entry="valign.evaluation.chats.kl_profile:kl_profile",
    fidelity="exact",
    note="the probe's formula over the whole vocabulary; the answers are the caller's",
)


@dataclass(frozen=True)
class TokenKl:
    """Mean KL in nats at one token of the answers, from 1 on, over the answers that are so long."""

    token: int
    answers: int
    kl: Interval


def kl_profile(
    first: LoadedChat,
    second: LoadedChat,
    chats: Sequence[Sequence[Message]],
    *,
    depth: int = 20,
    batch_size: int = 16,
    seed: int = 0,
) -> list[TokenKl]:
    """The profile over the first ``depth`` tokens of the last answers, with 95 % intervals over chats.

    Args:
        chats: Each ends with an assistant's answer, which both models read; usually the first model's own.
    Raises: UserError for no chat, or models with different vocabularies.
    """
    check_range("kl_profile.depth", depth, low=1)
    check_range("kl_profile.batch_size", batch_size, low=1)
    if not chats:
        raise UserError("kl_profile.chats must hold answers, got none.")
    sizes = [int(one.model.get_output_embeddings().weight.shape[0]) for one in (first, second)]
    if sizes[0] != sizes[1]:
        raise UserError(f"Both models must have one vocabulary, got {sizes[0]} and {sizes[1]} tokens. Compare models of one base.")
    rendered = [first.renderer.chat(chat) for chat in chats]
    rows: list[np.ndarray] = []
    for start in track(range(0, len(rendered), batch_size), "Comparing tokens"):
        rows += _batch(first, second, rendered[start : start + batch_size], depth)
    found = []
    for token in range(depth):
        values = np.array([row[token] for row in rows if len(row) > token])
        if len(values):
            found.append(TokenKl(token + 1, len(values), mean_interval(values, np.arange(len(values)), seed=seed)))
    return found


@torch.inference_mode()
def _batch(first: LoadedChat, second: LoadedChat, chats: Sequence[RenderedChat], depth: int) -> list[np.ndarray]:
    """KL at the tokens of each chat's last answer, at most ``depth``."""
    width = max(len(chat.ids) for chat in chats)
    ids = torch.tensor([[*chat.ids, *[0] * (width - len(chat.ids))] for chat in chats])
    mask = torch.tensor([[1] * len(chat.ids) + [0] * (width - len(chat.ids)) for chat in chats])
    logs = [_log_probs(one, ids, mask) for one in (first, second)]
    found = []
    for row, chat in enumerate(chats):
        begin, end = chat.turns[-1]
        places = slice(begin - 1, min(end, begin + depth) - 1)  # the distribution of a token is read at the one before it
        found.append(token_kl(logs[0][row, places], logs[1][row, places]).numpy())
    return found


def token_kl(first: Float[Tensor, "token word"], second: Float[Tensor, "token word"]) -> Float[Tensor, " token"]:
    """``KL(first || second)`` of log-probabilities, in nats, not below 0."""
    return (first.exp() * (first - second)).sum(-1).clamp(min=0)


def _log_probs(chat: LoadedChat, ids: Tensor, mask: Tensor) -> Float[Tensor, "row token word"]:
    device = chat.model.device
    return torch.log_softmax(chat.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits.double(), dim=-1).cpu()
