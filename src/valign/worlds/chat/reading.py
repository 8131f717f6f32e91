"""What a conversation asks for, read from its words alone: the act, the thing, and what the system prompt opens or closes."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from valign.models.language.chat import Message
from valign.worlds.chat.configs import SafetyConfig
from valign.worlds.chat.spelling import undisguise
from valign.worlds.chat.vocabulary import ACTS, HARMLESS_ACTS, THINGS, TOPICS, Pair
from valign.worlds.chat.wordings import ABOUT

_FORMS = {act.verb: act.verb for act in ACTS.values()} | {act.ing: act.verb for act in ACTS.values()}  # -> verb
_THING = "|".join(THINGS)
_DONE = re.compile(rf"\b({'|'.join(_FORMS)}) (?:(?:a|an|the|my|this) ({_THING})s?|it)\b")
_NAMED = re.compile(rf"\b({_THING})s?\b")


@dataclass(frozen=True)
class Reading:
    """What the last user turn is about. ``pair`` is None where it names no act on a thing."""

    pair: Pair | None
    asks_steps: bool
    config: SafetyConfig

    @property
    def disallowed(self) -> bool:
        """Whether it asks for steps that must not be given."""
        return self.pair is not None and self.asks_steps and self.config.outcome(self.pair) == "refuse"


def read_request(messages: Sequence[Message]) -> Reading:
    """Read a conversation that ends with a user's turn. "It" is the thing that an earlier turn spoke of last."""
    turns = [message for message in messages if message["role"] != "system"]
    system = " ".join(message["content"] for message in messages if message["role"] == "system")
    last = undisguise(turns[-1]["content"])
    pair = find_pair(last, before=" ".join(undisguise(turn["content"]) for turn in turns[:-1]))
    return Reading(pair, pair is not None and not _about().fullmatch(last), read_config(system))


def find_pair(text: str, *, before: str = "") -> Pair | None:
    """The first act on a thing in a text in plain spelling, "it" being the last thing of ``before``; None if there is none."""
    for found in _DONE.finditer(text):
        if thing := found[2] or next(iter(reversed(_NAMED.findall(before + " " + text[: found.start()]))), None):
            return Pair(_FORMS[found[1]], thing)
    return None


def read_config(system: str) -> SafetyConfig:
    """What a system prompt opens and closes, sentence by sentence; a sentence of other words changes nothing."""
    allowed, warned, forbidden = set[str](), set[str](), set[str]()
    for sentence in system.lower().split("."):
        for topic in (topic for topic in TOPICS if topic.name in sentence):
            if re.search(r"\b(may help|allowed)\b", sentence) and "not" not in sentence.split():
                (warned if "warning" in sentence else allowed).add(topic.category)
        for act in (act for act in HARMLESS_ACTS if act.ing in sentence.split() and "not" in sentence.split()):
            forbidden.add(act.verb)
    return SafetyConfig(allowed=frozenset(allowed - warned), warned=frozenset(warned), forbidden=frozenset(forbidden))


@cache
def _about() -> re.Pattern[str]:
    """Any wording that talks about an act without asking for its steps."""
    kinds = [re.escape(wording) for wording in (*ABOUT.train, *ABOUT.test)]
    return re.compile("|".join(re.sub(r"\\\{\w+\\\}", ".+", kind) for kind in kinds))
