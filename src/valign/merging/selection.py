"""The report on a Co-Merge selection, as JSON and as a heat map: which expert won which share of the neurons."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from valign.checks import UserError
from valign.files import atomic_path, write_json
from valign.merging.votes import Votes


@dataclass(frozen=True)
class ModuleSelection:
    """One module: shares are fractions of its units, in the order of the experts."""

    units: int
    shares: tuple[float, ...]
    tied: int  # units whose highest count several experts reached
    void: int  # (prompt, unit) pairs on which no expert was active
    margin: float  # mean over units of (highest - second highest count) / prompts, in [0, 1]


@dataclass(frozen=True)
class SelectionReport:
    """All modules; ``shares`` weighs every unit alike."""

    experts: tuple[str, ...]
    prompts: int
    unit: str
    shares: tuple[float, ...]
    modules: Mapping[str, ModuleSelection]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def selection_report(votes: Votes, unit: str = "output") -> SelectionReport:
    """Summarize the votes on one kind of unit (``"output"``, ``"rank_unit"`` or ``"down"``)."""
    if unit not in votes.ballots:
        raise UserError(
            f"selection_report.unit must be one of {', '.join(votes.ballots)}, got {unit!r}. Ranks must be equal for others."
        )
    total = torch.zeros(len(votes.experts), dtype=torch.int64)
    modules = {}
    for module, ballot in sorted(votes.ballots[unit].items(), key=lambda item: _natural(item[0])):
        won = torch.bincount(ballot.pick(votes.vote), minlength=len(votes.experts))
        total += won
        units = ballot.counts.shape[1]
        margin = float(ballot.margin().double().mean()) / max(1, votes.prompts)
        modules[module] = ModuleSelection(
            units, tuple((won / units).tolist()), int(ballot.ties().sum()), int(ballot.void.sum()), margin
        )
    return SelectionReport(votes.experts, votes.prompts, unit, tuple((total / total.sum()).tolist()), modules)


def save_selection(report: SelectionReport, folder: Path) -> None:
    """Write ``selection.json`` and ``selection.png`` (modules x experts, share of units) into ``folder``."""
    write_json(folder / "selection.json", report.to_dict())
    from matplotlib.figure import Figure

    rows = list(report.modules)
    figure = Figure(figsize=(3.5 + 0.5 * len(report.experts), 1.6 + 0.14 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow([report.modules[row].shares for row in rows], aspect="auto", cmap="viridis", vmin=0, vmax=1)
    labels = [f"{name} {share:.0%}" for name, share in zip(report.experts, report.shares)]
    axes.set_xticks(range(len(labels)), labels, rotation=40, ha="right", fontsize=7)
    axes.set_yticks(range(len(rows)), [_short(row) for row in rows], fontsize=5)
    axes.set_title("Share of neurons by expert", fontsize=9)
    figure.colorbar(shown, ax=axes, fraction=0.05)
    with atomic_path(folder / "selection.png") as temporary:
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def _natural(module: str) -> tuple[Any, ...]:
    """Order of the network: down, middle, up; numbers as numbers."""
    side = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}.get(module.split(".")[0], -1)
    return side, [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"\.", module)]


def _short(module: str) -> str:
    return module.replace("transformer_blocks.", "t").replace("attentions.", "a").replace("_blocks.", "").replace("_block", "")
