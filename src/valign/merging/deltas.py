"""Changes of weight by module name, low-rank or dense: what merges take and give."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from valign.files import hash_value
from valign.models.files.adapter_files import LoraFactors
from valign.models.files.layouts import PREFIXES

STRETCH = 2**14  # products that `inner` sums in float32


@dataclass(frozen=True)
class DenseDelta:
    """One module's change of weight as a matrix; it has the methods of `LoraFactors` that need no factors."""

    matrix: Float[Tensor, "fan_out fan_in"]

    @property
    def rank(self) -> int:
        """The highest rank that the matrix can have."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """``(fan_out, fan_in)``."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def folded(self, weight: float = 1.0) -> "DenseDelta":
        """The same change times ``weight``, in float32."""
        return DenseDelta(self.matrix.float() if weight == 1 else self.matrix.float() * weight)

    def delta(self) -> Float[Tensor, "fan_out fan_in"]:
        """The matrix, float32 at least."""
        return self.matrix.to(torch.promote_types(self.matrix.dtype, torch.float32))


Delta = LoraFactors | DenseDelta


@runtime_checkable
class Sized(Protocol):
    """Rank and shape of a module's change, known before it is read."""

    @property
    def rank(self) -> int: ...
    @property
    def shape(self) -> tuple[int, int]: ...


@runtime_checkable
class DeltaSource(Protocol):
    """Where an expert's changes come from: an `AdapterFile`, read module by module, or `NamedDeltas` in memory."""

    @property
    def modules(self) -> list[str]: ...
    @property
    def entries(self) -> Mapping[str, Sized]: ...
    @property
    def metadata(self) -> Mapping[str, Any]: ...
    @property
    def prefix(self) -> str: ...  # of the adapted component's keys in an adapter file
    def factors(self, module: str) -> Delta: ...
    def items(self) -> Iterator[tuple[str, Delta]]: ...
    def fingerprint(self) -> str: ...


@dataclass(frozen=True)
class NamedDeltas:
    """Changes of weight in memory, each low-rank or dense."""

    entries: Mapping[str, Delta]
    metadata: Mapping[str, Any] = field(default_factory=dict)  # as in an adapter's record: base_fingerprint, category, ...
    prefix: str = PREFIXES[0]

    @property
    def modules(self) -> list[str]:
        """Names, sorted."""
        return sorted(self.entries)

    def factors(self, module: str) -> Delta:
        """One module's change."""
        return self.entries[module]

    def items(self) -> Iterator[tuple[str, Delta]]:
        """Every module in sorted order."""
        return ((module, self.entries[module]) for module in self.modules)

    def fingerprint(self) -> str:
        """SHA-256 over names and dense changes, hex."""
        return hash_value({module: sha256(delta.delta().numpy().tobytes()).hexdigest() for module, delta in self.items()})


def add(parts: Sequence[Delta]) -> Delta:
    """The exact sum, float32: factors are stacked, and the rank is the sum of the ranks; with one matrix among them, a matrix."""
    factors = [part.folded() for part in parts if isinstance(part, LoraFactors)]
    if len(factors) < len(parts):
        total = parts[0].delta().clone()
        for part in parts[1:]:
            total += part.delta()
        return DenseDelta(total)
    return LoraFactors(torch.cat([part.down for part in factors]), torch.cat([part.up for part in factors], dim=1), 1.0)


def minus(a: Delta, b: Delta) -> Delta:
    """The exact difference, float32: of factors, their stack."""
    if isinstance(a, LoraFactors) and isinstance(b, LoraFactors):
        return add([a, b.folded(-1.0)])
    return DenseDelta(a.delta() - b.delta())


def zero(shape: tuple[int, int]) -> LoraFactors:
    """No change at all, of rank 0: it adds nothing to a sum, not even memory."""
    return LoraFactors(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0), 1.0)


def inner(a: Delta, b: Delta) -> float:
    """``<delta_a, delta_b>`` (Frobenius), summed in float64; of factors ``tr((up_b^T up_a) (down_a down_b^T))``, never dense.

    Of float32 matrices, stretches of `STRETCH` products are summed in float32: without copies in float64, to 1e-6 of the norms.
    """
    if isinstance(a, LoraFactors) and isinstance(b, LoraFactors):
        ups, downs = b.up.double().T @ a.up.double(), a.down.double() @ b.down.double().T
        return a.scale * b.scale * float((ups * downs.T).sum())
    one, other = a.delta(), b.delta()
    if one.dtype != torch.float32 or other.dtype != torch.float32:
        return float((one.double() * other.double()).sum())
    stretches = zip(one.reshape(-1).split(STRETCH), other.reshape(-1).split(STRETCH))
    return sum(float(torch.dot(x, y)) for x, y in stretches)
