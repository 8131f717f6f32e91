"""Co-Merge: every neuron is copied from the expert that was most often the most active there (AlignGuard, arXiv 2412.10493).

The paper's public summaries leave open what a neuron is; `Granularity` offers three readings. Nothing is trained or averaged.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from valign.checks import UserError, check_choice, check_range, option
from valign.files import hash_value, read_json
from valign.merging.base import MergeContext, MergeMethod
from valign.merging.calibration import Inputs, collect_votes, voters
from valign.merging.compress import compress, compress_dense
from valign.merging.deltas import Delta, DenseDelta
from valign.merging.experts import Expert, compatible
from valign.merging.selection import save_selection, selection_report
from valign.merging.votes import Vote, Votes
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="co-merge",
    title="Co-Merge of experts",
    paper="arXiv 2412.10493",
    room="merging",
    entry="valign.merging.co_merge:co_merge",
    fidelity="variant",
    note="the paper's equations were not at hand: what a neuron is has three readings, and the statistic of a vote is ours",
)

Granularity = Literal["output", "rank_unit", "factor"]


@dataclass(frozen=True, kw_only=True)
class CoMerge(MergeMethod):
    """Copy every neuron from the expert that unsafe prompts activate most (AlignGuard, arXiv 2412.10493)."""

    granularity: Granularity = option("output", help="what is copied as one: a row of the change, a rank, a factor's row")
    rank: int | None = option(None, help="rank of the result in every module; the error is reported", low=1)
    vote: Vote = option(
        "prompt", help="one vote per prompt, every expert's own best, or sums of activation", needs={"votes": (None,)}
    )
    per_category: int = option(64, help="prompts that vote for each category", low=1, needs={"votes": (None,)})
    states: int = option(4, help="denoising states per prompt", low=1, needs={"votes": (None,)})
    steps: int = option(50, help="denoising steps of a whole trajectory", low=1, needs={"votes": (None,)})
    top_k: int | None = option(None, help="neurons per expert and prompt, for --vote topk", low=1, needs={"vote": ("topk",)})
    inputs: Inputs = option(
        "base", help="activations on the inputs of the base model, or on each expert's own", needs={"votes": (None,)}
    )
    batch_size: int = option(8, help="prompts at a time", low=1, needs={"votes": (None,)})
    votes: Path | None = option(None, help="folder of an earlier co-merge of these experts; no model is run then")
    seed: int = option(0, help="of every random draw", needs={"votes": (None,)})

    calibrated: ClassVar[bool] = True
    grid: ClassVar[tuple[Mapping[str, float], ...]] = tuple({"weight": weight} for weight in (0.7, 1.0, 1.5, 2.2, 3.0))
    recorded: ClassVar[tuple[str, ...]] = ("per_category", "seed", "granularity")
    example: ClassVar[str] = "runs/hate violence=runs/v -o runs/merged --model shapes --data runs/data"

    @property
    def needs_calibration(self) -> bool:
        return self.votes is None

    def record(self, experts: Sequence[Expert], context: MergeContext) -> dict[str, Any]:
        how: dict[str, Any] = {"granularity": self.granularity, "rank": self.rank, "vote": self.vote}
        if self.votes is not None:
            counted = read_json(self.votes / "votes.json")
            return how | {"vote": counted["vote"], "calibration": counted["record"]}
        asked = {name: getattr(self, name) for name in ("per_category", "states", "steps", "top_k", "inputs")}
        seen = context.calibration
        return how | ({"model": seen.model_name, "prompts": hash_value(seen.prompts)} if seen else {}) | asked

    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        votes = Votes.load(self.votes) if self.votes is not None else self._collect(experts, context)
        merged = co_merge(
            experts,
            votes,
            granularity=self.granularity,
            rank=self.rank,
            errors=context.errors,
            allow_base_mismatch=context.allow_base_mismatch,
        )
        report = selection_report(votes, "rank_unit" if self.granularity == "rank_unit" else "output")
        context.results["shares"] = dict(zip(report.experts, report.shares))
        if context.folder is not None:
            save_selection(report, context.folder)
            if context.keep_votes:
                votes.save(context.folder)
        return merged

    def _collect(self, experts: Sequence[Expert], context: MergeContext) -> Votes:
        if context.calibration is None:
            raise UserError("co-merge must have a model and unsafe prompts, or the votes of an earlier co-merge; got neither.")
        given, asked = context.calibration, ("per_category", "states", "steps", "vote", "top_k", "inputs", "batch_size", "seed")
        options: dict[str, Any] = {name: getattr(self, name) for name in asked}
        voting, model = voters(experts, self.inputs), given.model()
        who = [(expert.name, expert.file.fingerprint(), expert.weight) for expert in voting]
        key = hash_value([model.fingerprint(), who, given.prompts, options])
        folder = context.kept / f"votes-{key[:16]}" if context.kept is not None else None
        if folder is not None and (folder / "votes.json").exists():  # written last
            return Votes.load(folder)
        votes = collect_votes(model, experts, given.prompts, **options, allow_base_mismatch=context.allow_base_mismatch)
        if folder is not None:
            votes.save(folder)
        return votes


def co_merge(
    experts: Sequence[Expert],
    votes: Votes | Mapping[str, Tensor],
    *,
    granularity: Granularity = "output",
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, Delta]]:
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
) -> Iterator[tuple[str, Delta]]:
    for module in modules:
        parts = [expert.factors(module) for expert in experts]
        factors = [part for part in parts if isinstance(part, LoraFactors)]  # all, but for granularity "output"
        if granularity == "output":
            merged = copy_rows(parts, votes.pick(module))
        elif granularity == "rank_unit":
            merged = copy_rank_units(factors, votes.pick(module, "rank_unit"))
        else:
            merged = copy_factor_rows(factors, votes.pick(module, "down"), votes.pick(module))
        error = 0.0
        if rank is not None and merged.rank > rank:
            merged, error = compress_dense(merged.matrix, rank) if isinstance(merged, DenseDelta) else compress(merged, rank)
        if errors is not None:
            errors[module] = error
        yield module, merged


def copy_rows(parts: Sequence[Delta], pick: Int[Tensor, " fan_out"]) -> Delta:
    """``delta[j] = delta_pick[j][j]``, exactly: ``down`` stacked, ``up`` masked. Experts that win no row are left out."""
    winners = [n for n in range(len(parts)) if bool((pick == n).any())]
    factors = [part for part in parts if isinstance(part, LoraFactors)]
    if len(factors) < len(parts):
        return DenseDelta(torch.stack([parts[n].delta() * (pick == n)[:, None] for n in winners]).sum(0))
    down = torch.cat([factors[n].down for n in winners])
    up = torch.cat([factors[n].folded().up * (pick == n)[:, None] for n in winners], dim=1)
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
    voting = voters(experts, votes.record.get("options", {}).get("inputs", "base"))
    for said, mine, what in (
        (votes.record.get("fingerprints"), [expert.file.fingerprint() for expert in experts], "files"),
        (votes.record.get("weights"), [expert.weight for expert in voting], "weights"),
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
