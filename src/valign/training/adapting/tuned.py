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
from valign.training.adapting.base import Attached, Ground, layer_linears, seeded


def attached(ground: Ground, config: PeftConfig) -> Attached:
    with seeded(ground):
        return Attached(get_peft_model(ground.network, config))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class FourierFt:
    """FourierFT (arXiv 2405.03003) as peft has it: Fourier coefficients at random fixed places."""

    n_frequency: int = 1000  # numbers per module
    scaling: float = 150.0
    from_zero: bool = True  # start as the base model; False is the paper's normal start, too much for narrow weights
    learning_rate: float = 1e-2

    def attach(self, ground: Ground) -> Attached:
        numbers = {"n_frequency": self.n_frequency, "scaling": self.scaling, "init_weights": self.from_zero}
        seed = ground.generator("places").initial_seed() % 2**31
        return attached(ground, FourierFTConfig(target_modules=list(ground.targets), random_loc_seed=seed, **numbers))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class RandLora:
    """RandLoRA as peft has it, at the paper's scale."""

    like_lora: int = 8  # trains about as much as a LoRA of this rank
    learning_rate: float = 1e-3

    def attach(self, ground: Ground) -> Attached:
        key = ground.generator("bases").initial_seed() % 2**31
        config = randlora_config(ground.network, target_modules=ground.targets, like_lora=self.like_lora, projection_prng_key=key)
        return attached(ground, config)


@dataclass(frozen=True, kw_only=True)
class Svfit:
    """`SvfitConfig`."""

    r: int | None = None  # singular values per module; None is all of them
    learning_rate: float = 1e-2

    def attach(self, ground: Ground) -> Attached:
        return attached(ground, SvfitConfig(target_modules=list(ground.targets), r=self.r))


@dataclass(frozen=True, kw_only=True)
class Loldu:
    """`LolduConfig`."""

    r: int | None = None  # pivots per module; None is the smallest side of the targets, as in the paper on language models
    init: Start = "lu"
    learning_rate: float = 3e-3

    def attach(self, ground: Ground) -> Attached:
        sides = [
            min(module.weight.shape)
            for name, module in ground.network.named_modules()
            if isinstance(module, torch.nn.Linear) and any(f".{name}".endswith(f".{target}") for target in ground.targets)
        ]
        seed = ground.generator("diagonal").initial_seed()
        return attached(ground, LolduConfig(target_modules=list(ground.targets), r=self.r or min(sides), init=self.init, seed=seed))


@dataclass(frozen=True, kw_only=True)
class Nola:
    """`NolaConfig`."""

    r: int = 8
    basis: int = 64  # random matrices per factor: 2 basis numbers are trained per module
    learning_rate: float = 4e-3

    def attach(self, ground: Ground) -> Attached:
        seed = ground.generator("basis").initial_seed()
        sizes = {"r": self.r, "num_basis_a": self.basis, "num_basis_b": self.basis}
        return attached(ground, NolaConfig(target_modules=list(ground.targets), seed=seed, **sizes))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class ClipSvd:
    """`ClipSvdConfig`."""

    ratio: float = 1.0  # share of each spectrum that is kept, (0, 1]
    everywhere: bool = True  # on all linear modules of the layers, as in the paper; False: on the targets
    learning_rate: float = 6e-3

    def attach(self, ground: Ground) -> Attached:
        targets = layer_linears(ground.network) if self.everywhere else ground.targets
        return attached(ground, ClipSvdConfig(target_modules=list(targets), ratio=self.ratio))


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

    def attach(self, ground: Ground) -> Attached:
        config = LocaConfig(
            target_modules=list(ground.targets),
            n_coefficients=self.n_coefficients,
            alpha=self.alpha,
            seed=ground.generator("places").initial_seed(),
        )
        network = attached(ground, config).network
        return AttachedLoca(network, budget=round(self.location_share * ground.steps), rate=self.location_rate)


class AttachedLoca(Attached):
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
