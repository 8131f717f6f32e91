"""Safety and task vectors by weight: the difference of two folders, an adapter, or changes in memory, read one weight at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

from torch import Tensor

from valign.checks import UserError
from valign.files import hash_value
from valign.merging.deltas import Delta, DeltaSource, DenseDelta, add, zero
from valign.models.files.finite import all_finite
from valign.models.files.weight_files import WeightFolder

WEIGHT = ".weight"  # of a module's weight; adapters name modules, folders name weights


@dataclass(frozen=True)
class WeightVectors:
    """What was changed in one weight. A weight of other than two dimensions is a matrix of its first by all others."""

    name: str
    safety: Delta  # aligned - base
    tasks: tuple[Delta, ...]  # each fine-tuned model - its start
    ndim: int = 2  # of the weight itself

    def __post_init__(self) -> None:
        for task in self.tasks:
            if task.shape != self.safety.shape:
                raise ValueError(f"{self.name} must have one shape, got {self.safety.shape} and {task.shape}.")


@runtime_checkable
class Changes(Protocol):
    """Changes of weight under the names of the weights."""

    @property
    def names(self) -> Sequence[str]: ...  # sorted
    def shape(self, name: str) -> tuple[int, int]: ...
    def ndim(self, name: str) -> int: ...
    def delta(self, name: str) -> Delta: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class FolderChanges:
    """``after - before`` of two folders, without the weights in ``left_out``."""

    after: WeightFolder
    before: WeightFolder
    left_out: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> Sequence[str]:
        return [name for name in self.after.shapes if name not in self.left_out]

    def shape(self, name: str) -> tuple[int, int]:
        return as_matrix_shape(self.after.shapes[name].shape)

    def ndim(self, name: str) -> int:
        return len(self.after.shapes[name].shape)

    def delta(self, name: str) -> Delta:
        """Raises: UserError if one of the two is not finite."""
        change = finite(self.after, name).float() - finite(self.before, name).float()
        return DenseDelta(change.reshape(self.shape(name)))

    def fingerprint(self) -> str:
        return hash_value([self.after.fingerprint(), self.before.fingerprint()])


@dataclass(frozen=True)
class AdapterChanges:
    """An opened adapter's, or `NamedDeltas`; ``suffix`` makes a weight's name of a module's."""

    source: DeltaSource
    suffix: str = WEIGHT

    @cached_property
    def names(self) -> Sequence[str]:
        return sorted(f"{module}{self.suffix}" for module in self.source.modules)

    def shape(self, name: str) -> tuple[int, int]:
        return self.source.entries[name.removesuffix(self.suffix)].shape

    def ndim(self, name: str) -> int:
        return 2

    def delta(self, name: str) -> Delta:
        return self.source.factors(name.removesuffix(self.suffix))

    def fingerprint(self) -> str:
        return self.source.fingerprint()


class Vectors:
    """Safety and task vectors of all weights.

    Args:
        safety: ``aligned - base``.
        tasks: By the fine-tuned models' names: ``fine-tuned - start``.
        continued: The tasks are against the base although their start is the aligned model: the safety vector is taken off them.
        names: The weights that are asked for; None is all that any of these changes.
    Raises: UserError without a task.
    """

    def __init__(
        self, safety: Changes, tasks: Mapping[str, Changes], *, continued: bool = False, names: Sequence[str] | None = None
    ) -> None:
        if not tasks:
            raise UserError("A realignment must have at least one fine-tuned model, got none. Name it by --finetuned.")
        self.safety, self.tasks, self.continued = safety, dict(tasks), continued
        self._has = [set(one.names) for one in (safety, *self.tasks.values())]
        self.names = sorted(set.union(*self._has)) if names is None else list(names)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the fine-tuned models."""
        return tuple(self.tasks)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, name: str) -> WeightVectors:
        """The vectors of one weight."""
        sources = [self.safety, *self.tasks.values()]
        holders = [source for source, has in zip(sources, self._has) if name in has]
        shape, ndim = holders[0].shape(name), holders[0].ndim(name)
        safety, *tasks = [source.delta(name) if name in has else zero(shape) for source, has in zip(sources, self._has)]
        if self.continued:
            tasks = [add([task, safety.folded(-1.0)]) for task in tasks]
        return WeightVectors(name, safety, tuple(tasks), ndim)

    def items(self) -> Iterator[WeightVectors]:
        """Every weight in sorted order, one in memory at a time."""
        return (self.read(name) for name in self.names)

    def fingerprint(self) -> str:
        """SHA-256 over what all of these were read from, hex."""
        return hash_value(
            [self.safety.fingerprint(), {name: one.fingerprint() for name, one in self.tasks.items()}, self.continued]
        )


def as_matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """``(first, all others)``; a vector is a column, a number a 1 x 1 matrix."""
    first = shape[0] if shape else 1
    rest = 1
    for size in shape[1:]:
        rest *= size
    return first, rest


def finite(folder: WeightFolder, name: str) -> Tensor:
    """One tensor of a folder, not to be written into: asked for again at once, it is not read again.

    Raises: UserError if it holds NaN or infinity.
    """
    if name in folder.latest:
        return folder.latest[name]
    folder.latest.clear()  # before the next is read: one tensor of a folder is in memory
    tensor = folder.read(name)
    if not all_finite(tensor):
        raise UserError(f"{folder.folder} must be finite, got NaN or infinity in {name}. Download the model, or train it, again.")
    folder.latest[name] = tensor
    return tensor
