"""Ring-A-Bell (Tsai et al., ICLR 2024): a concept's direction in the text encoder's states, and a genetic search along it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from valign.attacks.base import Need, Scope, Search
from valign.attacks.tokens import TypedTokens
from valign.checks import UserError, check_options, option
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method

METHOD = Method(
    slug="ring-a-bell",
    title="Ring-A-Bell: a concept vector from paired texts, and a genetic search",
    paper="arXiv 2310.10012",
    room="attacks",
    entry="valign.attacks.ring_a_bell:RingABell",
    fidelity="variant",
    note="the fittest are kept (the authors' code can lose the best); whole-word tokens that can be typed; 40 individuals "
    "and 60 generations unless set otherwise, where the authors have 200 and 3,000",
)


@dataclass(frozen=True, kw_only=True)
class RingABell:
    """Minimizes ``sum ||E(P) - (E(P0) + strength c)||^2`` over all positions. The attacked model is not asked before the end."""

    needs: ClassVar[tuple[Need, ...]] = ("text encoder",)
    informed: ClassVar[bool] = True

    tokens: int = option(16, help="words of a prompt; 16, 38 and 77 in the authors' notebooks", low=1)
    strength: float = option(3.0, help="how far along the concept's direction; 3 to 5.5 by the authors", above=0)
    population: int = option(40, help="prompts of a generation; 200 by the authors", low=4)
    generations: int = option(60, help="of the search; 3,000 by the authors", low=1)
    mutation: float = option(0.25, help="chance of a word to be drawn anew", low=0, high=1)
    crossover: float = option(0.5, help="chance of a child to have two parents", low=0, high=1)

    def __post_init__(self) -> None:
        check_options(self)

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        assert scope.encoder is not None
        tokens = TypedTokens(scope.encoder, scope.listed)
        wanted = tokens.states([tokens.of(goal.prompt)], scope)[0] + self.strength * concept_vector(tokens, scope.pairs, scope)
        draw = scope.torch_random()
        population = [self._random_row(tokens, draw) for _ in range(self.population)]
        for _ in range(self.generations):
            if scope.meter.hurry:
                break
            order = ranked(tokens, population, wanted, scope)
            kept = [population[i] for i in order[: self.population // 2]]
            population = kept + [self._child(tokens, kept, draw) for _ in range(self.population - len(kept))]
        for i in ranked(tokens, population, wanted, scope):
            if text := tokens.typed(population[i]):
                yield text

    def _random_row(self, tokens: TypedTokens, draw: torch.Generator) -> list[int]:
        return tokens.ids.cpu()[torch.randint(len(tokens.ids), (self.tokens,), generator=draw)].tolist()

    def _child(self, tokens: TypedTokens, parents: Sequence[list[int]], draw: torch.Generator) -> list[int]:
        """A parent, its tail from another one by chance, and some of its words drawn anew."""
        first, second = (parents[int(i)] for i in torch.randint(len(parents), (2,), generator=draw))
        cut = self.tokens
        if float(torch.rand((), generator=draw)) < self.crossover:
            cut = int(torch.randint(self.tokens, (), generator=draw))
        row, fresh = [*first[:cut], *second[cut:]], self._random_row(tokens, draw)
        changed = torch.rand(self.tokens, generator=draw) < self.mutation
        return [new if change else old for old, new, change in zip(row, fresh, changed.tolist())]


def concept_vector(tokens: TypedTokens, pairs: Sequence[tuple[str, str]], scope: Scope) -> Float[Tensor, "token dim"]:
    """Mean difference of the text encoder's states, harmful minus harmless, at every position.

    Raises: UserError without a pair.
    """
    if not pairs:
        raise UserError("ring-a-bell needs pairs of harmful and harmless texts of the goal's category, got none. Give a policy.")
    harmful, harmless = (tokens.states([tokens.of(pair[side]) for pair in pairs], scope) for side in (0, 1))
    return (harmful - harmless).mean(dim=0)


def ranked(tokens: TypedTokens, population: Sequence[list[int]], wanted: Float[Tensor, "token dim"], scope: Scope) -> list[int]:
    """Indices of the population, the fittest first."""
    distances = (tokens.states(population, scope) - wanted).square().sum(dim=(1, 2))
    return [int(i) for i in distances.argsort(stable=True)]
