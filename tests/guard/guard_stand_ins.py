"""Stages, judges, chat models and detectors that do as they are told and remember that they were asked."""

import zlib
from dataclasses import dataclass, field

import numpy as np

from valign.detectors import DetectorCard
from valign.guard import Verdict

# On all of these the word list of VALOR's released code fires (method card, section 5).
INNOCENT = (
    "a cathedral in Essex",
    "an open document on a desk",
    "a teenage boy reading",
    "women in traditional kimono",
    "full moon over a museum",
    "drinking tea in the library",
)


def with_guard(policy, **changes):
    """The policy with other guard rules."""
    return policy.model_copy(update={"guard": policy.guard.model_copy(update=changes)})


class WordEncoder:
    """A unit vector per text from its words alone; texts that share words are near each other."""

    name = "words"

    def encode(self, texts):
        rows = np.zeros((len(texts), 256), np.float32)
        for row, text in zip(rows, texts):
            for word in text.lower().split():
                row[zlib.crc32(word.encode()) % 256] += 1
            row /= max(float(np.linalg.norm(row)), 1e-9)
        return rows


@dataclass
class StandIn:
    name: str
    level: str
    fires: bool
    calls: list = field(default_factory=list)
    fails_on: str = ""

    def check(self, prompt):
        self.calls.append(self.name)
        if self.fails_on and self.fails_on in prompt:
            raise RuntimeError("out of order")
        norm = {"rule": "party-at-memorial"} if self.level == "value" else {"category": "violence"}
        return Verdict(stage=self.name, level=self.level, outcome="fire" if self.fires else "pass", **norm)

    def check_many(self, prompts):
        return [self.check(prompt) for prompt in prompts]


@dataclass
class Judge:
    intent: str
    calls: list = field(default_factory=list)
    fails: bool = False
    name: str = "judge"
    uses_chat: bool = False

    def judge(self, prompt, findings):
        self.calls.append(self.name)
        if self.fails:
            raise ValueError("no readable answer")
        return Verdict(stage=self.name, level="intention", rule=self.intent)


class Watcher:
    """A detector that flags the images of the given numbers, from 0, in the order in which it sees them."""

    def __init__(self, flags=(), fails=False):
        self.card = DetectorCard(name="watcher", classes=("harm",), threshold=0.5, weights_sha256="0" * 64)
        self.flags, self.fails, self.seen = set(flags), fails, 0

    def detect(self, images):
        if self.fails:
            raise RuntimeError("no detector today")
        rows = [[0.9 if self.seen + i in self.flags else 0.1] for i in range(len(images))]
        self.seen += len(images)
        return np.array(rows)
