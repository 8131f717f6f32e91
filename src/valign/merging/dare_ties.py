"""DARE: drop random entries of each expert's change and rescale the rest (arXiv 2311.03099), then elect signs as TIES does."""

import hashlib
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from valign.checks import check_choice, check_range
from valign.merging.experts import Expert, compatible
from valign.merging.ties import Normalize, Parts, stream_elected
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors

METHOD = Method(
    slug="dare-ties",
    title="DARE with sign election",
    paper="arXiv 2311.03099",
    room="merging",
    entry="valign.merging.dare_ties:merge_dare_ties",
)


def merge_dare_ties(
    experts: Sequence[Expert],
    *,
    density: float = 0.5,
    seed: int = 0,
    normalize: Normalize = "weights",
    scale: float = 1.0,
    rank: int | None = None,
    errors: MutableMapping[str, float] | None = None,
    allow_base_mismatch: bool = False,
) -> Iterator[tuple[str, LoraFactors]]:
    """Drop, rescale, elect and add, entry by entry on dense deltas, one module at a time; the result is truncated to ``rank``.

    Args:
        density: Fraction of the entries that is KEPT, in (0, 1]; the paper's drop rate is ``1 - density``.
        seed: Of the draws. Each expert's mask in each module depends on this, the module's and the expert's name alone, so neither
            the order of modules nor that of experts matters.
        normalize, scale, rank, errors: As in `merge_ties`.
    """
    check_range("merge_dare_ties.density", density, above=0, high=1)
    check_choice("merge_dare_ties.normalize", normalize, ("weights", "count", "none"))
    check_range("merge_dare_ties.scale", scale)
    check_range("merge_dare_ties.rank", rank or 1, low=1)
    modules = compatible("merge_dare_ties", experts, allow_base_mismatch=allow_base_mismatch)

    def deltas(module: str) -> Parts:
        return lambda: (
            (expert.weight, drop(expert.file.factors(module).delta(), density, generator(seed, module, expert.name)))
            for expert in experts
        )

    return stream_elected(experts, modules, deltas, normalize=normalize, scale=scale, rank=rank, errors=errors)


def drop(delta: Float[Tensor, "fan_out fan_in"], density: float, random: torch.Generator) -> Float[Tensor, "fan_out fan_in"]:
    """Keep each entry with probability ``density`` and divide it by that, so that the expected delta is unchanged."""
    return delta * (torch.rand(delta.shape, generator=random) < density) / density


def generator(seed: int, module: str, expert: str) -> torch.Generator:
    """A generator of its own for every module of every expert."""
    digest = hashlib.sha256(f"{seed}\n{module}\n{expert}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
