"""Merges in three steps for each module: sparsify the experts' changes, find a consensus, rescale it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from valign.merging.base import MergeContext, MergeMethod
from valign.merging.compress import compress_dense
from valign.merging.deltas import Delta, DenseDelta, add
from valign.merging.experts import Expert, compatible

Parts = Callable[[], Iterator[tuple[float, Delta]]]  # (weight, sparse delta) of every expert, made anew at each call


@dataclass(frozen=True, kw_only=True)
class DeltaMerge(MergeMethod):
    """A subclass replaces the steps in which it differs from the exact sum.

    Where all experts are low-rank, a dense consensus is truncated to the option ``rank`` if it is set, otherwise to the sum of the
    experts' ranks, so that the result is an adapter again. With a dense expert it is truncated only if ``rank`` is set.
    """

    def sparsify(self, delta: Delta, module: str, expert: str) -> Delta:
        """One expert's change with some entries set to 0; as it is if the method keeps all."""
        return delta

    def consensus(self, parts: Parts) -> Delta:
        """One change of the experts' sparse ones: their exact sum, low-rank if all are."""
        return add([delta.folded(weight) for weight, delta in parts()])

    def rescale(self, merged: Delta, experts: int) -> Delta:
        """The consensus times a factor."""
        return merged

    def combine(self, module: str, parts: Callable[[], Iterator[tuple[str, float, Delta]]], experts: int) -> Delta:
        """The three steps for one module; ``parts`` gives name, weight and change of each of the ``experts``, anew at each call."""

        def sparse() -> Iterator[tuple[float, Delta]]:
            for name, weight, delta in parts():
                yield weight, self.sparsify(delta, module, name)

        return self.rescale(self.consensus(sparse), experts)

    def __call__(self, experts: Sequence[Expert], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        modules = compatible(type(self).__name__, experts, allow_base_mismatch=context.allow_base_mismatch)
        return self._stream(experts, modules, context)

    def _stream(self, experts: Sequence[Expert], modules: Sequence[str], context: MergeContext) -> Iterator[tuple[str, Delta]]:
        for module in modules:

            def parts(module: str = module) -> Iterator[tuple[str, float, Delta]]:
                for expert in experts:
                    yield expert.name, expert.weight, expert.file.factors(module)

            merged = self.combine(module, parts, len(experts))
            entries = [expert.file.entries[module] for expert in experts]
            low_rank = not any(isinstance(entry, DenseDelta) for entry in entries)
            wanted = getattr(self, "rank", None) or (sum(entry.rank for entry in entries) if low_rank else None)
            if isinstance(merged, DenseDelta) and wanted:
                merged, context.errors[module] = compress_dense(merged.matrix, wanted)
            yield module, merged
