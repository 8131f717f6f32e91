"""UnlearnDiffAtk (Zhang et al., ECCV 2024): prefix tokens with which the defended denoiser explains an image of the goal."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from valign.attacks.base import Need, Scope, Search
from valign.attacks.denoising import goal_latents, noised
from valign.attacks.tokens import TypedTokens
from valign.checks import check_options, option
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method
from valign.models.diffusion.soft_prompts import encode_ids, padded_ids

METHOD = Method(
    slug="unlearn-diff-atk",
    title="UnlearnDiffAtk: prefix tokens on the simplex, by the defended denoiser's own noise error",
    paper="arXiv 2310.11868",
    room="attacks",
    entry="valign.attacks.unlearn_diff:UnlearnDiffAtk",
    fidelity="variant",
    note="timesteps are drawn anew for every gradient instead of 40 gradients at each of 50; what is asked is typed text, where "
    "the authors' code passes ids that the text need not give; a guidance is not seen by the gradient",
)
BISECTIONS = 50


@dataclass(frozen=True, kw_only=True)
class UnlearnDiffAtk:
    """Minimizes ``||eps - eps_theta(x_t, prefix + goal)||^2`` over rows of chances on the simplex, sampled with a straight-through
    gradient; their largest entries make the text."""

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    informed: ClassVar[bool] = True

    tokens: int = option(5, help="prefix tokens; 3 to 5 by the authors", low=1)
    steps: int = option(40, help="gradients between two questions, as many as the authors have per timestep", low=1)
    learning_rate: float = option(0.01, help="of Adam", above=0)
    weight_decay: float = option(0.1, help="of Adam", low=0)
    image_steps: int = option(20, help="sampling steps of the goal's image", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        assert scope.white is not None
        model = scope.white.model
        tokens, draw = TypedTokens(model, scope.listed), scope.torch_random()
        given = tokens.of(goal.prompt)
        chances: Float[Tensor, "place word"] = torch.rand((self.tokens, len(tokens.ids)), generator=draw).to(model.device)
        chances = to_simplex(chances).requires_grad_(True)
        optimizer = torch.optim.Adam([chances], lr=self.learning_rate, weight_decay=self.weight_decay)
        for step, one in enumerate(noised(model, goal_latents(goal, scope, self.image_steps), draw), start=1):
            picked = torch.multinomial(chances.detach().cpu().clamp(min=1e-12), 1, generator=draw)[:, 0].to(model.device)
            ids = [*tokens.ids[picked].tolist(), *given]
            with torch.enable_grad():
                hard = torch.nn.functional.one_hot(picked, len(tokens.ids)).float()
                vectors = (hard + chances - chances.detach()) @ tokens.vectors
                read = encode_ids(model, padded_ids(model, [ids]), vectors[None], range(1, self.tokens + 1))
                answer = model.predict(one.latents, one.timestep, read).float()
                loss = (answer - one.answer).square().mean()
                (chances.grad,) = torch.autograd.grad(loss, chances)
            scope.meter.gradients += 1
            optimizer.step()
            with torch.no_grad():
                chances.copy_(to_simplex(chances))
            if step % self.steps == 0 or scope.meter.hurry:
                yield tokens.text([*tokens.ids[chances.argmax(1)].tolist(), *given])


def to_simplex(rows: Float[Tensor, "row word"]) -> Float[Tensor, "row word"]:
    """The nearest row of chances that are at least 0 and sum to 1: ``relu(x - tau)`` with tau found by bisection."""
    with torch.no_grad():
        low, high = rows.min(dim=1, keepdim=True).values - 1, rows.max(dim=1, keepdim=True).values
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = (rows - middle).relu().sum(dim=1, keepdim=True) >= 1
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        found = (rows - low).relu()
        return found / found.sum(dim=1, keepdim=True)
