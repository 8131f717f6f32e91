"""Safe LoRA: project a fine-tuning's update onto the span of the alignment, where the two are unlike (arXiv 2405.16833)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import ClassVar, Literal

import torch

from valign.checks import option
from valign.merging.compress import decompose, numerical_rank
from valign.merging.deltas import Delta, DeltaSource, DenseDelta, inner
from valign.merging.realign.base import Change, RealignContext, RealignMethod, is_embedding
from valign.merging.realign.vectors import AdapterChanges, Vectors, WeightVectors
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="safe-lora",
    title="Safe LoRA: projection onto the span of the alignment",
    paper="arXiv 2405.16833",
    room="merging",
    entry="valign.merging.realign.safe_lora:safe_lora",
    fidelity="exact",
    note="also for full fine-tuning; a similarity equal to the threshold is not projected, so that 0 projects nothing",
)

Projection = Literal["scaled", "orthogonal"]


@dataclass(frozen=True, kw_only=True)
class SafeLora(RealignMethod):
    """Project the update of each layer that is unlike the alignment onto the alignment's span (Safe LoRA, arXiv 2405.16833)."""

    strength: float = option(
        0.5, help="threshold: layers whose projected update has a lower cosine to it are projected; 1 projects all", low=0, high=1
    )
    projection: Projection = option(
        "scaled", help="scaled: V V^T / |V|, the authors'; orthogonal: onto V's left singular vectors, of norm 1"
    )

    example: ClassVar[str] = "--base base --aligned aligned --finetuned adapter --strength 0.35 -o realigned"

    def prepare(self, vectors: Vectors, context: RealignContext) -> Change:
        self.check_models(vectors)
        cosines: dict[str, float] = {}
        context.results["cosines"] = cosines

        def change(at: WeightVectors) -> Delta:
            task = self.fused(vectors.models, at)
            if at.ndim < 2 or is_embedding(at.name):
                return task
            onto = project(at.safety, task, self.projection)
            size = sqrt(inner(onto, onto) * inner(task, task))
            if size == 0:  # no alignment here, or no fine-tuning
                return task
            cosines[at.name] = inner(onto, task) / size
            return onto if cosines[at.name] < self.strength else task

        return change


def project(alignment: Delta, update: Delta, projection: Projection) -> Delta:
    """``C update`` with ``C = V V^T / |V|_F`` (scaled) or ``U U^T`` of V's numerical rank (orthogonal); low-rank stays low-rank."""
    if projection == "orthogonal":
        left, values, _ = decompose(alignment)
        left = left[:, : numerical_rank(values, alignment.shape)].float()

        def onto(columns: torch.Tensor) -> torch.Tensor:
            return left @ (left.T @ columns)
    elif isinstance(alignment, LoraFactors):
        size = sqrt(max(inner(alignment, alignment), 0.0))
        up = alignment.up.float() * alignment.scale
        gram = alignment.down.float() @ alignment.down.float().T

        def onto(columns: torch.Tensor) -> torch.Tensor:
            return up @ (gram @ (up.T @ columns)) / size if size else torch.zeros_like(columns)
    else:
        matrix = alignment.delta()
        norm = float(matrix.norm())

        def onto(columns: torch.Tensor) -> torch.Tensor:
            return matrix @ (matrix.T @ columns) / norm if norm else torch.zeros_like(columns)

    if isinstance(update, LoraFactors):
        return LoraFactors(update.down.float(), onto(update.up.float() * update.scale), 1.0)
    return DenseDelta(onto(update.delta()))


def safe_lora(
    safety: DeltaSource, tasks: Mapping[str, DeltaSource], *, strength: float = 0.5, projection: Projection = "scaled"
) -> Iterator[tuple[str, Delta]]:
    """``C task`` where its cosine to ``task`` is below ``strength``, else ``task``; weight by weight in sorted order.

    Args:
        safety: ``aligned - base``, an opened adapter or `NamedDeltas`.
        tasks: One fine-tuned model's change from the aligned model, by name.
        strength: The paper's threshold, in [0, 1]. The cosine is never negative, for C is positive semi-definite: 0 leaves the
            fine-tuned model as it is, 1 projects every matrix.
        projection: As in `project`. Weights of one dimension, and embeddings, are left as they are.
    """
    vectors = Vectors(AdapterChanges(safety, ""), {name: AdapterChanges(task, "") for name, task in tasks.items()})
    change = SafeLora(strength=strength, projection=projection).prepare(vectors, RealignContext())
    return ((at.name, change(at)) for at in vectors.items())
