"""NOLA: LoRA factors as trained combinations of frozen random matrices (Koohpayegani et al., arXiv 2310.02556)."""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.adapters.tuner import TunerConfig, TunerModel, TunerType, check_dropout
from valign.adapters.tuner_layer import Buffers, Factors, TunerLayer, module_seed
from valign.checks import check_range
from valign.methods import Method

METHOD = Method(
    slug="nola",
    title="NOLA: LoRA factors as combinations of frozen random matrices",
    paper="arXiv 2310.02556",
    room="adapters",
    entry="valign.adapters.nola:NolaConfig",
    fidelity="exact",
    note="the released training code's form; each random matrix has a seed from the module's name, so that a file "
    "needs no matrices",
)

CHUNK = 2**22  # random numbers in memory at a time, 16 MiB; a factor that is larger is one chunk
FINGERPRINT = 10  # numbers of the first basis matrix that are saved to notice another random generator
SAME_NUMBERS = 0.01  # relative difference of fingerprints; half precision moves them by at most 0.004


@dataclass
class NolaConfig(TunerConfig):
    """``W' = W + (alpha / r) (sum_j b_j B_j) (A_0 + sum_i a_i A_i)``; only the coefficients a and b are trained, both from 0.

    ``A_i``, ``B_j`` are Uniform(-1, 1) / sqrt(number of them), ``A_0`` is LoRA's start, ``Uniform(-1, 1) / sqrt(fan_in)``.
    All are drawn again from seeds wherever they are needed, so an adapter file holds coefficients and a fingerprint. This is the
    authors' training code; their README listing (no 1 / sqrt) and their ViT code (no A_0, non-zero start) differ.

    Raises: ValueError for a size below 1, alpha not above 0, a seed outside [0, 2^63), a dropout outside [0, 1].
    """

    kind: ClassVar[TunerType] = TunerType("VALIGN_NOLA")

    r: int = 8  # rank of the change; does not count in what is trained
    num_basis_a: int = 256  # matrices that A is made of; 512 for GPT-2 medium and LLaMA-2, 1024 for ViT in the authors' scripts
    num_basis_b: int = 256
    alpha: float | None = None  # the change is scaled by alpha / r; r when not given (the scripts: 8, 2 and 4 at r = 8, 8 and 16)
    dropout: float = 0.0  # on the input of the change
    seed: int = 0  # each factor of each module has a seed of its own, made from this, the module's name and the factor's
    materialize: bool = False  # keep the basis in memory, num_basis_a r fan_in + num_basis_b r fan_out floats: faster, large

    @classmethod
    def model_class(cls) -> type[TunerModel]:
        return NolaModel

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_basis_a", "num_basis_b"):
            check_range(f"NolaConfig.{name}", getattr(self, name), low=1)
        if self.alpha is not None:
            check_range("NolaConfig.alpha", self.alpha, above=0.0)
        check_range("NolaConfig.seed", self.seed, low=0, high=2**63 - 1)
        check_dropout("NolaConfig", self.dropout)


@dataclass(frozen=True)
class Basis:
    """``count`` random matrices of ``shape``, Uniform(-1, 1) / sqrt(count), drawn in float32 on the CPU for every device."""

    seed: int
    count: int
    shape: tuple[int, int]

    def draw(self, most: int | None = None) -> Float[Tensor, "chunk rows columns"]:
        """The first ``most`` matrices, or all of them."""
        return next(self.chunks(self.count if most is None else most))

    def chunks(self, size: int | None = None) -> Iterator[Float[Tensor, "chunk rows columns"]]:
        """All matrices in order, ``size`` at a time; how they are cut does not change them."""
        generator = torch.Generator().manual_seed(self.seed)
        size = max(1, CHUNK // math.prod(self.shape)) if size is None else size
        for first in range(0, self.count, size):
            unit = torch.rand(min(size, self.count - first), *self.shape, generator=generator)
            yield unit.mul_(2).sub_(1).div_(math.sqrt(self.count))


class Combine(torch.autograd.Function):
    """``sum_i coefficients_i basis_i``, summed in at least float32; the backward pass draws the basis again, no graph holds it."""

    @staticmethod
    def forward(ctx: Any, coefficients: Tensor, basis: Basis) -> Tensor:
        ctx.basis = basis
        wide = coefficients.to(torch.promote_types(coefficients.dtype, torch.float32))
        total = wide.new_zeros(basis.shape)
        first = 0
        for chunk in basis.chunks():
            total += torch.einsum("i,irc->rc", wide[first : first + len(chunk)], chunk.to(wide))
            first += len(chunk)
        return total.to(coefficients)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return torch.cat([torch.einsum("rc,irc->i", wide, chunk.to(wide)) for chunk in ctx.basis.chunks()]).to(gradient), None


class NolaLayer(TunerLayer):
    """Coefficients, and what is needed to draw their matrices again."""

    adapter_layer_names = ("vtune_a", "vtune_b")
    other_param_names = (
        *TunerLayer.other_param_names,
        "vtune_fingerprint",
        "vtune_offset",
        "vtune_basis_a",
        "vtune_basis_b",
        "bases",
        "scale",
    )

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        super().__init__(base_layer, module)
        self.vtune_a, self.vtune_b = nn.ParameterDict(), nn.ParameterDict()  # [num_basis_a], [num_basis_b]
        self.vtune_offset = Buffers()  # A_0 [r, fan_in], not saved
        self.vtune_fingerprint = Buffers()
        self.vtune_basis_a, self.vtune_basis_b = Buffers(), Buffers()  # with materialize only, not saved
        self.bases: dict[str, tuple[Basis, Basis]] = {}
        self.scale: dict[str, float] = {}

    def start(self, adapter: str, config: Any) -> None:
        if config.r > min(self.fan_in, self.fan_out):
            warnings.warn(
                f"NolaConfig.r is {config.r}, above the smaller side of {self.module} ({self.fan_out} x {self.fan_in}).",
                stacklevel=2,
            )
        seeds = {factor: module_seed(config.seed, self.module, factor) for factor in ("A", "B", "A0")}
        a = Basis(seeds["A"], config.num_basis_a, (config.r, self.fan_in))
        b = Basis(seeds["B"], config.num_basis_b, (self.fan_out, config.r))
        device = self.weight.device
        offset = torch.rand(config.r, self.fan_in, generator=torch.Generator().manual_seed(seeds["A0"]))
        self.bases[adapter], self.scale[adapter] = (a, b), 1.0 if config.alpha is None else config.alpha / config.r
        self.vtune_a[adapter] = nn.Parameter(torch.zeros(a.count, dtype=self.dtype, device=device))
        self.vtune_b[adapter] = nn.Parameter(torch.zeros(b.count, dtype=self.dtype, device=device))
        self.vtune_offset.put(adapter, offset.mul_(2).sub_(1).div_(math.sqrt(self.fan_in)).to(self.dtype), saved=False)
        self.vtune_fingerprint.put(adapter, a.draw(1).flatten()[:FINGERPRINT].clone(), saved=True)
        if config.materialize:
            self.vtune_basis_a.put(adapter, a.draw().to(self.dtype), saved=False)
            self.vtune_basis_b.put(adapter, b.draw().to(self.dtype), saved=False)

    def factors(self, adapter: str) -> Factors:
        a, b = self.vtune_a[adapter], self.vtune_b[adapter]
        with torch.autocast(self.weight.device.type, enabled=False):  # the sums in float32, what follows as autocast has it
            if adapter in self.vtune_basis_a:
                down = torch.einsum("i,irc->rc", a, self.vtune_basis_a[adapter])
                up = torch.einsum("i,irc->rc", b, self.vtune_basis_b[adapter])
            else:
                basis_a, basis_b = self.bases[adapter]
                down, up = Combine.apply(a, basis_a), Combine.apply(b, basis_b)
        return Factors(self.vtune_offset[adapter] + down, up * self.scale[adapter])

    def before_load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        """Refuse coefficients whose random matrices cannot be drawn here."""
        theirs, ours = saved.get("vtune_fingerprint"), self.vtune_fingerprint[adapter]
        if theirs is None:
            return
        if theirs.shape != ours.shape or not torch.allclose(
            theirs.cpu().float(), ours.cpu().float(), SAME_NUMBERS, SAME_NUMBERS**2
        ):
            raise ValueError(
                f"{self.module} must draw the random matrices that the adapter was trained with, got others. Use the same seed and "
                "module names, or the torch release that wrote it; merged weights and LoRA exports depend on neither."
            )


class NolaModel(TunerModel):
    """peft's tuner for `NolaConfig`."""

    tuner_layer_cls = NolaLayer


@dataclass(frozen=True, kw_only=True)
class NolaOptions(AdapterOptions):
    """`NolaConfig` as an adapter."""

    r: int = 8
    basis: int = 64  # random matrices per factor: 2 basis numbers are trained per module
    learning_rate: float = 4e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        seed = context.generator("basis").initial_seed()
        sizes = {"r": self.r, "num_basis_a": self.basis, "num_basis_b": self.basis}
        config = NolaConfig(target_modules=list(context.targets), seed=seed, **sizes)  # type: ignore[arg-type]
        return AdapterHandle(attach_peft(context, config))
