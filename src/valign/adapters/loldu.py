"""LoLDU: train the diagonal of a lower-diag-upper factorization (Shi et al., arXiv 2410.13618)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.adapters.tuner import TunerConfig, TunerModel, TunerType
from valign.adapters.tuner_layer import Buffers, Factors, TunerLayer, module_seed
from valign.checks import check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="loldu",
    title="LoLDU: trains the diagonal of a lower-diag-upper factorization",
    paper="arXiv 2410.13618",
    room="adapters",
    entry="valign.adapters.loldu:LolduConfig",
    fidelity="variant",
    note="every start subtracts its own numbers, so that step 0 changes nothing; the released code does so for four of "
    "its eight starts",
)

Start = Literal["lu", "uniform", "normal", "constant", "ones", "zeros", "unit_uniform", "unit_normal"]
STARTS: tuple[Start, ...] = ("lu", "uniform", "normal", "constant", "ones", "zeros", "unit_uniform", "unit_normal")
TINY_PIVOT = 1e-8  # of the largest; below it the upper factor is a division by (nearly) zero


@dataclass
class LolduConfig(TunerConfig):
    """``W' = W + P L_r diag(sigma z - sigma_0 z_0) U_r`` with ``W = P L diag(D) U``; z, r numbers per weight, is trained.

    The leading pivots are kept; an LU has no order of importance. L and U are not orthogonal, whatever the paper's summary says.
    Step 0 keeps the function for every ``init``: what is subtracted is the real start. In the released code the last four inits
    subtract D instead, which alone explains their collapse in the paper's ablation.

    Raises: ValueError for r below 1, alpha not above 0, an unknown init; when the model is made also for r above a weight's smaller
    side and for a pivot (nearly) 0 among the first r.
    """

    kind: ClassVar[TunerType] = TunerType("VALIGN_LOLDU")

    r: int = 32  # the paper: 32 for Stable Diffusion, 768 for ViT-B and RoBERTa, 1024 for LLaMA2-7B
    alpha: float | None = None  # sigma_0 = alpha / r; r when not given, the paper's choice (the code's default is 1)
    init: Start = (
        "lu"  # z_0: "lu" is D_r, the code's default; "uniform" is U(-|mu|/2, |mu|/2), mu = mean(D_r), the paper's best by 0.7
    )
    train_sigma: bool = False  # train the scale, too, as the paper's formula counts; the released code does not
    seed: int = 0  # of the random inits, [0, 2^63)
    convs: bool = False  # allow convolutions, as matrices [out, in * kernel] (our choice)

    @classmethod
    def model_class(cls) -> type[TunerModel]:
        return LolduModel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("LolduConfig.r", self.r, low=1)
        if self.alpha is not None:
            check_range("LolduConfig.alpha", self.alpha, above=0.0)
        check_choice("LolduConfig.init", self.init, STARTS)
        check_range("LolduConfig.seed", self.seed, low=0, high=2**63 - 1)


class LolduLayer(TunerLayer):
    """Saved are z, z_0 and the permutation: given it an LU is unique, whatever a backend chooses among near-ties."""

    adapter_layer_names = ("vtune_diagonal", "vtune_sigma")
    other_param_names = (*TunerLayer.other_param_names, "vtune_start", "vtune_rows", "vtune_down", "vtune_up", "sigma")
    reads_base = True

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        super().__init__(base_layer, module)
        self.vtune_diagonal = nn.ParameterDict()  # z, [r]
        self.vtune_sigma = nn.ParameterDict()  # the scale, [1], with train_sigma only
        self.vtune_start = Buffers()  # z_0, [r]
        self.vtune_rows = Buffers()  # int32 [fan_out]: row i of W is row vtune_rows[i] of L diag(D) U
        self.vtune_down, self.vtune_up = Buffers(), Buffers()  # U_r [r, fan_in], P L_r [fan_out, r]
        self.sigma: dict[str, float] = {}  # sigma_0

    def start(self, adapter: str, config: Any) -> None:
        matrix = self.matrix()
        check_range("LolduConfig.r", config.r, low=1, high=min(matrix.shape), hint=f"{self.module} is {tuple(matrix.shape)}.")
        parts = ldu(matrix, config.r, self.module)
        first = start_diagonal(parts.pivots, config.init, torch.Generator().manual_seed(module_seed(config.seed, self.module)))
        self.sigma[adapter] = 1.0 if config.alpha is None else config.alpha / config.r
        self.vtune_diagonal[adapter] = nn.Parameter(first.clone())
        if config.train_sigma:
            self.vtune_sigma[adapter] = nn.Parameter(
                torch.full((1,), self.sigma[adapter], dtype=matrix.dtype, device=matrix.device)
            )
        self.vtune_start.put(adapter, first, saved=True)
        self._put(adapter, parts)

    def _put(self, adapter: str, parts: "Ldu") -> None:
        self.vtune_rows.put(adapter, parts.rows.int(), saved=True)
        self.vtune_down.put(adapter, parts.upper, saved=False)
        self.vtune_up.put(adapter, parts.lower[parts.rows], saved=False)

    def factors(self, adapter: str) -> Factors:
        first = self.sigma[adapter]
        sigma = self.vtune_sigma.get(adapter, first)
        gain = sigma * self.vtune_diagonal[adapter] - first * self.vtune_start[adapter]
        return Factors(self.vtune_down[adapter], self.vtune_up[adapter] * gain)

    def before_load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        super().before_load(adapter, saved)
        rows = saved.get("vtune_rows")
        if rows is None or torch.equal(rows.cpu(), self.vtune_rows[adapter].cpu()):
            return
        rows = rows.to(self.weight.device).long()
        if not torch.equal(rows.sort().values, torch.arange(self.fan_out, device=rows.device)):
            raise ValueError(f"{self.module} must be saved with a permutation of {self.fan_out} rows, got another one.")
        self._put(adapter, ldu_in_order(self.matrix(), rows, len(self.vtune_start[adapter]), self.module))  # pivots differ here


class LolduModel(TunerModel):
    """peft's tuner for `LolduConfig`."""

    tuner_layer_cls = LolduLayer


@dataclass(frozen=True)
class Ldu:
    """The leading ``rank`` of ``matrix = (lower @ diag(pivots) @ upper)[rows]``; the product is exact at full rank."""

    lower: Float[Tensor, "fan_out rank"]  # unit lower trapezoidal, entries in [-1, 1] where pivots were chosen
    pivots: Float[Tensor, " rank"]
    upper: Float[Tensor, "rank fan_in"]  # unit upper trapezoidal
    rows: Int[Tensor, " fan_out"]


def ldu(matrix: Float[Tensor, "fan_out fan_in"], rank: int, module: str = "ldu.matrix") -> Ldu:
    """Factorize with partial pivoting, in the matrix's precision.

    Raises: ValueError for a pivot among the first ``rank`` below 1e-8 of the largest of all, which would be divided by.
    """
    permutation, lower, upper = torch.linalg.lu(matrix)
    check_pivots(upper.diagonal(), rank, module)
    pivots = upper.diagonal()[:rank].clone()
    return Ldu(lower[:, :rank].contiguous(), pivots, upper[:rank] / pivots[:, None], permutation.argmax(dim=1))


def ldu_in_order(
    matrix: Float[Tensor, "fan_out fan_in"], rows: Int[Tensor, " fan_out"], rank: int, module: str = "ldu.matrix"
) -> Ldu:
    """`ldu` with the order of rows given: Gaussian elimination in float64, without pivoting of its own."""
    rest = matrix.double()[rows.argsort()]
    lower, upper, pivots = rest.new_zeros(len(rest), rank), rest.new_zeros(rank, rest.shape[1]), rest.new_zeros(rank)
    for i in range(rank):
        pivots[i] = rest[i, i]
        check_pivots(pivots[: i + 1], i + 1, module)
        lower[i:, i], upper[i, i:] = rest[i:, i] / pivots[i], rest[i, i:] / pivots[i]
        rest[i:, i:] -= pivots[i] * torch.outer(lower[i:, i], upper[i, i:])
    return Ldu(lower.to(matrix.dtype), pivots.to(matrix.dtype), upper.to(matrix.dtype), rows)


def check_pivots(pivots: Float[Tensor, " count"], rank: int, module: str) -> None:
    sizes = pivots.abs()
    leading = sizes[:rank]
    if not leading.min() > TINY_PIVOT * sizes.max():
        raise ValueError(
            f"{module} must have {rank} leading pivots that are not 0, got {leading.min().item():.3g} as number "
            f"{int(leading.argmin()) + 1}. The weight is (nearly) singular there: use a smaller r, or leave the module out."
        )


def start_diagonal(pivots: Float[Tensor, " rank"], init: Start, generator: torch.Generator) -> Float[Tensor, " rank"]:
    """``z_0`` from ``D_r``; random ones are drawn on the CPU from ``generator``.

    ``"normal"`` has the mean and the standard deviation of ``D_r``, with ``r - 1`` degrees of freedom as in the authors' code; no
    deviation where r is 1.
    """
    mean, spread = pivots.mean(), pivots.std(correction=min(1, len(pivots) - 1))
    if init in ("uniform", "unit_uniform"):
        unit = torch.rand(len(pivots), generator=generator).to(pivots)
        return (unit - 0.5) * mean.abs() if init == "uniform" else 2 * unit - 1
    if init in ("normal", "unit_normal"):
        unit = torch.randn(len(pivots), generator=generator).to(pivots)
        return mean + spread * unit if init == "normal" else unit
    if init == "lu":
        return pivots.clone()
    return mean.expand_as(pivots).clone() if init == "constant" else torch.full_like(pivots, float(init == "ones"))


@dataclass(frozen=True, kw_only=True)
class LolduOptions(AdapterOptions):
    """`LolduConfig` as an adapter."""

    r: int | None = None  # pivots per module; None is the smallest side of the targets, as in the paper on language models
    init: Start = "lu"
    learning_rate: float = 3e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        sides = [
            min(module.weight.shape)
            for name, module in context.network.named_modules()
            if isinstance(module, nn.Linear) and any(f".{name}".endswith(f".{target}") for target in context.targets)
        ]
        seed = context.generator("diagonal").initial_seed()
        config = LolduConfig(target_modules=list(context.targets), r=self.r or min(sides), init=self.init, seed=seed)
        return AdapterHandle(attach_peft(context, config))
