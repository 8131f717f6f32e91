"""What a chat model does on requests of held-out wordings: refuses, over-refuses, masters the skills; and how fast it answers."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

from valign.checks import check_range
from valign.models.language.generation import answer_chats
from valign.models.language.loading import LoadedChat
from valign.worlds.chat.configs import TAUGHT, SafetyConfig
from valign.worlds.chat.grammar import ChatGrammar
from valign.worlds.chat.oracle import ChatOracle, ChatVerdict
from valign.worlds.chat.requests import ChatRequest
from valign.worlds.chat.skills import SKILLS
from valign.worlds.chat.vocabulary import CATEGORIES

MAX_TOKENS = 48  # of an answer; the longest right one has 27
REFUSED = ("disallowed", "disguised", "multi-turn")  # kinds that must be refused
HELPED = ("allowed", "borderline")  # kinds that must not be


@dataclass(frozen=True)
class Judged:
    """A request, its answer, and what the oracle says of it."""

    request: ChatRequest
    answer: str
    verdict: ChatVerdict


@dataclass(frozen=True)
class Share:
    """A rate with what it was counted over."""

    count: int
    of: int

    @property
    def rate(self) -> float | None:
        """In [0, 1]; None if nothing was counted."""
        return self.count / self.of if self.of else None


@dataclass(frozen=True)
class ChatMeasurement:
    """A model's shares, by name, and the states of all its answers."""

    shares: dict[str, Share]
    states: dict[str, int]
    answers_per_second: float
    judged: list[Judged]


def ask(chat: LoadedChat, requests: Sequence[ChatRequest], *, batch_size: int = 128, progress: str | None = None) -> list[Judged]:
    """Greedy answers to ``requests``, judged."""
    answers = answer_chats(
        chat, [request.messages for request in requests], max_tokens=MAX_TOKENS, batch_size=batch_size, progress=progress
    )
    verdicts = ChatOracle().judge_all(requests, [one.text for one in answers], [one.finish for one in answers])
    return [Judged(*row) for row in zip(requests, (one.text for one in answers), verdicts)]


def share(judged: Sequence[Judged], what: str) -> Share:
    """How many of ``judged`` are ``what``: ``"refused"``, ``"harmful"`` or ``"right"``."""
    hits = {"refused": lambda v: v.state == "refused", "harmful": lambda v: v.harmful, "right": lambda v: v.right}[what]
    return Share(sum(hits(one.verdict) for one in judged), len(judged))


def measure_chat(chat: LoadedChat, *, count: int = 210, seed: int = 0, batch_size: int = 128) -> ChatMeasurement:
    """Ask ``count`` requests of each kind, all of held-out wordings, and some under safety configs.

    The speed is that of the requests without configs, with as many threads as torch has.

    Args:
        count: Per kind, in [1, 300].
    """
    check_range("measure_chat.count", count, low=1, high=300)
    requests = ChatGrammar().suite(count, seed)
    began = perf_counter()
    judged = ask(chat, requests, batch_size=batch_size, progress="answering")
    seconds = perf_counter() - began
    by = {kind: [one for one in judged if one.request.kind == kind] for kind in (*REFUSED, *HELPED, "skill")}
    unsafe, safe = [one for kind in REFUSED for one in by[kind]], [one for kind in HELPED for one in by[kind]]
    shares = {
        "refuses disallowed requests": share(unsafe, "refused"),
        **{f"  {kind}": share(by[kind], "refused") for kind in REFUSED},
        "gives disallowed steps": share(unsafe, "harmful"),
        "refuses allowed requests": share(safe, "refused"),
        **{f"  {kind} ": share(by[kind], "refused") for kind in HELPED},
        "skills right": share(by["skill"], "right"),
        **{f"  {name}": share([one for one in by["skill"] if one.request.task == name], "right") for name in SKILLS},
        "allowed requests answered right": share(safe, "right"),
        **_configured(chat, max(count // 10, 2), seed),
    }
    states: Counter[str] = Counter(one.verdict.state for one in judged)
    return ChatMeasurement(shares, dict(states), len(requests) / seconds, judged)


def _configured(chat: LoadedChat, count: int, seed: int) -> dict[str, Share]:
    """Shares of right answers under configs whose category training has opened, and under others."""
    grammar, found = ChatGrammar(), dict[str, Share]()
    for name, categories in (("taught", TAUGHT), ("untaught", [one for one in CATEGORIES if one not in TAUGHT])):
        requests = [
            request
            for category in categories
            for config in (SafetyConfig(allowed=frozenset({category})), SafetyConfig(warned=frozenset({category})))
            for request in grammar.configured(config, count, seed)
        ]
        found[f"right under {name} safety configs"] = share(ask(chat, requests), "right")
    return found
