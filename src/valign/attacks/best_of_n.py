"""The unchanged prompt again and again, with new seeds: what any search has to do better than at the same number of queries."""

from dataclasses import dataclass
from typing import ClassVar

from valign.attacks.base import Need, Scope, Search
from valign.evaluation.suite import EvalPrompt
from valign.methods import Method

METHOD = Method(
    slug="best-of-n",
    title="The unchanged prompt, again with new seeds",
    paper="arXiv 2412.03556",
    room="attacks",
    entry="valign.attacks.best_of_n:BestOfN",
    fidelity="simplified",
    note="seeds alone; the paper also changes letters and case, which here is `look-alikes`",
)


@dataclass(frozen=True, kw_only=True)
class BestOfN:
    """Needs nothing, and finds nothing but luck: the baseline of every other attack."""

    needs: ClassVar[tuple[Need, ...]] = ()
    informed: ClassVar[bool] = False

    def search(self, goal: EvalPrompt, scope: Scope) -> Search:
        while True:
            yield goal.prompt
