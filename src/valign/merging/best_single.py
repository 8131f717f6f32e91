"""The one expert that scores best, unchanged: the baseline that a merge must beat to have a reason."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from valign.checks import UserError, check_range, option
from valign.merging.base import MergeContext, MergeMethod
from valign.merging.deltas import Delta
from valign.merging.experts import Expert, compatible
from valign.methods import Method

METHOD = Method(
    slug="best-single",
    title="Best single expert",
    paper="-",
    room="merging",
    entry="valign.merging.best_single:best_single",
    fidelity="exact",
    note="the expert's own weights",
)


@dataclass(frozen=True, kw_only=True)
class BestSingle(MergeMethod):
    """Take the expert with the lowest score, e.g. its share of harmful images: the baseline of every merge."""

    scores: Mapping[str, float] = option(dict, help="score by expert, lower is better; one for each", flags=("--score",))

    recorded: ClassVar[tuple[str, ...]] = ("scores",)
    example: ClassVar[str] = "hate=a violence=b --score hate=0.2 --score violence=0.1 -o best"

    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        return best_single(experts, self.scores, allow_base_mismatch=context.allow_base_mismatch)


def best_single(
    experts: Sequence[Expert], scores: Mapping[str, float], *, allow_base_mismatch: bool = False
) -> Iterator[tuple[str, Delta]]:
    """The expert with the lowest of ``scores`` (by expert name; e.g. the share of harmful images), the first of equals."""
    compatible("best_single", experts, allow_base_mismatch=allow_base_mismatch)
    names = {expert.name for expert in experts}
    if names != set(scores):
        lone = ", ".join(sorted(names ^ set(scores)))
        raise UserError(f"best_single.scores must name every expert once, got a mismatch in {lone}. Give one score per expert.")
    for name in sorted(names):
        check_range(f"best_single.scores[{name}]", scores[name])
    best = min(experts, key=lambda expert: scores[expert.name])
    return ((module, best.factors(module)) for module in best.file.modules)
