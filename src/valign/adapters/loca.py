"""LoCA: a change of weight from a few cosine coefficients whose places in the spectrum are learnt (Du et al., arXiv 2502.06820)."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.adapters.tuner import TunerConfig, TunerModel, TunerType, check_dropout
from valign.adapters.tuner_layer import Buffers, Factors, TunerLayer, module_seed, tuner_layers
from valign.checks import check_range
from valign.methods import Method

METHOD = Method(
    slug="loca",
    title="LoCA: cosine coefficients at learnt places of the spectrum",
    paper="arXiv 2502.06820",
    room="adapters",
    entry="valign.adapters.loca:LocaConfig",
    fidelity="exact",
    note="the source's transform, gradients of places and turns; turns count optimizer steps instead of forward passes",
)

EDGE = 0.999  # upper clip of the unit locations in the source; the last row is out of reach above 501 rows
EXACT = (torch.float32, torch.float64)  # dtypes in which a location says its place
Phase = Literal["coefficients", "locations"]


@dataclass
class LocaConfig(TunerConfig):
    """``W' = W + alpha C_out^T S C_in``: S has K coefficients ``a`` at grid places p, C are orthonormal DCT-II matrices.

    Coefficients start at 0; places start at random and move only in the location phases that a `LocaSchedule` sets. Without a
    schedule places stay where they are, as in FourierFT. K numbers per weight are trained, 2 K in a location phase.

    Raises: ValueError for a count below 1 (and above fan_out fan_in when the model is made), alpha 0, a seed outside [0, 2^63), a
        dropout outside [0, 1].
    """

    kind: ClassVar[TunerType] = TunerType("VALIGN_LOCA")

    n_coefficients: int = 1000  # K per weight, the paper's for RoBERTa on GLUE
    alpha: float = 1.0  # constant over layer sizes
    dropout: float = 0.0  # on the input of the change
    seed: int = 0  # of the first places; each module has a seed of its own, made from this and its name
    exact_edges: bool = (
        False  # let places reach the last row and column of large weights, too, which the source's clip at 0.999 forbids
    )

    @classmethod
    def model_class(cls) -> type[TunerModel]:
        return LocaModel

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("LocaConfig.n_coefficients", self.n_coefficients, low=1)
        check_range("LocaConfig.alpha", self.alpha)
        if self.alpha == 0:
            raise ValueError("LocaConfig.alpha must not be 0, got 0. Nothing could be learnt.")
        check_range("LocaConfig.seed", self.seed, low=0, high=2**63 - 1)
        check_dropout("LocaConfig", self.dropout)


class LocaLayer(TunerLayer):
    """Coefficients, unit locations, and the grid places that they stand for as integers, which no cast can move."""

    adapter_layer_names = ("vtune_coefficients", "vtune_locations")
    other_param_names = (*TunerLayer.other_param_names, "vtune_grid", "alpha", "edge")

    def __init__(self, base_layer: nn.Module, module: str) -> None:
        super().__init__(base_layer, module)
        self.vtune_coefficients = nn.ParameterDict()  # a, [K]
        self.vtune_locations = nn.ParameterDict()  # l, [2, K], unit square: rows, then columns
        self.vtune_grid = Buffers()  # p, int32 [2, K]
        self.alpha: dict[str, float] = {}
        self.edge: dict[str, float] = {}
        self.frozen_peft_weight_names = {}  # this layer's own: peft's is shared by all layers
        self.register_state_dict_pre_hook(lambda module, prefix, keep_vars: module.settle())

    def start(self, adapter: str, config: Any) -> None:
        most, count = self.fan_out * self.fan_in, config.n_coefficients
        check_range("LocaConfig.n_coefficients", count, low=1, high=most, hint=f"{self.module} has {most} entries.")
        self.alpha[adapter], self.edge[adapter] = config.alpha, 1.0 if config.exact_edges else EDGE
        generator = torch.Generator().manual_seed(module_seed(config.seed, self.module))
        unit = torch.rand(2, count, generator=generator).to(self.weight.device, self.dtype)
        self.vtune_coefficients[adapter] = nn.Parameter(unit.new_zeros(count))
        self.vtune_locations[adapter] = nn.Parameter(unit.clone())
        self.vtune_grid.put(adapter, grid(unit, self.fan_out, self.fan_in, self.edge[adapter]), saved=True)
        self.train_only(adapter, "coefficients")

    def train_only(self, adapter: str, phase: Phase) -> None:
        """Freeze the other group, also for peft, and drop its gradient: an optimizer leaves a parameter without gradient alone."""
        groups = {"coefficients": "vtune_coefficients", "locations": "vtune_locations"}
        for group, name in groups.items():
            parameter: nn.Parameter = getattr(self, name)[adapter]
            parameter.requires_grad_(group == phase)
            if group != phase:
                parameter.grad = None
        self.frozen_peft_weight_names[adapter] = tuple(name for group, name in groups.items() if group != phase)

    @torch.no_grad()
    def settle(self) -> None:
        """Write down the grid places, before saving and before a cast to half precision, which would move the locations."""
        for adapter, unit in self.vtune_locations.items():
            if unit.dtype in EXACT and not unit.is_meta and adapter in self.vtune_grid:
                self.vtune_grid[adapter] = grid(unit, self.fan_out, self.fan_in, self.edge[adapter])

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.settle()
        return super()._apply(fn, recurse)

    def places(self, adapter: str) -> Int[Tensor, "2 count"]:
        unit = self.vtune_locations[adapter]
        if unit.dtype in EXACT:
            return grid(unit, self.fan_out, self.fan_in, self.edge[adapter]).long()
        return self.vtune_grid[adapter].long()

    def values(self, adapter: str) -> Float[Tensor, " count"]:
        """The coefficients in at least float32: tables of cosines lose too much in half precision."""
        values = self.vtune_coefficients[adapter]
        return values if values.dtype in EXACT else values.float()

    def factors(self, adapter: str) -> Factors:
        """Rank-1 terms, one per coefficient: the cheap form for few of them."""
        values, places = self.values(adapter), self.places(adapter)
        rows, columns = (dct_matrix(n, values.dtype, values.device) for n in (self.fan_out, self.fan_in))
        return Factors(columns[places[1]], rows[places[0]].T * (values * self.alpha[adapter]))

    def matrix_change(self, adapter: str) -> Float[Tensor, "fan_out fan_in"]:
        """By FFT."""
        values, unit, shape = self.values(adapter), self.vtune_locations[adapter], (self.fan_out, self.fan_in)
        if unit.requires_grad:
            return self.alpha[adapter] * LocatedChange.apply(values, unit, self.places(adapter), shape, self.edge[adapter])
        return self.alpha[adapter] * idct2(spectrum(values, self.places(adapter), shape))

    def change(self, adapter: str, x: Tensor) -> Tensor:
        few = len(self.vtune_coefficients[adapter]) * (self.fan_in + self.fan_out) < self.fan_in * self.fan_out
        if few and not self.vtune_locations[adapter].requires_grad:
            return super().change(adapter, x)
        delta = self.matrix_change(adapter)
        x = F.dropout(self._cast_input_dtype(x, delta.dtype), self.dropout[adapter], self.training)
        return F.linear(x, delta) * self.scaling[adapter]

    def before_load(self, adapter: str, saved: dict[str, Tensor]) -> None:
        places, unit = saved.get("vtune_grid"), saved.get("vtune_locations")
        if places is None or unit is None:
            return  # peft says which keys are missing
        last = torch.tensor([self.fan_out - 1, self.fan_in - 1])[:, None]
        if places.min() < 0 or (places.cpu() > last).any():
            raise ValueError(
                f"{self.module} must be as large as the weight that the adapter was trained on, got {self.fan_out} x {self.fan_in} "
                f"for places up to {places.amax(1).tolist()}. Load the base model it names."
            )
        if not torch.equal(grid(unit.float(), self.fan_out, self.fan_in, self.edge[adapter]).cpu(), places.cpu()):
            saved["vtune_locations"] = places.cpu() / last.clamp(min=1)  # the file was rounded to half precision


class LocaModel(TunerModel):
    """peft's tuner for `LocaConfig`."""

    tuner_layer_cls = LocaLayer


class LocaSchedule:
    """Who is trained when: coefficients and locations in turns at first, then coefficients alone.

    Step 0 trains coefficients, which are all 0 and give locations no gradient. Up to ``location_budget`` every cycle is
    ``coefficient_steps`` of coefficients, then ``location_steps`` of locations; afterwards locations are frozen for good. Call
    `step` after every optimizer step and before the next backward pass. The source counts forward passes, so that accumulation of
    gradients changes its schedule; this counts optimizer steps.

    Args:
        model: With a LoCA adapter of this name, in training.
        location_budget: Optimizer steps until locations are frozen, 0 or more; about a tenth of all in the paper.
        coefficient_steps, location_steps: Of one cycle, each 0 or more and 1 or more together; the paper's 10 and 20.
        total_steps: Of the whole training, if known, to warn of a budget that is never used up.
    Raises: ValueError if there is no such adapter, or a count is negative.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        location_budget: int = 1000,
        coefficient_steps: int = 10,
        location_steps: int = 20,
        total_steps: int | None = None,
        adapter: str = "default",
    ) -> None:
        check_range("LocaSchedule.location_budget", location_budget, low=0)
        check_range("LocaSchedule.coefficient_steps", coefficient_steps, low=0)
        check_range("LocaSchedule.location_steps", location_steps, low=0)
        check_range("LocaSchedule.coefficient_steps + location_steps", coefficient_steps + location_steps, low=1)
        if total_steps is not None and location_budget > total_steps:
            warnings.warn(f"LocaSchedule.location_budget is {location_budget}, above all {total_steps} steps.", stacklevel=2)
        layers = [layer for _, layer in tuner_layers(model) if isinstance(layer, LocaLayer)]
        self.layers = [layer for layer in layers if adapter in layer.vtune_coefficients]
        if not self.layers:
            raise ValueError(f"LocaSchedule.model must have a LoCA adapter called {adapter!r}, got none.")
        self.adapter, self.budget = adapter, location_budget
        self.coefficient_steps, self.location_steps = coefficient_steps, location_steps
        self.steps_done = 0
        self._set("coefficients")

    def phase(self, step: int) -> Phase:
        """What optimizer step ``step``, from 0 on, trains."""
        turn = step % (self.coefficient_steps + self.location_steps)
        moving = 0 < step < self.budget and turn >= self.coefficient_steps
        return "locations" if moving else "coefficients"

    def step(self) -> None:
        """One optimizer step is done; make ready for the next."""
        self.steps_done += 1
        if self.phase(self.steps_done) != self.phase(self.steps_done - 1):
            self._set(self.phase(self.steps_done))

    def state_dict(self) -> dict[str, int]:
        return {"steps_done": self.steps_done}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where a schedule with the same options stopped."""
        self.steps_done = state["steps_done"]
        self._set(self.phase(self.steps_done))

    def _set(self, phase: Phase) -> None:
        if phase == "locations" and all(not layer.vtune_coefficients[self.adapter].any() for layer in self.layers):
            warnings.warn("LoCA's locations are trained while every coefficient is 0: they get no gradient.", stacklevel=3)
        for layer in self.layers:
            layer.train_only(self.adapter, phase)


class LocatedChange(torch.autograd.Function):
    """``C^T S(a, l) C``, with a straight-through rounding of the places and finite differences on the grid as their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, unit: Tensor, places: Tensor, shape: tuple[int, int], edge: float) -> Tensor:
        ctx.save_for_backward(values, unit, places)
        ctx.shape, ctx.edge = shape, edge
        return idct2(spectrum(values, places, shape))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        values, unit, places = ctx.saved_tensors
        image = dct2(gradients[0])
        slopes = torch.stack(place_slopes(image, values, places[0], places[1]))
        sizes = slopes.new_tensor([ctx.shape[0] - 1, ctx.shape[1] - 1])[:, None]
        free = (unit >= 0) & (unit <= ctx.edge)
        return image[places[0], places[1]], slopes * sizes * free, None, None, None


def place_slopes(
    image: Float[Tensor, "fan_out fan_in"],
    values: Float[Tensor, " count"],
    rows: Int[Tensor, " count"],
    columns: Int[Tensor, " count"],
) -> tuple[Float[Tensor, " count"], Float[Tensor, " count"]]:
    """Gradient by grid place: half the difference of the neighbours in ``image`` times the coefficient, clamped to [-1, 1].

    At the border the missing neighbour is the place itself, still with the half, as in the source.
    """
    last_row, last_column = image.shape[0] - 1, image.shape[1] - 1
    by_row = image[(rows + 1).clamp(max=last_row), columns] - image[(rows - 1).clamp(min=0), columns]
    by_column = image[rows, (columns + 1).clamp(max=last_column)] - image[rows, (columns - 1).clamp(min=0)]
    return (0.5 * values * by_row).clamp(-1, 1), (0.5 * values * by_column).clamp(-1, 1)


def grid(unit: Float[Tensor, "2 count"], fan_out: int, fan_in: int, edge: float = EDGE) -> Int[Tensor, "2 count"]:
    """``round(clip(l, 0, edge) [fan_out - 1, fan_in - 1])``, half to even, int32."""
    return (unit.detach().clamp(0, edge) * unit.new_tensor([fan_out - 1, fan_in - 1])[:, None]).round().int()


def spectrum(
    values: Float[Tensor, " count"], places: Int[Tensor, "2 count"], shape: tuple[int, int]
) -> Float[Tensor, "fan_out fan_in"]:
    """Zeros with the coefficients added at their places; those that meet add up."""
    return values.new_zeros(shape).index_put((places[0], places[1]), values, accumulate=True)


@lru_cache(maxsize=16)
def dct_matrix(size: int, dtype: torch.dtype, device: torch.device) -> Float[Tensor, "size size"]:
    """Orthonormal DCT-II: ``C[i, j] = c_i cos((2 j + 1) i pi / (2 size))``, ``c_0 = sqrt(1 / size)``, else ``sqrt(2 / size)``."""
    with torch.inference_mode(False):  # a matrix that is first made while sampling serves training, too
        index = torch.arange(size, dtype=torch.float64)
        cosines = torch.cos((2 * index[None] + 1) * index[:, None] * math.pi / (2 * size)) * math.sqrt(2 / size)
        cosines[0] = math.sqrt(1 / size)
        return cosines.to(device, dtype)


def dct2(change: Float[Tensor, "fan_out fan_in"]) -> Float[Tensor, "fan_out fan_in"]:
    """``C_out change C_in^T`` in the precision of ``change``, also under autocast."""
    rows, columns = (dct_matrix(n, change.dtype, change.device) for n in change.shape)
    with torch.autocast(change.device.type, enabled=False):
        return rows @ change @ columns.T


def idct2(image: Float[Tensor, "fan_out fan_in"]) -> Float[Tensor, "fan_out fan_in"]:
    """``C_out^T image C_in``, the inverse of `dct2`, by FFT along each axis."""
    return _idct(_idct(image.T).T)


def _idct(image: Float[Tensor, "lines size"]) -> Float[Tensor, "lines size"]:
    """Inverse orthonormal DCT-II of each line: inverse FFT with a half shift, then even and reversed odd entries in turns."""
    size = image.shape[1]
    scaled = image * math.sqrt(size / 2)
    scaled = torch.cat([scaled[:, :1] * math.sqrt(2), scaled[:, 1:]], dim=1)
    angle = torch.arange(size, dtype=torch.float64, device=image.device) * (math.pi / (2 * size))
    turn = torch.polar(torch.ones_like(angle), angle).to(torch.complex128 if image.dtype == torch.float64 else torch.complex64)
    mirrored = torch.cat([torch.zeros_like(scaled[:, :1]), scaled[:, 1:].flip(1)], dim=1)
    half = torch.fft.ifft(torch.complex(scaled, -mirrored) * turn, dim=1).real
    first = (size + 1) // 2
    result = torch.empty_like(half)
    result[:, ::2] = half[:, :first]
    result[:, 1::2] = half[:, first:].flip(1)
    return result


@dataclass(frozen=True, kw_only=True)
class LocaOptions(AdapterOptions):
    """`LocaConfig` with its schedule, as an adapter: places move in the first part of the training."""

    n_coefficients: int = 1000
    alpha: float = 1.0
    location_share: float = 0.1  # of the steps in which places may move, [0, 1]
    location_rate: float = 0.1  # of places, as a share of the learning rate
    learning_rate: float = 6e-3

    def __post_init__(self) -> None:
        check_range("LocaOptions.location_share", self.location_share, low=0, high=1)
        check_range("LocaOptions.location_rate", self.location_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        config = LocaConfig(
            target_modules=list(context.targets),
            n_coefficients=self.n_coefficients,
            alpha=self.alpha,
            seed=context.generator("places").initial_seed(),
        )
        return LocaHandle(attach_peft(context, config), budget=round(self.location_share * context.steps), rate=self.location_rate)


class LocaHandle(AdapterHandle):
    """Coefficients and places in turns."""

    def __init__(self, network: Any, *, budget: int, rate: float) -> None:
        super().__init__(network)
        self.rate = rate
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.schedule = LocaSchedule(network, location_budget=budget)

    def groups(self) -> list[dict[str, Any]]:
        layers: list[Any] = [layer for _, layer in tuner_layers(self.network)]
        return [
            {"params": [p for layer in layers for p in layer.vtune_coefficients.values()], "rate": 1.0},
            {"params": [p for layer in layers for p in layer.vtune_locations.values()], "rate": self.rate, "weight_decay": 0.0},
        ]

    def after_step(self, step: int) -> None:
        self.schedule.step()

    def extra(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(extra)

    def numbers(self) -> int:
        return sum(p.numel() for p in self.groups()[0]["params"])
