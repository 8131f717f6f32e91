"""Votes on which expert is the most active at each neuron: counted here, collected in `calibration`."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from safetensors import safe_open
from torch import Tensor

from valign.checks import UserError, check_choice
from valign.files import read_json, write_json
from valign.merging.deltas import Delta, DenseDelta
from valign.models.files.tensor_stream import stream_tensors

Vote = Literal["prompt", "topk", "mass"]
VOTES = ("prompt", "topk", "mass")
UNITS = ("output", "rank_unit", "down")  # rows of the delta; rank-1 terms; rows of `down` alone


@dataclass(frozen=True)
class Ballot:
    """The votes on one module's units (rows of the delta, or ranks)."""

    counts: Int[Tensor, "expert unit"]  # int64: prompts that voted for the expert
    sums: Float[Tensor, "expert unit"]  # float32: activation summed over all prompts
    void: Int[Tensor, " unit"]  # int64: prompts on which no expert was active

    def __add__(self, other: "Ballot") -> "Ballot":
        return Ballot(self.counts + other.counts, self.sums + other.sums, self.void + other.void)

    def pick(self, vote: Vote = "prompt") -> Int[Tensor, " unit"]:
        """The winner of each unit: highest count, then larger sum, then lower index. ``vote="mass"`` goes by the sum at once."""
        if vote == "mass":
            return self.sums.argmax(0)
        return self.sums.where(self._leads(), -torch.inf).argmax(0)

    def ties(self) -> Bool[Tensor, " unit"]:
        """Units whose highest count is shared by several experts."""
        return self._leads().sum(0) > 1

    def _leads(self) -> Bool[Tensor, "expert unit"]:
        leads: Tensor = self.counts == self.counts.amax(0)
        return leads

    def margin(self) -> Int[Tensor, " unit"]:
        """Highest count minus the second highest; the count itself for a single expert."""
        if len(self.counts) == 1:
            return self.counts[0]
        most: Tensor = self.counts.topk(2, dim=0).values
        return most[0] - most[1]


def activations(
    x: Float[Tensor, "prompt token fan_in"], delta: Delta
) -> tuple[Float[Tensor, "prompt rank"], Float[Tensor, "prompt fan_out"]]:
    """Mean over tokens of ``|x down^T|`` and of ``|x delta^T|``, in the dtype of the change; rank 0 if it is dense."""
    if isinstance(delta, DenseDelta):
        x = x.to(delta.matrix.dtype)
        return x.new_zeros(len(x), 0), (x @ delta.matrix.T).abs().mean(1)
    hidden = x.to(delta.down.dtype) @ delta.down.T
    return hidden.abs().mean(1), (hidden @ (delta.scale * delta.up).T).abs().mean(1)


def tally(activity: Float[Tensor, "prompt expert unit"], *, vote: Vote = "prompt", top_k: int | None = None) -> Ballot:
    """One vote per prompt and unit, for the most active expert (of equals the first); no vote where all are 0.

    Args:
        vote: ``"topk"``: instead, an expert scores at a unit on every prompt where the unit is among its own ``top_k`` most active.
            ``"mass"`` counts as ``"prompt"`` does and differs in `Ballot.pick`.
        top_k: ``unit / expert``, rounded up, if not given.
    """
    experts, units = activity.shape[1:]
    void = (activity.amax(1) == 0).sum(0)
    if vote == "topk":
        k = min(units, top_k or -(-units // experts))
        chosen = torch.zeros_like(activity, dtype=torch.bool).scatter_(2, activity.topk(k, dim=2).indices, True)
    else:
        chosen = torch.zeros_like(activity, dtype=torch.bool).scatter_(1, activity.argmax(1, keepdim=True), True)
    return Ballot((chosen & (activity > 0)).sum(0), activity.float().sum(0), void)


@dataclass(frozen=True)
class Votes:
    """All ballots of a calibration. ``ballots[unit][module]``; ranks have ballots only where all experts have the same rank."""

    experts: tuple[str, ...]
    prompts: int
    ballots: Mapping[str, Mapping[str, Ballot]]
    vote: Vote = "prompt"
    record: Mapping[str, Any] = field(default_factory=dict)  # how they were collected; JSON-able

    def __post_init__(self) -> None:
        check_choice("Votes.vote", self.vote, VOTES)

    @classmethod
    def from_counts(cls, experts: Iterable[str], counts: Mapping[str, Tensor]) -> "Votes":
        """Votes on output neurons from bare counts ``[expert, neuron]``; ties go to the lower index."""
        ballots = {
            module: Ballot(count.long(), torch.zeros(count.shape), torch.zeros(count.shape[1], dtype=torch.int64))
            for module, count in counts.items()
        }
        prompts = max((int(count.sum(0).max()) for count in counts.values()), default=0)
        return cls(tuple(experts), prompts, {"output": ballots})

    def pick(self, module: str, unit: str = "output") -> Int[Tensor, " unit"]:
        """The winner's index at every unit of a module."""
        if module not in self.ballots.get(unit, {}):
            raise UserError(f"The votes must cover {module} ({unit}), and do not. Collect them again with these experts.")
        return self.ballots[unit][module].pick(self.vote)

    def save(self, folder: Path) -> None:
        """Write ``votes.safetensors`` and ``votes.json`` into ``folder``."""
        tensors = (
            (f"{unit}/{module}/{part}", getattr(ballot, part))
            for unit, modules in self.ballots.items()
            for module, ballot in sorted(modules.items())
            for part in ("counts", "sums", "void")
        )
        stream_tensors(folder / "votes.safetensors", tensors)
        record = {"experts": list(self.experts), "prompts": self.prompts, "vote": self.vote, "record": dict(self.record)}
        write_json(folder / "votes.json", record)

    @classmethod
    def load(cls, folder: Path) -> "Votes":
        """Read what `save` wrote."""
        record = read_json(folder / "votes.json")
        ballots: dict[str, dict[str, Ballot]] = {}
        with safe_open(folder / "votes.safetensors", framework="pt") as file:
            for key in sorted(file.keys()):
                if key.endswith("/counts"):
                    unit, module, _ = key.split("/")
                    parts = (file.get_tensor(f"{unit}/{module}/{part}") for part in ("counts", "sums", "void"))
                    ballots.setdefault(unit, {})[module] = Ballot(*parts)
        return cls(tuple(record["experts"]), record["prompts"], ballots, record["vote"], record["record"])
