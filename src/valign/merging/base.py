"""What a merge is to the table `MERGES`: a frozen dataclass of options that is called with experts."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from valign.checks import check_options, refuse_idle
from valign.merging.deltas import Delta
from valign.merging.experts import Expert
from valign.models.diffusion.base import DiffusionModel


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a merge that looks at activations is given; the model is loaded when it is called for."""

    model: Callable[[], DiffusionModel]
    prompts: Mapping[str, Sequence[str]]  # unsafe prompts by category
    captions: Sequence[str] = ()  # benign, for a merge with `MergeMethod.preserves`
    edits: Sequence[tuple[str, str]] = ()  # concepts and what to generate in their place, likewise
    model_name: str = ""  # as the user gave it, for the record


@dataclass(frozen=True, kw_only=True)
class MergeContext:
    """What a merge gets besides experts and options, and where it leaves what the caller may want to see."""

    allow_base_mismatch: bool = False  # accept experts of different base models
    calibration: Calibration | None = None  # only for merges with `MergeMethod.calibrated`
    folder: Path | None = None  # for reports beside the adapter
    kept: Path | None = None  # folder where merges of these experts at other weights find what does not depend on the weights
    keep_votes: bool = False  # also keep in ``folder`` what another merge of these experts can start from
    errors: MutableMapping[str, float] = field(default_factory=dict)  # filled: relative Frobenius error of a truncation, by module
    results: MutableMapping[str, Any] = field(default_factory=dict)  # filled: JSON-able findings, such as ``shares`` by expert


@dataclass(frozen=True, kw_only=True)
class MergeMethod(ABC):
    """A merge and its options. The first line of a subclass's docstring is the help of its command."""

    calibrated: ClassVar[bool] = False  # may need a `Calibration`
    preserves: ClassVar[bool] = False  # the calibration also needs benign captions, and may have edits
    grid: ClassVar[tuple[Mapping[str, float], ...]] = ()  # candidates, weakest first: the strength (``weight`` or scale), options
    recorded: ClassVar[tuple[str, ...]] = ()  # options that the chain's adapters name in their record
    example: ClassVar[str] = "runs/hate runs/violence -o runs/merged"  # arguments, for the help

    def __post_init__(self) -> None:
        check_options(self)
        refuse_idle(self)

    @property
    def needs_calibration(self) -> bool:
        """Whether the context must have a `Calibration`."""
        return self.calibrated

    @abstractmethod
    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        """Check everything, then return the merged changes in sorted order, made one module at a time."""

    def record(self, experts: Sequence[Expert], context: MergeContext) -> dict[str, Any]:
        """All that shapes the result besides experts and seed; JSON-able."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "seed"}
