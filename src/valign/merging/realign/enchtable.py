"""EnchTable: add a safety vector at the scale of the fine-tuning, less where the two use the same directions (arXiv 2511.09880)."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import exp, log, sqrt
from pathlib import Path
from statistics import median
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import UserError, option
from valign.files import read_json, write_json
from valign.merging.compress import decompose, numerical_rank
from valign.merging.deltas import Delta, DeltaSource, add, inner
from valign.merging.realign.base import Change, RealignContext, RealignMethod, is_embedding, no_safety
from valign.merging.realign.vectors import AdapterChanges, Vectors, WeightVectors
from valign.methods import Method
from valign.progress import track

METHOD = Method(
    slug="enchtable",
    title="EnchTable: safety vector at the fine-tuning's scale, with interference weights",
    paper="arXiv 2511.09880",
    room="merging",
    entry="valign.merging.realign.enchtable:enchtable",
    fidelity="variant",
    note="interference over the numerical rank by default; embeddings are not weighed; both have a setting for parity",
)

RankMode = Literal["numerical", "half"]


@dataclass(frozen=True, kw_only=True)
class EnchTable(RealignMethod):
    """Add the safety vector at a share of the fine-tuning's norm, less where both use the same directions (arXiv 2511.09880)."""

    strength: float = option(0.1, help="norm of the added safety vector, as a share of the fine-tuning's (beta)", low=0)
    coarse: bool = option(True, help="match norms; off: strength multiplies the safety vector itself")
    fine: bool = option(True, help="weigh each matrix by exp(-gain * interference)")
    gain: float = option(
        200.0,
        help="of the interference; 200 is tuned on models of 7 billion weights",
        low=0,
        needs={"fine": (), "auto_gain": (False,)},
    )
    auto_gain: bool = option(
        False, help="choose the gain so that the median matrix has half of the safety vector", needs={"fine": ()}
    )
    gamma: float = option(0.5, help="share of the singular directions that are compared", above=0, high=1, needs={"fine": ()})
    rank_mode: RankMode = option(
        "numerical", help="directions that gamma counts: those above rounding, or (half, the authors') all of the matrix"
    )
    embeddings: bool = option(False, help="weigh embeddings too, as the authors' code does", rare=True)

    adds_safety: ClassVar[bool] = True
    example: ClassVar[str] = "--base base --aligned aligned --finetuned tuned --strength 0.3 --auto-gain -o realigned"

    def prepare(self, vectors: Vectors, context: RealignContext) -> Change:
        self.check_models(vectors)
        key = {"vectors": vectors.fingerprint(), "options": self.record()}
        kept = context.folder / "survey.json" if context.folder else None
        known = read_json(kept) if kept and kept.exists() else {}
        if known.get("key") != key:
            known = {"key": key, **self._survey(vectors)}
            if kept:
                write_json(kept, known)
        alpha, weights = float(known["alpha"]), known["weights"]
        context.results.update({"alpha": alpha, "safety_weights": weights, "gain": known["gain"]})

        def change(at: WeightVectors) -> Delta:
            factor = alpha * weights.get(at.name, 1.0)
            task = self.fused(vectors.models, at)
            return add([task, at.safety.folded(factor)]) if factor else task

        return change

    def _survey(self, vectors: Vectors) -> dict[str, Any]:
        """``alpha``, and by matrix the weight of its safety vector. Raises: UserError if the safety vector is zero."""
        safety = task = 0.0
        for at in track(vectors.items(), "measuring the vectors", total=len(vectors)):
            change = self.fused(vectors.models, at)
            safety, task = safety + inner(at.safety, at.safety), task + inner(change, change)
        if safety <= 0:
            raise no_safety("enchtable")
        if self.coarse and task <= 0:
            raise UserError("enchtable must have a fine-tuned model that differs from its start, got the same weights in both.")
        alpha = self.strength * sqrt(task / safety) if self.coarse else self.strength
        found = self._interference(vectors, alpha) if self.fine and alpha else {}
        middle = median(found.values()) if found else 0.0
        gain = self.gain if not self.auto_gain else log(2) / middle if middle > 0 else 0.0
        weights = {name: exp(-gain * overlap) for name, overlap in found.items()}
        return {"alpha": alpha, "gain": gain if self.fine else None, "weights": weights}

    def _interference(self, vectors: Vectors, alpha: float) -> dict[str, float]:
        found = {}
        for at in track(vectors.items(), "comparing directions", total=len(vectors)):
            if at.ndim != 2 or (is_embedding(at.name) and not self.embeddings):
                continue
            task = self.fused(vectors.models, at)
            if inner(task, task) > 0 and inner(at.safety, at.safety) > 0:
                found[at.name] = interference(task, at.safety.folded(alpha), gamma=self.gamma, rank_mode=self.rank_mode)
        return found


def interference(task: Delta, safety: Delta, *, gamma: float = 0.5, rank_mode: RankMode = "numerical") -> float:
    """Mean absolute entry of ``(U^T U - I) diag(sigma) (V V^T - I)``: how far two updates use the same directions.

    ``U``, ``sigma`` and ``V`` hold the first singular vectors and values of both, ``floor(gamma * rank)`` of each but at least
    one; 0 where their left or their right spaces are orthogonal. Linear in the updates' common scale, so not scale-free. Low-rank
    updates are never formed.

    Args:
        rank_mode: ``"numerical"`` counts singular values above rounding; ``"half"`` all of the matrix, where those of a low-rank
            update belong to arbitrary directions.
    """
    parts = [_leading(delta, gamma, rank_mode) for delta in (task, safety)]
    left = torch.cat([part[0] for part in parts], dim=1)
    values = torch.cat([part[1] for part in parts])
    right = torch.cat([part[2] for part in parts])
    one = torch.eye(len(values), dtype=values.dtype)
    return float((((left.T @ left - one) * values) @ (right @ right.T - one)).abs().mean())


def _leading(
    delta: Delta, gamma: float, rank_mode: RankMode
) -> tuple[Float[Tensor, "fan_out kept"], Float[Tensor, " kept"], Float[Tensor, "kept fan_in"]]:
    left, values, right = decompose(delta)
    rank = numerical_rank(values, delta.shape) if rank_mode == "numerical" else min(delta.shape)
    kept = min(max(1, int(gamma * rank)), len(values))
    return left[:, :kept].double(), values[:kept].double(), right[:kept].double()


def enchtable(
    safety: DeltaSource,
    tasks: Mapping[str, DeltaSource],
    *,
    strength: float = 0.1,
    gain: float = 200.0,
    folder: Path | None = None,
    **options: Any,
) -> Iterator[tuple[str, Delta]]:
    """``task + w alpha safety`` with ``alpha = strength |task| / |safety|`` over all weights, ``w = exp(-gain interference)``.

    Args:
        safety: ``aligned - unaligned``, an opened adapter or `NamedDeltas`.
        tasks: One fine-tuned model's change from its start, by name.
        strength: The paper's beta, >= 0: the norm of what is added before the weights ``w``, as a share of the task vector's norm;
            0 leaves the fine-tuned model as it is.
        gain: 200 in the paper's models; small models need another, see ``auto_gain``.
        folder: Keeps what was measured, so that a killed call resumes.
        options: Further fields of `EnchTable`.
    Raises: UserError if one of the two vectors is zero.
    """
    vectors = Vectors(AdapterChanges(safety, ""), {name: AdapterChanges(task, "") for name, task in tasks.items()})
    change = EnchTable(strength=strength, gain=gain, **options).prepare(vectors, RealignContext(folder=folder))
    return ((at.name, change(at)) for at in vectors.items())
