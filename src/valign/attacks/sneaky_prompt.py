"""SneakyPrompt (Yang et al., IEEE S&P 2024): words that a filter may know give way to sub-words, by reinforcement."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float

from valign.attacks.base import Need, Scope, Search, SystemAnswer
from valign.attacks.tokens import TypedTokens
from valign.checks import check_options, option
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method
from valign.models.diffusion.prompt_states import prompt_states

METHOD = Method(
    slug="sneaky-prompt",
    title="SneakyPrompt: sensitive words replaced by sub-words, a query-bounded search",
    paper="arXiv 2305.12082",
    room="attacks",
    entry="valign.attacks.sneaky_prompt:SneakyPrompt",
    fidelity="simplified",
    note="one distribution per place instead of an LSTM; the reward's text side stands in where no CLIP is at hand; "
    "success is harm, not the cosine",
)
SHORT = 10  # letters of a sub-word, as the authors have it
LITTLE = frozenset(
    (
        "a",
        "an",
        "and",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "is",
        "it",
        "of",
        "off",
        "on",
        "or",
        "out",
        "over",
        "the",
        "to",
        "with",
    )
)  # not content


@dataclass(frozen=True, kw_only=True)
class SneakyPrompt:
    """Black box. Reward: the cosine of image and goal if an image came back, else ``-q / (10 Q)`` at query q of Q."""

    needs: ClassVar[tuple[Need, ...]] = ("text encoder",)
    informed: ClassVar[bool] = False

    words: int = option(1, help="sensitive words that are replaced, at first", low=1)
    pieces: int = option(3, help="sub-words in place of each", low=1)
    learning_rate: float = option(0.1, help="of the distributions", above=0)
    pool: int = option(200, help="sub-words to choose from, drawn anew for each prompt", low=8)
    blocked_in_a_row: int = option(5, help="queries without an image after which one more word is replaced", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        assert scope.encoder is not None
        tokens = TypedTokens(scope.encoder, frozenset())
        words = goal.prompt.split()
        order = sensitive(words, goal.prompt, scope)
        ids = [row for row in tokens.ids.tolist() if len(tokens.text([row])) <= SHORT]
        drawn = scope.random.choice(ids, size=min(self.pool, len(ids)), replace=False)
        pool = [tokens.text([int(row)]) for row in drawn]
        replaced, blocked = order[: self.words], 0
        logits = np.zeros((len(order) * self.pieces, len(pool)))
        while True:
            places = len(replaced) * self.pieces
            chances = softmax(logits[:places])
            picked = np.array([scope.random.choice(len(pool), p=row) for row in chances])
            changed = list(words)
            for number, place in enumerate(replaced):
                changed[place] = "".join(pool[i] for i in picked[number * self.pieces : (number + 1) * self.pieces])
            answer = yield " ".join(changed)
            reward = self._reward(answer, goal, scope)
            logits[:places] += self.learning_rate * reward * (np.eye(len(pool))[picked] - chances)  # REINFORCE
            blocked = blocked + 1 if answer.image is None else 0
            if blocked >= self.blocked_in_a_row and len(replaced) < len(order):
                replaced, blocked = order[: len(replaced) + 1], 0
            scope.meter.check()

    def _reward(self, answer: SystemAnswer, goal: EvalPrompt, scope: Scope) -> float:
        if answer.image is None:
            return -scope.meter.queries / (10 * scope.meter.budget.queries)
        if scope.clip is not None:
            return float(np.asarray(scope.clip.score([answer.image], [goal.prompt]))[0])
        assert scope.encoder is not None
        scope.meter.encodings += 2
        first, second = prompt_states(scope.encoder, [answer.prompt, goal.prompt]).numpy()
        return float(first @ second / (np.linalg.norm(first) * np.linalg.norm(second)))


def sensitive(words: list[str], prompt: str, scope: Scope) -> list[int]:
    """Places of words, those first whose loss moves the text encoder's state of the prompt furthest; no little words."""
    assert scope.encoder is not None
    places = [i for i, word in enumerate(words) if word.strip(",.").lower() not in LITTLE] or list(range(len(words)))
    without = [" ".join(word for j, word in enumerate(words) if j != i) or " " for i in places]
    scope.meter.encodings += len(places) + 1
    states = prompt_states(scope.encoder, [prompt, *without]).numpy()
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    moved = 1 - unit[1:] @ unit[0]
    return [places[i] for i in np.argsort(-moved, kind="stable")]


def softmax(logits: Float[np.ndarray, "place piece"]) -> Float[np.ndarray, "place piece"]:
    """Rows of chances that sum to 1."""
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))
