"""Do updates that keep and that break safety use directions of their own? After "Safety Subspaces are Not (Linearly) Distinct"
(arXiv 2505.14185): overlap of mode subspaces, projections onto the alignment's directions, and random controls."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from math import nan, sqrt
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from valign.audits.report import Curves
from valign.checks import UserError, check_choice, check_range
from valign.evaluation.statistics import t_interval
from valign.merging.compress import decompose, numerical_rank
from valign.merging.deltas import Delta, DenseDelta, inner
from valign.merging.realign.vectors import Changes
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors
from valign.progress import track
from valign.randomness import generator_for

METHOD = Method(
    slug="safety-subspaces",
    title="Audit of safety subspaces: overlap and projections",
    paper="arXiv 2505.14185",
    room="audits",
    entry="valign.audits.subspaces:audit_subspaces",
    fidelity="variant",
    note="the reference's defects are mended (cosine to the alignment, fraction 1, zero updates); behaviour is measured apart",
)

ETAS = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
FRACTIONS = (0.01, 0.25, 0.5, 0.75, 0.99)
SAFETY = "alignment"
DISTINCT = 0.05  # difference of overlaps from which a subspace counts as distinct
Side = Literal["left", "right"]
Kind = Literal["top", "random-directions", "random"]


def top_basis(update: Delta, energy: float, *, side: Side = "left") -> Float[Tensor, "width kept"]:
    """The fewest singular vectors whose squared singular values sum to ``energy`` times the total; none of a zero update.

    Of low-rank factors without a dense matrix.
    Raises: ValueError if ``energy`` is not in (0, 1].
    """
    check_range("top_basis.energy", energy, above=0, high=1)
    left, values, right = decompose(update)
    vectors = left if side == "left" else right.T
    values = values[: numerical_rank(values, update.shape)]
    return vectors[:, : _modes(values, energy)].double()


def _modes(values: Float[Tensor, " rank"], energy: float) -> int:
    if not len(values):
        return 0
    shares = values.double().square().cumsum(0) / values.double().square().sum()
    return min(int((shares < energy - 1e-12).sum()) + 1, len(values))


def overlap(one: Float[Tensor, "width first"], other: Float[Tensor, "width second"]) -> float:
    """Mode-subspace overlap ``|Q_1^T Q_2|_F^2 / min(k_1, k_2)`` of two orthonormal bases, in [0, 1]; NaN if one is empty."""
    smaller = min(one.shape[1], other.shape[1])
    return float((one.T @ other).square().sum()) / smaller if smaller else nan


def expected_overlap(first: int, second: int, width: int) -> float:
    """`overlap` of two random subspaces of these dimensions, on average: ``max(k_1, k_2) / width``."""
    return max(first, second) / width if min(first, second) else nan


def project_update(
    update: Delta,
    alignment: Delta,
    fraction: float,
    *,
    part: Literal["parallel", "orthogonal", "opposite"] = "parallel",
    kind: Kind = "top",
    side: Side = "left",
    random: torch.Generator | None = None,
) -> DenseDelta:
    """The part of an update along, or without, the alignment's directions.

    Args:
        fraction: In (0, 1]: ``max(1, round(fraction * min(shape)))`` directions; 1 is all. A column has one direction, itself.
        part: Parallel ``L L^T U``, orthogonal ``U - L L^T U`` or opposite ``-L L^T U``.
        kind: The top directions, as many drawn from all of the alignment's, or those of a Gaussian matrix.
        random: For the last two.
    Returns: zero for parallel where the alignment is zero: it has no direction.
    """
    check_range("project_update.fraction", fraction, above=0, high=1)
    check_choice("project_update.part", part, ("parallel", "orthogonal", "opposite"))
    basis = _directions(alignment, fraction, kind, side, random)
    matrix = update.delta().double()
    parallel = basis @ (basis.T @ matrix) if side == "left" else (matrix @ basis) @ basis.T
    return DenseDelta({"parallel": parallel, "orthogonal": matrix - parallel, "opposite": -parallel}[part])


def _directions(
    alignment: Delta, fraction: float, kind: Kind, side: Side, random: torch.Generator | None
) -> Float[Tensor, "width kept"]:
    size = min(alignment.shape)
    kept = max(1, round(fraction * size))
    source = alignment
    if kind == "random":
        assert random is not None
        source = DenseDelta(torch.randn(alignment.shape, generator=random))
    left, values, right = decompose(source)
    vectors = (left if side == "left" else right.T)[:, : numerical_rank(values, source.shape)].double()
    if kind == "random-directions":
        assert random is not None
        vectors = vectors[:, torch.randperm(vectors.shape[1], generator=random)]
    return vectors[:, :kept]


def activation_overlap(
    first: Float[Tensor, "prompt width"], second: Float[Tensor, "other width"], etas: Sequence[float] = ETAS
) -> dict[float, tuple[float, float]]:
    """Overlap of two sets of hidden states by ``eta``, and what random subspaces of their dimensions have.

    Args: first, second: One state per prompt, at its last real token; not centred.
    Raises: UserError for fewer than two prompts in a set.
    """
    if min(len(first), len(second)) < 2:
        raise UserError(f"activation_overlap must have at least 2 prompts in each set, got {len(first)} and {len(second)}.")
    found = {}
    for eta in etas:
        one, other = (top_basis(DenseDelta(states.T), eta) for states in (first, second))
        found[eta] = overlap(one, other), expected_overlap(one.shape[1], other.shape[1], len(one))
    return found


def audit_subspaces(
    updates: Mapping[str, Changes],
    alignment: Changes | None = None,
    *,
    useful: Sequence[str] = (),
    harmful: Sequence[str] = (),
    etas: Sequence[float] = ETAS,
    fractions: Sequence[float] = FRACTIONS,
    side: Side = "left",
    seed: int = 42,
) -> tuple[dict[str, Any], list[Curves], list[str]]:
    """Overlaps of all pairs of updates and the alignment, and what of each update lies along the alignment; one weight at a time.

    Args:
        updates: Changes from one aligned point, by name.
        alignment: ``aligned - base``; None measures the pairs of updates alone.
        useful, harmful: Names of updates on benign, and on unsafe data: what the verdict compares.
        seed: Of the random controls.
    Returns: figures (JSON-able), plots, and the verdict's sentences.
    Raises: UserError without two sets to compare, for unknown names, other weights or an alignment that is zero.
    """
    sources = {**({SAFETY: alignment} if alignment is not None else {}), **updates}
    if SAFETY in updates or len(sources) < 2:
        raise UserError(
            f"An audit of subspaces must have two updates, or one and the alignment, got {', '.join(updates) or 'none'}."
        )
    for name in (*useful, *harmful):
        check_choice("useful and harmful", name, tuple(updates))
    for eta in (*etas, *fractions):
        check_range("audit_subspaces.etas and fractions", eta, above=0, high=1)
    names = sorted(set.intersection(*(set(one.names) for one in sources.values())))
    if not names:
        raise UserError("All updates must change some weights in common, got none. Name updates of one model.")
    pairs = list(combinations(sources, 2))
    overlaps: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {pair: {eta: [] for eta in etas} for pair in pairs}
    sums: dict[str, dict[tuple[str, float], float]] = {name: {} for name in updates}
    energies, products, aligned = dict.fromkeys(updates, 0.0), dict.fromkeys(updates, 0.0), 0.0
    for weight in track(names, "auditing weights"):
        deltas = {name: source.delta(weight) for name, source in sources.items()}
        parts = {name: decompose(delta) for name, delta in deltas.items()}
        for eta in etas:
            bases = {name: _basis(part, deltas[name].shape, eta, side) for name, part in parts.items()}
            for one, other in pairs:
                width = len(bases[one])
                expected = expected_overlap(bases[one].shape[1], bases[other].shape[1], width)
                overlaps[one, other][eta].append((overlap(bases[one], bases[other]), expected))
        if alignment is None:
            continue
        aligned += inner(deltas[SAFETY], deltas[SAFETY])
        for name in updates:
            energies[name] += inner(deltas[name], deltas[name])
            products[name] += inner(deltas[name], deltas[SAFETY])
        for kind in ("top", "random-directions", "random"):
            for fraction in fractions:
                random = generator_for("subspaces", seed, weight, kind)
                basis = _directions(deltas[SAFETY], fraction, kind, side, random)  # type: ignore[arg-type]
                for name in updates:
                    kept = _kept(deltas[name], basis, side)
                    sums[name][kind, fraction] = sums[name].get((kind, fraction), 0.0) + kept
    if alignment is not None and aligned == 0:
        raise UserError("The aligned model must differ from the base, got the same weights in both. Name other models.")
    figures: dict[str, Any] = {"weights": len(names), "side": side, "overlap": {}, "energy_kept": {}, "cosine": {}}
    for pair in pairs:
        figures["overlap"][" - ".join(pair)] = {f"{eta:g}": _averaged(rows) for eta, rows in overlaps[pair].items()}
    for name in updates if alignment is not None else ():
        energy = energies[name]
        figures["cosine"][name] = products[name] / sqrt(energy * aligned) if energy else None
        figures["energy_kept"][name] = {
            kind: {f"{fraction:g}": sums[name][kind, fraction] / energy if energy else None for fraction in fractions}
            for kind in ("top", "random-directions", "random")
        }
    return figures, _plots(figures), _verdict(figures, useful, harmful, alignment is not None)


def _basis(part: tuple[Tensor, Tensor, Tensor], shape: tuple[int, int], energy: float, side: Side) -> Float[Tensor, "width kept"]:
    left, values, right = part
    values = values[: numerical_rank(values, shape)]
    return (left if side == "left" else right.T)[:, : _modes(values, energy)].double()


def _kept(update: Delta, basis: Float[Tensor, "width kept"], side: Side) -> float:
    """Squared norm of the projection; of factors without a dense matrix."""
    if isinstance(update, LoraFactors):
        up, down = update.up.double() * update.scale, update.down.double()
        moved = LoraFactors(down, basis.T @ up, 1.0) if side == "left" else LoraFactors(down @ basis, up, 1.0)
        return inner(moved, moved)
    matrix = update.delta().double()
    return float((basis.T @ matrix if side == "left" else matrix @ basis).square().sum())


def _averaged(rows: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Mean over the weights with Student's interval, and the random expectation; unchanged weights are left out."""
    known = [(value, expected) for value, expected in rows if value == value]
    if not known:
        return {"mean": None, "interval": None, "random": None, "weights": 0}
    values = np.array([value for value, _ in known])
    interval = asdict(t_interval(values)) if len(values) > 1 else None
    return {
        "mean": float(values.mean()),
        "interval": interval,
        "random": float(np.mean([expected for _, expected in known])),
        "weights": len(known),
    }


def _plots(figures: Mapping[str, Any]) -> list[Curves]:
    def line(rows: Mapping[str, Any], what: str) -> list[tuple[float, float]]:
        return [(float(eta), row[what]) for eta, row in rows.items() if row[what] is not None]

    found = {name: line(rows, "mean") for name, rows in figures["overlap"].items()}
    first = next(iter(figures["overlap"]))
    found[f"random, as {first}"] = line(figures["overlap"][first], "random")
    plots = [Curves("overlap of mode subspaces", "share of energy", "overlap", found)]
    if figures["energy_kept"]:
        kept = {
            name if kind == "top" else f"{kind}: {name}": [
                (float(f), value) for f, value in rows[kind].items() if value is not None
            ]
            for name, rows in figures["energy_kept"].items()
            for kind in ("top", "random-directions", "random")
        }
        plots.append(Curves("energy along the alignment's directions", "share of directions", "energy kept", kept))
    return plots


def _verdict(figures: Mapping[str, Any], useful: Sequence[str], harmful: Sequence[str], aligned: bool) -> list[str]:
    said = []
    middle = {
        pair: next((row for eta, row in rows.items() if float(eta) == 0.5), None) for pair, rows in figures["overlap"].items()
    }
    for pair, row in middle.items():
        if row and row["mean"] is not None:
            limits = f" [{row['interval']['low']:.3f}, {row['interval']['high']:.3f}]" if row["interval"] else ""
            said.append(
                f"{pair}: overlap {row['mean']:.3f}{limits} at half of the energy, where random subspaces have {row['random']:.3f}."
            )
    if aligned and useful and harmful:
        told = {name: middle[f"{SAFETY} - {name}"]["mean"] for name in (*useful, *harmful)}  # type: ignore[index]
        if None in told.values():
            return [*said, "A useful or harmful update changes nothing: the overlaps cannot be compared."]
        gap = float(np.mean([told[name] for name in harmful]) - np.mean([told[name] for name in useful]))
        what = "overlap the alignment more than" if gap >= DISTINCT else "do not overlap the alignment more than"
        said.append(
            f"Harmful updates {what} useful ones: the difference is {gap:+.3f}, and from {DISTINCT} on it would count. "
            + (
                "A safety subspace can be told apart here."
                if gap >= DISTINCT
                else "No distinct safety subspace shows in the weights."
            )
        )
    else:
        said.append("No useful and harmful update were named, so whether a safety subspace is distinct was not asked.")
    said.append("What the projected updates do to the model's answers was not measured by this.")
    return said
