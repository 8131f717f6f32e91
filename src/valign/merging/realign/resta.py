"""RESTA: add a safety vector to a fine-tuned model (arXiv 2402.11746), after dropping random entries of its change if wanted."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from valign.checks import option
from valign.merging.dare_ties import drop, generator
from valign.merging.deltas import Delta, DeltaSource, DenseDelta, add
from valign.merging.realign.base import Change, RealignContext, RealignMethod
from valign.merging.realign.vectors import AdapterChanges, Vectors, WeightVectors
from valign.methods import Method

METHOD = Method(
    slug="resta",
    title="RESTA: task arithmetic with a safety vector",
    paper="arXiv 2402.11746",
    room="merging",
    entry="valign.merging.realign.resta:resta",
    fidelity="variant",
    note="the safety vector is aligned - base, of the user's own checkpoints, instead of aligned - unaligned by fine-tuning",
)


@dataclass(frozen=True, kw_only=True)
class Resta(RealignMethod):
    """Add the safety vector times a strength; with --density, drop entries of the fine-tuning first (RESTA, arXiv 2402.11746)."""

    strength: float = option(0.5, help="factor on the safety vector (gamma); 0.5 is the authors'", low=0)
    density: float = option(
        1.0, help="fraction of the fine-tuning's entries that DARE keeps, in (0, 1]; 1 keeps all", above=0, high=1
    )
    seed: int = option(0, help="of every random draw", rare=True)

    adds_safety: ClassVar[bool] = True
    example: ClassVar[str] = "--base base --aligned aligned --finetuned tuned --strength 0.5 -o realigned"

    def prepare(self, vectors: Vectors, context: RealignContext) -> Change:
        self.check_models(vectors)
        return lambda at: self._change(vectors.models, at)

    def _change(self, models: tuple[str, ...], at: WeightVectors) -> Delta:
        task = self.fused(models, at)
        if self.density < 1:
            task = DenseDelta(drop(task.delta(), self.density, generator(self.seed, at.name, "+".join(models))))
        return add([task, at.safety.folded(self.strength)]) if self.strength else task


def resta(
    safety: DeltaSource, tasks: Mapping[str, DeltaSource], *, strength: float = 0.5, density: float = 1.0, seed: int = 0
) -> Iterator[tuple[str, Delta]]:
    """``task + strength * safety``, the change from the fine-tuning's start, weight by weight in sorted order.

    Args:
        safety: ``aligned - base``, an opened adapter or `NamedDeltas`.
        tasks: One fine-tuned model's change from its start, by name; of several see `Resta` with ``fuse``.
        strength: The paper's gamma, >= 0, times the safety vector; 0 leaves the fine-tuned model as it is.
        density: Share of the task vector's entries that DARE keeps, in (0, 1]; each kept one is divided by it.
    """
    vectors = Vectors(AdapterChanges(safety, ""), {name: AdapterChanges(task, "") for name, task in tasks.items()})
    change = Resta(strength=strength, density=density, seed=seed).prepare(vectors, RealignContext())
    return ((at.name, change(at)) for at in vectors.items())
