"""MMA-Diffusion, text side (Yang et al., CVPR 2024): a string without listed words whose text vector is that of the goal."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from valign.attacks.base import Need, Scope, Search
from valign.attacks.tokens import TypedTokens
from valign.checks import check_options, option
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method
from valign.models.diffusion.soft_prompts import encode_ids, padded_ids, token_vectors

METHOD = Method(
    slug="mma",
    title="MMA-Diffusion, text side: a string with the goal's text vector, by greedy coordinate gradients",
    paper="arXiv 2311.17516",
    room="attacks",
    entry="valign.attacks.mma:MMA",
    fidelity="variant",
    note="gradients and edits are of the same places (the authors' code is one off); whole-word tokens; fewer steps; written from "
    "the paper alone, whose code may not be reused",
)


@dataclass(frozen=True, kw_only=True)
class MMA:
    """Maximizes the cosine of the states at the end marker. The attacked model is not asked before the string is found."""

    needs: ClassVar[tuple[Need, ...]] = ("text encoder",)
    informed: ClassVar[bool] = True

    tokens: int = option(12, help="words of the string; the authors have 20", low=1)
    steps: int = option(40, help="greedy steps before the first question; the authors have 500 to 1,000", low=1)
    between: int = option(5, help="further steps between two questions", low=1)
    candidates: int = option(48, help="strings that are tried per step; the authors have 512", low=1)
    top: int = option(32, help="words of the steepest gradient per place; the authors have 256", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        assert scope.encoder is not None
        tokens = TypedTokens(scope.encoder, scope.listed)
        wanted = _end_state(tokens, tokens.of(goal.prompt), scope)
        draw = scope.torch_random()
        best = tokens.ids.cpu()[torch.randint(len(tokens.ids), (self.tokens,), generator=draw)].tolist()
        score, steps = float("-inf"), self.steps
        while True:
            for _ in range(steps):
                if scope.meter.hurry:
                    break
                rows = self._neighbours(tokens, best, wanted, draw, scope)
                cosines = torch.nn.functional.cosine_similarity(_end_states(tokens, rows, scope), wanted[None], dim=1)
                at = int(cosines.argmax())
                if float(cosines[at]) > score:
                    best, score = rows[at], float(cosines[at])
            steps = self.between
            yield tokens.text(best)

    def _neighbours(
        self, tokens: TypedTokens, ids: list[int], wanted: Float[Tensor, " dim"], draw: torch.Generator, scope: Scope
    ) -> list[list[int]]:
        """Strings with one word changed, of the words along which the cosine grows fastest; only such as can be typed."""
        slopes = gradient(tokens, ids, wanted, scope)
        best = (slopes @ tokens.vectors.T).topk(min(self.top, len(tokens.ids)), dim=1).indices
        rows = []
        for _ in range(self.candidates):
            place = int(torch.randint(len(ids), (), generator=draw))
            word = int(tokens.ids[best[place, int(torch.randint(best.shape[1], (), generator=draw))]])
            row = [*ids[:place], word, *ids[place + 1 :]]
            if tokens.typed(row):
                rows.append(row)
        return rows or [ids]


def gradient(tokens: TypedTokens, ids: list[int], wanted: Float[Tensor, " dim"], scope: Scope) -> Float[Tensor, "place dim"]:
    """Of the cosine with ``wanted`` by the input vector of each token of ``ids``: row i belongs to token i."""
    model = tokens.model
    rows: Int[Tensor, "row token"] = padded_ids(model, [ids])
    vectors = token_vectors(model)[ids][None].float().requires_grad_(True)
    with torch.enable_grad():
        states = encode_ids(model, rows, vectors, range(1, len(ids) + 1)).embeds.float()
        cosine = torch.nn.functional.cosine_similarity(states[0, tokens.end(ids)], wanted, dim=0)
        (found,) = torch.autograd.grad(cosine, vectors)
    scope.meter.gradients += 1
    return found[0]


def _end_states(tokens: TypedTokens, rows: list[list[int]], scope: Scope) -> Float[Tensor, "row dim"]:
    states = tokens.states(rows, scope)
    return states[torch.arange(len(rows)), torch.tensor([tokens.end(row) for row in rows])]


def _end_state(tokens: TypedTokens, ids: list[int], scope: Scope) -> Float[Tensor, " dim"]:
    return _end_states(tokens, [ids], scope)[0]
