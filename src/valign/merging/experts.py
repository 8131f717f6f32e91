"""The experts that go into a merge, and the checks that they belong together."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from valign.checks import UserError, check_range
from valign.merging.deltas import Delta, DeltaSource, DenseDelta

LISTED = 5  # modules named in one message
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Expert:
    """Changes of weight under a name. ``weight`` multiplies the dense changes: any finite number, never squared."""

    name: str
    file: DeltaSource  # an opened adapter, or `NamedDeltas`
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_range(f"Expert({self.name}).weight", self.weight)

    def factors(self, module: str) -> Delta:
        """One module's change, float32, scale 1, ``weight`` folded in."""
        return self.file.factors(module).folded(self.weight)


def compatible(
    who: str, experts: Sequence[Expert], *, allow_base_mismatch: bool = False, equal_ranks: bool = False, finite: bool = True
) -> list[str]:
    """The modules of ``experts``, sorted, after every check that a merge needs. Reads one module of one expert at a time.

    Args:
        who: The caller, for messages.
        allow_base_mismatch: Accept experts that were trained on different base models.
        equal_ranks: Refuse experts of different rank, and dense ones, which have no factors.
        finite: Also read all changes and refuse NaN and infinity.
    Raises: UserError for no expert, names given twice, and experts that differ in base model, modules or shapes (listed).
    """
    if not experts:
        raise UserError(f"{who}.experts must not be empty, got 0 experts. Name at least one adapter folder.")
    names = [expert.name for expert in experts]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{who}.experts must have different names, got {', '.join(twice)} twice. Write NAME=FOLDER to name them.")
    if not allow_base_mismatch:
        _check_bases(who, experts)
    first = experts[0]
    dense = [expert.name for expert in experts if any(isinstance(entry, DenseDelta) for entry in expert.file.entries.values())]
    if dense and equal_ranks:
        raise UserError(f"{who}.experts must be low-rank for this granularity, got dense: {listed(dense)}. Use 'output'.")
    for expert in experts[1:]:
        _check_same(who, first, expert, equal_ranks)
    for expert in experts if finite else ():
        for module, delta in expert.file.items():
            tensors = (delta.matrix,) if isinstance(delta, DenseDelta) else (delta.down, delta.up)
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise UserError(f"{who}: {expert.name} must be finite, got NaN or infinity in {module}. Train it again.")
    return first.file.modules


def _check_bases(who: str, experts: Sequence[Expert]) -> None:
    """Bases that are not recorded (adapters made elsewhere) are taken on trust, with a warning."""
    for key, what in (("base_fingerprint", "one base model"), ("prediction", "models of one prediction type")):
        known = {expert.name: str(said) for expert in experts if (said := expert.file.metadata.get(key))}
        if len(set(known.values())) > 1:
            listed = ", ".join(f"{name} {said[:12]}" for name, said in known.items())
            raise UserError(f"{who}.experts must come from {what}, got {listed}. Train them on one, or go on anyway (--anyway).")
    silent = [expert.name for expert in experts if not expert.file.metadata.get("base_fingerprint")]
    if silent:
        log.warning("%s: no record says what base model %s was made for; whether they fit is unknown.", who, ", ".join(silent))


def _check_same(who: str, first: Expert, expert: Expert, equal_ranks: bool) -> None:
    mine, other = first.file.entries, expert.file.entries
    lone = sorted(set(mine) ^ set(other))
    if lone:
        raise UserError(
            f"{who}.experts must adapt the same modules; only one of {first.name} and {expert.name} has {listed(lone)}. "
            "Train them with the same targets."
        )
    shapes = {name: f"{mine[name].shape} and {other[name].shape}" for name in sorted(mine) if mine[name].shape != other[name].shape}
    if shapes:
        raise UserError(f"{who}.experts must have the same shapes; {first.name} and {expert.name} differ in {_pairs(shapes)}.")
    ranks = {name: f"{mine[name].rank} and {other[name].rank}" for name in sorted(mine) if mine[name].rank != other[name].rank}
    if ranks and equal_ranks:
        raise UserError(
            f"{who}.experts must have the same rank for this granularity; {first.name} and {expert.name} have {_pairs(ranks)}. "
            "Use granularity 'output', which takes any ranks."
        )


def listed(names: Sequence[str]) -> str:
    """Some names for a message."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _pairs(differences: Mapping[str, str]) -> str:
    return listed([f"{name} ({what})" for name, what in differences.items()])
