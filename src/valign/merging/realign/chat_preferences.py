"""Safety preferences of a chat model: pairs of a safe and an unsafe answer, scored under weights that are handed in."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from valign.checks import UserError
from valign.data.chats import ChatPair
from valign.files import hash_value
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import LoadedChat
from valign.objectives import AnswerTokens


class ChatPreferences:
    """The pairs as ids, and the model at the fine-tunings' start; `valign.merging.realign.somf.SafetyPreferences`.

    Args:
        chat: In float32; its weights are never changed.
        pairs: With the same conversation before both answers.
    Raises: UserError for fewer than 2 pairs, or a chat that is too long.
    """

    def __init__(self, chat: LoadedChat, pairs: Sequence[ChatPair], *, max_tokens: int = 512) -> None:
        if len(pairs) < 2:
            raise UserError(f"Safety preferences must be at least 2 pairs, got {len(pairs)}. Give more.")
        self.model = ChatTaskModel(chat, max_tokens=max_tokens)
        for side in ("safe", "unsafe"):
            self.model.fitting([getattr(pair, side) for pair in pairs], f"{side} answer of pair")
        self.pairs = tuple(pairs)
        self.network: nn.Module = self.model.network.eval()

    def __len__(self) -> int:
        return len(self.pairs)

    def fingerprint(self) -> str:
        return hash_value([[pair.safe.messages, pair.unsafe.messages] for pair in self.pairs])

    def score(self, places: Sequence[int], weights: Mapping[str, Tensor], draw: int) -> Float[Tensor, "pair 2"]:
        """Log-likelihoods of the answers; there is no noise, so ``draw`` does not count."""
        chosen = [self.pairs[place] for place in places]
        batch = self.model.batch([pair.safe for pair in chosen] + [pair.unsafe for pair in chosen])
        logits = functional_call(self.network, dict(weights), kwargs={**batch.inputs, "use_cache": False}).logits
        told = AnswerTokens.of(logits, batch.target).log_probs.sum(1)
        return torch.stack(told.chunk(2), dim=1)
