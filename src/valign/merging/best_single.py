"""No merge at all: the one expert that scores best. A merge that loses to this has no reason to exist."""

from collections.abc import Iterator, Mapping, Sequence

from valign.checks import UserError, check_range
from valign.merging.experts import Expert, compatible
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="best-single", title="Best single expert", paper="-", room="merging", entry="valign.merging.best_single:best_single"
)


def best_single(
    experts: Sequence[Expert], scores: Mapping[str, float], *, allow_base_mismatch: bool = False
) -> Iterator[tuple[str, LoraFactors]]:
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
