"""Methods with layers of their own: the tuners of `valign.adapters.tuners`, and peft's FourierFT."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import FourierFTConfig, PeftConfig, get_peft_model

from valign.adapters.tuners import ClipSvdConfig, LocaConfig, LocaSchedule, LolduConfig, NolaConfig, SvfitConfig, randlora_config
from valign.adapters.tuners.layer import tuner_layers
from valign.adapters.tuners.loldu import Start
from valign.checks import check_range
from valign.training.adapting.base import AdapterHandle, AttachContext, layer_linears, seeded


def handle(context: AttachContext, config: PeftConfig) -> AdapterHandle:
    with seeded(context):
        return AdapterHandle(get_peft_model(context.network, config))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FourierFt:
    """FourierFT (arXiv 2405.03003) as peft has it: Fourier coefficients at random fixed places."""

    n_frequency: int = 1000  # numbers per module
    scaling: float = 150.0
    from_zero: bool = True  # start as the base model; False is the paper's normal start, too much for narrow weights
    learning_rate: float = 1e-2

    def attach(self, context: AttachContext) -> AdapterHandle:
        numbers = {"n_frequency": self.n_frequency, "scaling": self.scaling, "init_weights": self.from_zero}
        seed = context.generator("places").initial_seed() % 2**31
        return handle(context, FourierFTConfig(target_modules=list(context.targets), random_loc_seed=seed, **numbers))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RandLora:
    """RandLoRA as peft has it, at the paper's scale."""

    like_lora: int = 8  # trains about as much as a LoRA of this rank
    learning_rate: float = 1e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        key = context.generator("bases").initial_seed() % 2**31
        config = randlora_config(context.network, target_modules=context.targets, like_lora=self.like_lora, projection_prng_key=key)
        return handle(context, config)


@dataclass(frozen=True, kw_only=True)
class Svfit:
    """`SvfitConfig`."""

    r: int | None = None  # singular values per module; None is all of them
    learning_rate: float = 1e-2

    def attach(self, context: AttachContext) -> AdapterHandle:
        return handle(context, SvfitConfig(target_modules=list(context.targets), r=self.r))


@dataclass(frozen=True, kw_only=True)
class Loldu:
    """`LolduConfig`."""

    r: int | None = None  # pivots per module; None is the smallest side of the targets, as in the paper on language models
    init: Start = "lu"
    learning_rate: float = 3e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        sides = [
            min(module.weight.shape)
            for name, module in context.network.named_modules()
            if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{target}") for target in context.targets)
        ]
        seed = context.generator("diagonal").initial_seed()
        return handle(context, LolduConfig(target_modules=list(context.targets), r=self.r or min(sides), init=self.init, seed=seed))


@dataclass(frozen=True, kw_only=True)
class Nola:
    """`NolaConfig`."""

    r: int = 8
    basis: int = 64  # random matrices per factor: 2 basis numbers are trained per module
    learning_rate: float = 4e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        seed = context.generator("basis").initial_seed()
        sizes = {"r": self.r, "num_basis_a": self.basis, "num_basis_b": self.basis}
        return handle(context, NolaConfig(target_modules=list(context.targets), seed=seed, **sizes))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ClipSvd:
    """`ClipSvdConfig`."""

    ratio: float = 1.0  # share of each spectrum that is kept, (0, 1]
    everywhere: bool = True  # on all linear modules of the layers, as in the paper; False: on the targets
    learning_rate: float = 6e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        targets = layer_linears(context.network) if self.everywhere else context.targets
        return handle(context, ClipSvdConfig(target_modules=list(targets), ratio=self.ratio))


@dataclass(frozen=True, kw_only=True)
class Loca:
    """`LocaConfig` with its schedule: places move in the first part of the training."""

    n_coefficients: int = 1000
    alpha: float = 1.0
    location_share: float = 0.1  # of the steps in which places may move, [0, 1]
    location_rate: float = 0.1  # of places, as a share of the learning rate
    learning_rate: float = 6e-3

    def __post_init__(self) -> None:
        check_range("Loca.location_share", self.location_share, low=0, high=1)
        check_range("Loca.location_rate", self.location_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        config = LocaConfig(
            target_modules=list(context.targets),
            n_coefficients=self.n_coefficients,
            alpha=self.alpha,
            seed=context.generator("places").initial_seed(),
        )
        network = handle(context, config).network
        return AttachedLoca(network, budget=round(self.location_share * context.steps), rate=self.location_rate)


class AttachedLoca(AdapterHandle):
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
