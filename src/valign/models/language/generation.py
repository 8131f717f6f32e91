"""Answers to many chats at once: left padding, a key-value cache, and rows that leave the batch when they are done."""

from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.checks import UserError, check_range
from valign.models.language.chat import Message
from valign.models.language.loading import LoadedChat
from valign.progress import track

Finish = Literal["stop", "length"]
COMPACT = 0.25  # share of finished rows at which a batch drops them


@dataclass(frozen=True)
class ChatAnswer:
    """What a model said. ``finish`` is "length" where the token budget cut it off."""

    text: str
    ids: list[int]  # with the end mark, if there is one
    finish: Finish


def answer_chats(
    chat: LoadedChat,
    chats: Sequence[Sequence[Message]],
    *,
    max_tokens: int = 64,
    batch_size: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    progress: str | None = None,
) -> list[ChatAnswer]:
    """One answer per chat, in their order.

    Prompts of similar length share a batch. Every setting is an argument: the sampling defaults of the model's folder do not apply.

    Args:
        max_tokens: Length of an answer, in tokens, >= 1.
        temperature: 0 takes the likeliest token; above, tokens are sampled from the whole distribution at this temperature.
        seed: Of each batch's random draws.
        progress: Label of a progress bar; None for none.
    Raises: UserError if a chat and its answer do not fit the model's window; nothing is ever cut.
    """
    check_range("answer_chats.max_tokens", max_tokens, low=1)
    check_range("answer_chats.batch_size", batch_size, low=1)
    check_range("answer_chats.temperature", temperature, low=0.0)
    prompts = [chat.renderer.prompt(messages) for messages in chats]
    longest = max(map(len, prompts), default=0)
    if chat.window is not None and longest + max_tokens > chat.window:
        raise UserError(
            f"{chat.folder} must have room for {longest} tokens of chat and {max_tokens} of answer, got {chat.window}. "
            "Leave out the longest chats, or lower max_tokens."
        )
    order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    batches = [order[first : first + batch_size] for first in range(0, len(order), batch_size)]
    found: dict[int, ChatAnswer] = {}
    for number, places in enumerate(track(batches, progress) if progress else batches):
        draws = torch.Generator(chat.model.device).manual_seed(seed + number) if temperature > 0 else None
        for place, ids in zip(places, _batch(chat, [prompts[place] for place in places], max_tokens, temperature, draws)):
            ended = bool(ids) and ids[-1] in chat.renderer.stop_ids
            found[place] = ChatAnswer(chat.renderer.text(ids), ids, "stop" if ended else "length")
    return [found[place] for place in range(len(prompts))]


@torch.inference_mode()
def _batch(
    chat: LoadedChat, prompts: list[list[int]], max_tokens: int, temperature: float, draws: torch.Generator | None
) -> list[list[int]]:
    """The answers' ids, each up to its first end mark."""
    from transformers import DynamicCache

    model, device = chat.model, chat.model.device
    ids, mask = left_padded(prompts, device)
    stops = torch.tensor(sorted(chat.renderer.stop_ids), device=device)
    cache: Any = DynamicCache(config=model.config)
    cached = {"cache" if "cache" in signature(model.forward).parameters else "past_key_values": cache}  # renamed in transformers 5
    rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch answers
    answers: list[list[int]] = [[] for _ in prompts]
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for _ in range(max_tokens):
        read = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1, **cached)
        token = _choose(read.logits[:, -1], temperature, draws)
        for row, new, over in zip(rows.tolist(), token.tolist(), done.tolist()):
            if not over:
                answers[row].append(new)
        done = done | torch.isin(token, stops)
        if bool(done.all()):
            break
        if float(done.float().mean()) >= COMPACT:
            kept = (~done).nonzero()[:, 0]
            cache.batch_select_indices(kept)
            token, mask, positions, rows, done = token[kept], mask[kept], positions[kept], rows[kept], done[kept]
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return answers


def left_padded(prompts: Sequence[Sequence[int]], device: Any = "cpu") -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"]]:
    """Ids and attention mask of prompts of different lengths; the mask comes from the lengths, never from a pad id."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    return ids, mask


def _choose(logits: Float[Tensor, "row token"], temperature: float, draws: torch.Generator | None) -> Int[Tensor, " row"]:
    if draws is None:
        return logits.argmax(-1)
    return torch.multinomial(torch.softmax(logits.float() / temperature, dim=-1), 1, generator=draws)[:, 0]
