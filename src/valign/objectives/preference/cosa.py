"""Preferences that follow a safety config: the error of an answer, and which of two answers is preferred (CoSAlign)."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import numpy as np

from valign.checks import UserError, check_options, option
from valign.data.chats.judged_answers import ResponseLabel
from valign.methods import Method

METHOD = Method(
    slug="cosa",
    title="CoSAlign: answers that follow the safety config in the system prompt, by preferences from an error score",
    paper="arXiv 2410.08968",
    room="objectives",
    entry="valign.objectives.preference.cosa:ConfigError",
    fidelity="exact",
    note="config sampler, error score, pairs and CoSA-Score as the released code; categories are sets of ids; "
    "SFT shows the best answers alone",
)

OTHER = "other-harms"  # never allowed by any config
TOLERANCE = 1e-9  # of two error scores, which are sums of floats


class ConfigPair(NamedTuple):
    """Two answers to one prompt under one config."""

    chosen: str
    rejected: str
    chosen_error: float
    rejected_error: float


@dataclass(frozen=True, kw_only=True)
class ConfigError:
    """``gamma (1 - addressed) + alpha |R in A| + beta |R not in A|``: the error of an answer with risks R under allowed risks A.

    Raises: ValueError for a negative weight, or unless ``alpha < gamma < beta``: a forbidden risk is far worse than no answer, and
        a risk that is allowed costs a little.
    """

    alpha: float = option(0.1, help="of an allowed risk", low=0)
    beta: float = option(3.0, help="of a forbidden risk", low=0)
    gamma: float = option(1.0, help="of an answer that does not do what was asked", low=0)

    def __post_init__(self) -> None:
        check_options(self)
        if not self.alpha < self.gamma < self.beta:
            raise ValueError(
                f"ConfigError must have alpha < gamma < beta, got {self.alpha:g}, {self.gamma:g}, {self.beta:g}. "
                "A forbidden risk must cost more than a refusal, and that more than an allowed one."
            )

    def __call__(self, allowed: Collection[str], label: ResponseLabel, known: Collection[str]) -> float:
        """Args: known: The categories that a config may name; a risk of another name counts as one `OTHER`."""
        check_allowed(allowed, known)
        risks = {risk if risk in known else OTHER for risk in label.risks}
        inside = len(risks & set(allowed))
        return self.gamma * (not label.addressed) + self.alpha * inside + self.beta * (len(risks) - inside)

    def pairs(
        self,
        allowed: Collection[str],
        answers: Mapping[ResponseLabel, Sequence[str]],
        known: Collection[str],
        draw: np.random.Generator,
    ) -> list[ConfigPair]:
        """The preferred of each two labels, with an answer of each drawn by ``draw``.

        Labels of equal error say nothing. An answer with an error of beta or more, which breaks the config, is never preferred.
        """
        found = []
        for one, other in combinations(answers, 2):
            errors = self(allowed, one, known), self(allowed, other, known)
            if abs(errors[0] - errors[1]) <= TOLERANCE or min(errors) >= self.beta - TOLERANCE:
                continue
            better, worse = (one, other) if errors[0] < errors[1] else (other, one)
            chosen, rejected = (answers[label][int(draw.integers(len(answers[label])))] for label in (better, worse))
            found.append(ConfigPair(chosen, rejected, min(errors), max(errors)))
        return found


def check_allowed(allowed: Collection[str], known: Collection[str]) -> None:
    """Refuse a config that names an unknown category, or one that is never open. Raises: UserError."""
    if OTHER in allowed:
        raise UserError(f"A safety config must not allow {OTHER}: it is never open. Leave it out.")
    if unknown := sorted(set(allowed) - set(known)):
        raise UserError(f"A safety config must name categories of {', '.join(sorted(known))}; got {', '.join(unknown)}.")
