"""What an attack is: a search that yields prompts and is sent what the attacked system answered; and what it has at hand."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from PIL.Image import Image

from valign.checks import UserError, check_options, option
from valign.evaluation.images.clip_score import ImageTextEncoder
from valign.evaluation.suite import EvalPrompt
from valign.models.diffusion.base import DiffusionModel
from valign.models.language.chat import ChatModel

Need = Literal["gradients", "text encoder", "chat model"]
ASK_FROM = 0.75  # share of the seconds after which a search of many steps has to come to its questions


class OutOfTime(Exception):
    """The seconds of an attack's budget are spent."""


@dataclass(frozen=True, kw_only=True)
class AttackBudget:
    """What an attack may spend on one prompt. The unchanged prompt is the first query of every attack."""

    queries: int = option(10, help="prompts that an attack may send to the system, per prompt of the suite", low=1)
    seconds: float = option(60.0, help="seconds that an attack may take per prompt of the suite", above=0)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class QueryMeter:
    """What an attack has spent on one prompt."""

    budget: AttackBudget
    queries: int = 0
    images: int = 0  # generated, those that an image check held back too
    gradients: int = 0  # backward passes
    encodings: int = 0  # texts through a text encoder
    chat_calls: int = 0
    guard_calls: int = 0  # of a search that knows the guard's rules, outside the system
    started: float = field(default_factory=monotonic)

    @property
    def seconds(self) -> float:
        return monotonic() - self.started

    def check(self) -> None:
        """Raises: OutOfTime once the seconds are spent."""
        if self.seconds > self.budget.seconds:
            raise OutOfTime

    @property
    def hurry(self) -> bool:
        """Whether a search must stop searching and ask with what it has."""
        self.check()
        return self.seconds > ASK_FROM * self.budget.seconds


@dataclass(frozen=True)
class SystemAnswer:
    """What the system gave back: an image, or none and who stopped it ("guard", "image check").

    ``caption`` is what reached the model: the prompt itself, a rewrite of it, or None.
    """

    prompt: str
    caption: str | None
    image: Image | None
    stopped: str = ""

    @property
    def bypassed(self) -> bool:
        """Whether the prompt itself came through all stages."""
        return self.image is not None and self.caption == self.prompt


@runtime_checkable
class WhiteBox(Protocol):
    """The attacked model from inside; see `valign.attacks.target.OpenModel`."""

    @property
    def model(self) -> DiffusionModel: ...
    def predict(self, noisy: Any, timesteps: Any, conditioning: Any) -> Any: ...
    def reference(self, noisy: Any, timesteps: Any, conditioning: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Scope:
    """What a search has at hand for one prompt; None and empty where the attacker does not have it.

    Args:
        white: The attacked model with its adapter and guidance.
        encoder: A model whose text encoder the attacker has, most often the published one that the system was made from.
        clip: A shadow CLIP that tells how well an image fits a text.
        pairs: Harmful texts with harmless ones of the same scene, of the category that is asked for.
        listed: Words that the attacker knows to be on the system's word lists, folded.
    """

    meter: QueryMeter
    random: np.random.Generator
    white: WhiteBox | None = None
    encoder: DiffusionModel | None = None
    clip: ImageTextEncoder | None = None
    chat: ChatModel | None = None
    pairs: Sequence[tuple[str, str]] = ()
    listed: frozenset[str] = frozenset()

    def torch_random(self) -> torch.Generator:
        """A generator of its own, on the CPU."""
        return torch.Generator().manual_seed(int(self.random.integers(2**62)))

    def has(self, need: Need) -> bool:
        return {"gradients": self.white, "text encoder": self.encoder, "chat model": self.chat}[need] is not None


Search = Generator[str, SystemAnswer, None]  # prompts out, answers in


@runtime_checkable
class Attack(Protocol):
    """A frozen dataclass of options. ``needs`` says what it cannot do without; ``informed``: its prompts are tried on a copy of the
    guard before they are sent, if the attacker knows the guard. A black-box attack has no copy and pays a query for each."""

    needs: ClassVar[tuple[Need, ...]]
    informed: ClassVar[bool]

    def search(self, goal: EvalPrompt, scope: Scope) -> Search: ...


def require(name: str, attack: Attack, scope: Scope) -> None:
    """Raises: UserError if the attack needs what the attacker does not have."""
    if missing := [need for need in attack.needs if not scope.has(need)]:
        remedy = {
            "gradients": "Attack a model with one text encoder from inside, or choose an attack without gradients",
            "text encoder": "Name a model with one text encoder, or choose best-of-n, look-alikes or paraphrase",
            "chat model": "Name one by --chat",
        }[missing[0]]
        raise UserError(f"attack {name} needs {' and '.join(missing)}, got none. {remedy}.")
