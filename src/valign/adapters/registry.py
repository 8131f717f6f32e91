"""The tables of adapters: every method by its name, and what else is made by name."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any

from peft import PeftConfig, RandLoraConfig
from torch import nn

from valign.adapters.adalora import AdaLoRAOptions
from valign.adapters.ailora import AILoRA, AILoRAOptions
from valign.adapters.base import AdapterOptions, InitReport
from valign.adapters.clip_svd import ClipSvdConfig, ClipSvdOptions
from valign.adapters.codyra import CoDyRAOptions
from valign.adapters.comp_lora import CompLoRA, CompLoRAOptions
from valign.adapters.diffora import DiffoRAOptions
from valign.adapters.dora import DoraOptions
from valign.adapters.fila import FILA, FILAOptions
from valign.adapters.fourierft import FourierFtOptions
from valign.adapters.full import FullOptions
from valign.adapters.head_only import HeadOnlyOptions
from valign.adapters.increlora import IncreLoRAOptions
from valign.adapters.loca import LocaConfig, LocaOptions
from valign.adapters.loldu import LolduConfig, LolduOptions
from valign.adapters.lora import LoraOptions
from valign.adapters.lora_sb import LoRASB, LoRASBOptions
from valign.adapters.milora import MiloraOptions
from valign.adapters.nola import NolaConfig, NolaOptions
from valign.adapters.pissa import PissaOptions
from valign.adapters.randlora import RandLoraOptions
from valign.adapters.sora import SoRAOptions
from valign.adapters.svfit import SvfitConfig, SvfitOptions
from valign.adapters.tuner import TunerConfig, register_tuner
from valign.checks import check_choice
from valign.plugins import with_plugins

# What `valign finetune`, `train alignguard` and `compare adapters` attach; packages add rows under "valign.adapters".
ADAPTERS: Mapping[str, type[AdapterOptions]] = with_plugins(
    "valign.adapters",
    {
        "lora": LoraOptions,
        "pissa": PissaOptions,
        "milora": MiloraOptions,
        "dora": DoraOptions,
        "adalora": AdaLoRAOptions,
        "fourierft": FourierFtOptions,
        "ailora": AILoRAOptions,
        "lora-sb": LoRASBOptions,
        "comp-lora": CompLoRAOptions,
        "svfit": SvfitOptions,
        "loldu": LolduOptions,
        "randlora": RandLoraOptions,
        "nola": NolaOptions,
        "loca": LocaOptions,
        "clip-svd": ClipSvdOptions,
        "sora": SoRAOptions,
        "increlora": IncreLoRAOptions,
        "diffora": DiffoRAOptions,
        "codyra": CoDyRAOptions,
        "fila": FILAOptions,
        "full": FullOptions,
        "head": HeadOnlyOptions,
    },
)

# Starts of a LoRA that peft or diffusers attached, for `initialize`.
INITIALIZERS: dict[str, Callable[..., Callable[..., InitReport]]] = {
    "ailora": AILoRA,
    "comp-lora": CompLoRA,
    "fila": FILA,
    "lora-sb": LoRASB,
}

# Configs of methods with layers of their own, for peft's `get_peft_model`.
TUNERS: dict[str, type[PeftConfig]] = {
    "clip-svd": ClipSvdConfig,
    "loca": LocaConfig,
    "loldu": LolduConfig,
    "nola": NolaConfig,
    "randlora": RandLoraConfig,  # peft's own; `randlora_config` gives it the paper's scale
    "svfit": SvfitConfig,
}


class Experts(Collection[str]):
    """Names of the adapters that can train experts on a denoiser."""

    def __contains__(self, name: object) -> bool:
        return name in ADAPTERS and ADAPTERS[str(name)].expert

    def __iter__(self) -> Iterator[str]:
        return (name for name, options in ADAPTERS.items() if options.expert)

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __bool__(self) -> bool:
        return True  # without importing a plug-in


EXPERTS = Experts()


def initialize(model: nn.Module, method: str, *, adapter: str | None = None, **options: Any) -> InitReport:
    """Give the LoRA on ``model`` the start of ``method``, in place.

    Args:
        model: A ``PeftModel``, or a transformers or diffusers model with ``add_adapter``; its LoRA as
            ``init_lora_weights=True`` makes it.
        method: A name in `INITIALIZERS`.
        adapter: The adapter's name; None is the only one.
        options: Fields of the method's dataclass.
    Raises: ValueError for an unknown method or option, and whatever the method refuses.
    """
    check_choice("initialize.method", method, INITIALIZERS)
    known = [field.name for field in fields(INITIALIZERS[method])]  # type: ignore[arg-type]
    for name in options:
        check_choice(f"initialize option of {method}", name, known)
    return INITIALIZERS[method](**options)(model, adapter)


def register_tuners() -> None:
    """Tell peft of every tuner here that it does not have itself; a second call changes nothing.

    Raises: RuntimeError if another library has taken a name.
    """
    for config in TUNERS.values():
        if issubclass(config, TunerConfig):
            register_tuner(config)
