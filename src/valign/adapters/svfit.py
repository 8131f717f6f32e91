"""SVFit: train the top singular values of each weight (Sun et al., arXiv 2409.05926)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.adapters.singular import SingularLayer
from valign.adapters.tuner import TunerConfig, TunerModel, TunerType
from valign.checks import check_range
from valign.methods import Method

METHOD = Method(
    slug="svfit",
    title="SVFit: trains the top singular values of each weight",
    paper="arXiv 2409.05926",
    room="adapters",
    entry="valign.adapters.svfit:SvfitConfig",
    fidelity="exact",
    note="the paper's trained singular values; that its 99 % of the information are of squares is our reading",
)


@dataclass
class SvfitConfig(TunerConfig):
    """``W' = W + U_r diag(s - S_r) Vh_r`` with the top r of ``W = U diag(S) Vh``; r numbers per weight are trained.

    No reference code is public; what the paper's abstract leaves open is marked "our choice".

    Raises: ValueError for both r and energy, or one out of range; with r above a weight's smaller side when the model is made.
    """

    kind: ClassVar[TunerType] = TunerType("VALIGN_SVFIT")
    truncate: ClassVar[bool] = False  # the rest of the spectrum stays, frozen
    offset: ClassVar[bool] = False

    r: int | None = None  # singular values per weight; all of them when neither r nor energy is given (the paper's 16x saving)
    energy: float | None = None  # (0, 1]: the smallest r that holds this share of the sum of S^2 (our choice: of squares)
    clamp_nonnegative: bool = False  # hold s at 0 or above; the paper states no constraint
    save_basis: bool = False  # save U_r and Vh_r too, r * (fan_in + fan_out) numbers, so that load needs no agreement of SVDs
    convs: bool = False  # allow convolutions, as matrices [out, in * kernel] (our choice; the paper adapts linear layers)

    @classmethod
    def model_class(cls) -> type[TunerModel]:
        return SvfitModel

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.energy is not None:
            raise ValueError(f"SvfitConfig must have r or energy, got both r={self.r} and energy={self.energy}.")
        if self.r is not None:
            check_range("SvfitConfig.r", self.r, low=1)
        if self.energy is not None:
            check_range("SvfitConfig.energy", self.energy, above=0.0, high=1.0)

    def rank_of(self, values: Float[Tensor, " k"], shape: tuple[int, int], module: str) -> int:
        """How many of these singular values (falling) of a weight of ``shape`` are trained."""
        if self.r is not None:
            check_range("SvfitConfig.r", self.r, low=1, high=len(values), hint=f"{module} is {shape[0]} x {shape[1]}.")
            return self.r
        return len(values) if self.energy is None else rank_for_energy(values, self.energy, max(shape))


def rank_for_energy(values: Float[Tensor, " k"], energy: float, longest: int) -> int:
    """Smallest r >= 1 with ``sum_{i<=r} S_i^2 >= energy * sum S^2``; the numerical rank of a matrix with that longest side at 1."""
    share = values.double().square().cumsum(0)
    rank = int((share < energy * share[-1]).sum()) + 1
    numerical = int((values > longest * torch.finfo(values.dtype).eps * values[0]).sum())
    return max(1, min(rank, numerical))


class SvfitModel(TunerModel):
    """peft's tuner for `SvfitConfig`."""

    tuner_layer_cls = SingularLayer


@dataclass(frozen=True, kw_only=True)
class SvfitOptions(AdapterOptions):
    """`SvfitConfig` as an adapter."""

    r: int | None = None  # singular values per module; None is all of them
    learning_rate: float = 1e-2

    def attach(self, context: AttachContext) -> AdapterHandle:
        return AdapterHandle(attach_peft(context, SvfitConfig(target_modules=list(context.targets), r=self.r)))
