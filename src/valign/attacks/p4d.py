"""P4D (Chin et al., ICML 2024): tokens with which the defended denoiser answers as the published one does to the goal."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.attacks.base import Need, Scope, Search
from valign.attacks.denoising import goal_latents, noised
from valign.attacks.tokens import TypedTokens
from valign.checks import check_options, option
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method
from valign.models.diffusion.soft_prompts import encode_ids, padded_ids, token_vectors

METHOD = Method(
    slug="p4d",
    title="P4D: tokens optimized until the defended denoiser answers as the published one",
    paper="arXiv 2309.06135",
    room="attacks",
    entry="valign.attacks.p4d:P4D",
    fidelity="variant",
    note="whole-word tokens; the question is whether the image is harmful instead of how alike it is; 100 steps before the first "
    "question unless set otherwise, where the authors have 3,000 with a look every 50",
)


@dataclass(frozen=True, kw_only=True)
class P4D:
    """Minimizes the mean squared difference of the two answers on one noisy latent; soft tokens, projected to the nearest word
    (PEZ) wherever the loss is taken. ``n``: free tokens alone; ``k``: one after every ``every`` tokens of the goal."""

    needs: ClassVar[tuple[Need, ...]] = ("gradients",)
    informed: ClassVar[bool] = True

    layout: Literal["n", "k"] = option("n", help="n: free tokens; k: the goal's own with free ones between")
    tokens: int = option(16, help="free tokens of layout n", low=1, needs={"layout": ("n",)})
    every: int = option(3, help="tokens of the goal between two free ones of layout k", low=1, needs={"layout": ("k",)})
    steps: int = option(100, help="optimizer steps before the first question", low=1)
    between: int = option(25, help="further steps between two questions", low=1)
    learning_rate: float = option(0.1, help="of AdamW", above=0)
    weight_decay: float = option(0.1, help="of AdamW", low=0)
    image_steps: int = option(20, help="sampling steps of the goal's image", low=1)

    def __post_init__(self) -> None:
        check_options(self)

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        assert scope.white is not None
        white, model = scope.white, scope.white.model
        tokens, draw = TypedTokens(model, scope.listed), scope.torch_random()
        given = tokens.of(goal.prompt)
        row, free = self.places(given)
        first = torch.randint(len(tokens.ids), (len(free),), generator=draw).to(model.device)
        soft: Float[Tensor, "place dim"] = tokens.vectors[first].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([soft], lr=self.learning_rate, weight_decay=self.weight_decay)
        with torch.no_grad():
            wanted = encode_ids(model, padded_ids(model, [given]))
        looks = self.steps
        for step, one in enumerate(noised(model, goal_latents(goal, scope, self.image_steps), draw), start=1):
            ids = filled(row, free, tokens.nearest(soft.detach()).tolist())
            vectors = token_vectors(model)[[ids[i] for i in free]][None]
            vectors = vectors.float().requires_grad_(True)
            with torch.enable_grad():
                read = encode_ids(model, padded_ids(model, [ids]), vectors, [i + 1 for i in free])
                reference = white.reference(one.latents, one.timestep, wanted)
                loss = (white.predict(one.latents, one.timestep, read) - reference).square().mean()
                (soft.grad,) = (found[0] for found in torch.autograd.grad(loss, vectors))
            scope.meter.gradients += 1
            optimizer.step()
            hurried = scope.meter.hurry
            if step >= looks or hurried:
                looks = step + self.between
                yield tokens.text(filled(row, free, tokens.nearest(soft.detach()).tolist()))

    def places(self, given: list[int]) -> tuple[list[int], list[int]]:
        """A row of token ids, and where in it the free tokens stand; their ids in the row mean nothing."""
        if self.layout == "n":
            return [given[0]] * self.tokens if given else [0] * self.tokens, list(range(self.tokens))
        row: list[int] = []
        free: list[int] = []
        for number, token in enumerate(given, start=1):
            row.append(token)
            if number % self.every == 0 or (number == len(given) and not free):
                free.append(len(row))
                row.append(token)
        return row, free


def filled(row: list[int], free: list[int], ids: list[int]) -> list[int]:
    """The row with ``ids`` at the free places."""
    found = list(row)
    for place, token in zip(free, ids, strict=True):
        found[place] = token
    return found
