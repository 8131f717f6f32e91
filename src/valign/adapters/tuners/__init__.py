"""Tuners that plug into peft: `get_peft_model(model, TUNERS["svfit"](target_modules=[...]))` and all that peft does from there.

Nothing happens at import. Making a config registers its method with peft; to load a saved adapter with
`PeftModel.from_pretrained` in a process that has made no config, call `register` first.
"""

from peft import PeftConfig, RandLoraConfig

from valign.adapters.tuners.base import TunerConfig, register_tuner
from valign.adapters.tuners.clip_svd import ClipSvdConfig, singular_changes
from valign.adapters.tuners.export import lora_factors
from valign.adapters.tuners.loca import LocaConfig, LocaSchedule
from valign.adapters.tuners.loldu import LolduConfig
from valign.adapters.tuners.nola import NolaConfig
from valign.adapters.tuners.randlora import randlora_config, set_randlora_scale
from valign.adapters.tuners.svfit import SvfitConfig

TUNERS: dict[str, type[PeftConfig]] = {
    "clip-svd": ClipSvdConfig,
    "loca": LocaConfig,
    "loldu": LolduConfig,
    "nola": NolaConfig,
    "randlora": RandLoraConfig,  # peft's own; `randlora_config` gives it the paper's scale
    "svfit": SvfitConfig,
}


def register() -> None:
    """Tell peft of every tuner here that it does not have itself; a second call changes nothing.

    Raises: RuntimeError if another library has taken a name.
    """
    for config in TUNERS.values():
        if issubclass(config, TunerConfig):
            register_tuner(config)


__all__ = [
    "TUNERS",
    "ClipSvdConfig",
    "LocaConfig",
    "LocaSchedule",
    "LolduConfig",
    "NolaConfig",
    "SvfitConfig",
    "lora_factors",
    "randlora_config",
    "register",
    "set_randlora_scale",
    "singular_changes",
]
