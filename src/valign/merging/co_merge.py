"""Co-Merge: every neuron is copied from the expert that was most often the most active there (AlignGuard, arXiv 2412.10493).

What a neuron is, the paper's public summaries leave open; `Granularity` offers three readings. Nothing is trained or averaged.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from valign.checks import UserError, check_choice, check_range
from valign.merging.compress import compress
from valign.merging.experts import Expert, compatible
from valign.merging.votes import Votes
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="co-merge", title="Co-Merge of experts", paper="arXiv 2412.10493", room="merging", entry="valign.merging.co_merge:co_merge"
)

Granularity = Literal["output", "rank_unit", "factor"]


def co_merge(
    experts: Sequence[Expert],
    votes: Votes | Mapping[str, Tensor],
    *,
    granularity: Granularity = "output",
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, LoraFactors]]:
    """Copy each neuron from its winner, one module at a time in sorted order.

    Args:
        votes: Of `collect_votes` with these experts in this order, or bare counts ``[expert, neuron]`` by module.
        granularity: What is copied as one. ``"output"``: row j of the delta, exact, for any ranks; the result has rank N r at most.
            ``"rank_unit"``: rank-1 term i; keeps r. ``"factor"``: rows of ``down`` and of ``up``, each by their own votes; keeps r,
            but multiplies one expert's ``up`` with another's ``down``: only for experts that share (nearly) the same ``down``.
        rank: Truncate each module to this rank, where it has more (`compress`).
        errors: Filled, module by module, with the relative Frobenius error of the truncation.
    Raises: UserError if experts or votes do not fit together; ValueError for a rank above the sum of the experts' ranks.
    """
    check_choice("co_merge.granularity", granularity, ("output", "rank_unit", "factor"))
    modules = compatible(
        "co_merge", experts, allow_base_mismatch=allow_base_mismatch, equal_ranks=granularity in ("rank_unit", "factor")
    )
    names = tuple(expert.name for expert in experts)
    if not isinstance(votes, Votes):
        votes = Votes.from_counts(names, votes)
    _check_votes(experts, votes, modules, granularity)
    if rank is not None:
        most = max(sum(expert.file.entries[module].rank for expert in experts) for module in modules)
        check_range("co_merge.rank", rank, low=1, high=most, hint="That is the sum of the experts' ranks.")
    return _stream(experts, votes, modules, granularity, rank, errors)


def _stream(
    experts: Sequence[Expert],
    votes: Votes,
    modules: Sequence[str],
    granularity: Granularity,
    rank: int | None,
    errors: MutableMapping[str, float] | None,
) -> Iterator[tuple[str, LoraFactors]]:
    for module in modules:
        parts = [expert.factors(module) for expert in experts]
        if granularity == "output":
            lora = copy_rows(parts, votes.pick(module))
        elif granularity == "rank_unit":
            lora = copy_rank_units(parts, votes.pick(module, "rank_unit"))
        else:
            lora = copy_factor_rows(parts, votes.pick(module, "down"), votes.pick(module))
        error = 0.0
        if rank is not None and lora.rank > rank:
            lora, error = compress(lora, rank)
        if errors is not None:
            errors[module] = error
        yield module, lora


def copy_rows(parts: Sequence[LoraFactors], pick: Int[Tensor, " fan_out"]) -> LoraFactors:
    """``delta[j] = delta_pick[j][j]``, exactly: ``down`` stacked, ``up`` masked. Experts that win no row are left out."""
    winners = [n for n in range(len(parts)) if bool((pick == n).any())]
    down = torch.cat([parts[n].down for n in winners])
    up = torch.cat([parts[n].folded().up * (pick == n)[:, None] for n in winners], dim=1)
    return LoraFactors(down, up, 1.0)


def copy_rank_units(parts: Sequence[LoraFactors], pick: Int[Tensor, " rank"]) -> LoraFactors:
    """Row i of ``down`` and column i of ``up``, both from expert ``pick[i]``."""
    units = torch.arange(len(pick))
    down = torch.stack([part.down for part in parts])[pick, units]
    up = torch.stack([part.folded().up.T for part in parts])[pick, units].T
    return LoraFactors(down, up.contiguous(), 1.0)


def copy_factor_rows(
    parts: Sequence[LoraFactors], pick_down: Int[Tensor, " rank"], pick_up: Int[Tensor, " fan_out"]
) -> LoraFactors:
    """Row i of ``down`` from expert ``pick_down[i]``, row j of ``up`` from ``pick_up[j]``, as two layers of their own."""
    down = torch.stack([part.down for part in parts])[pick_down, torch.arange(len(pick_down))]
    up = torch.stack([part.folded().up for part in parts])[pick_up, torch.arange(len(pick_up))]
    return LoraFactors(down, up, 1.0)


def _check_votes(experts: Sequence[Expert], votes: Votes, modules: Sequence[str], granularity: Granularity) -> None:
    names = tuple(expert.name for expert in experts)
    if votes.experts != names:
        raise UserError(f"co_merge.votes must be on {', '.join(names)}, got {', '.join(votes.experts)}. Collect them again.")
    for said, mine, what in (
        (votes.record.get("fingerprints"), [expert.file.fingerprint() for expert in experts], "files"),
        (votes.record.get("weights"), [expert.weight for expert in experts], "weights"),
    ):
        if said is not None and list(said) != mine:
            raise UserError(f"co_merge.votes must be on these {what}; the experts have changed since. Collect the votes again.")
    units = {"output": ("output",), "rank_unit": ("rank_unit",), "factor": ("down", "output")}[granularity]
    for module in modules:
        fan_out, ranks = experts[0].file.entries[module].shape[0], experts[0].file.entries[module].rank
        for unit in units:
            seats = len(votes.pick(module, unit))
            wanted = fan_out if unit == "output" else ranks
            if seats != wanted:
                raise UserError(
                    f"co_merge.votes must have {wanted} {unit} units in {module}, got {seats}. Collect the votes again."
                )
