"""What a realignment is to the table `REALIGN`: a frozen dataclass that looks at all weights, then changes one at a time."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from valign.checks import UserError, check_options, option, refuse_idle
from valign.files import hash_file
from valign.merging.deltas import Delta
from valign.merging.realign.fuse import FUSES, Fuse, fused
from valign.merging.realign.vectors import WEIGHT, Vectors, WeightVectors

Change = Callable[[WeightVectors], Delta]  # of one weight: realigned - start
EMBEDDING = re.compile(r"embed_\w+|\w*embeddings?|wte|wpe|lm_head|shared")  # the module that holds the weight


@dataclass(frozen=True, kw_only=True)
class RealignContext:
    """What a realignment gets besides vectors and options, and where it leaves what the caller may want to see."""

    folder: Path | None = None  # for what a long preparation keeps, so that it resumes
    objective: Any = None  # a `SafetyPreferences`, for a method with `RealignMethod.learns`
    results: MutableMapping[str, Any] = field(default_factory=dict)  # filled: JSON-able findings


@dataclass(frozen=True, kw_only=True)
class RealignMethod(ABC):
    """A realignment and its options. The first line of a subclass's docstring is the help of its command.

    Every subclass has ``strength``; at 0 the result is the (fused) fine-tuned model itself.
    """

    fuse: Fuse = option("none", help="how several fine-tuned models become one")
    fuse_scale: float | None = option(
        None, help="factor on the fused change; default: 1 for mean, 0.4 for ties, 0.3 otherwise", needs={"fuse": tuple(FUSES)}
    )

    uses_safety: ClassVar[bool] = True  # it reads the safety vector
    adds_safety: ClassVar[bool] = False  # it also changes weights that no fine-tuning touched
    learns: ClassVar[bool] = False  # needs an objective
    example: ClassVar[str] = ""  # arguments, for the help

    strength: float

    def __post_init__(self) -> None:
        check_options(self)
        refuse_idle(self)

    @abstractmethod
    def prepare(self, vectors: Vectors, context: RealignContext) -> Change:
        """Look at all weights, check everything, and return the function that changes one."""

    def fused(self, models: tuple[str, ...], at: WeightVectors) -> Delta:
        """The task vectors of one weight as one."""
        return fused(self.fuse, self.fuse_scale, at.name, models, at.tasks)

    def check_models(self, vectors: Vectors) -> None:
        """Raises: UserError if there are several fine-tuned models and it was not said how they become one."""
        if len(vectors.models) > 1 and self.fuse == "none":
            raise UserError(
                f"{type(self).__name__} must know how {len(vectors.models)} fine-tuned models become one, got fuse 'none'. "
                "Set --fuse mean, task-arithmetic, ties or dare."
            )

    def record(self) -> dict[str, Any]:
        """All options; JSON-able, a file by its hash."""
        found = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: hash_file(value) if isinstance(value, Path) else value for name, value in found.items()}


def is_embedding(name: str) -> bool:
    """Whether a weight is that of input or output embeddings, by its name."""
    return bool(EMBEDDING.fullmatch(name.removesuffix(WEIGHT).rpartition(".")[2]))


def no_safety(who: str) -> UserError:
    """The mistake of an aligned model that is its base."""
    return UserError(
        f"{who} must have an aligned model that differs from the base, got the same weights in both. "
        "Name the model before and the model after its safety training."
    )
