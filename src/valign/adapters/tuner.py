"""What tuners share: methods with layers of their own, which plug into peft with `get_peft_model(model, SvfitConfig(...))`.

A tuner is a config, a `TunerLayer`, and a model that names the two; scales, refusals and loading are here and in the layer's file,
on peft's own `BaseTuner` and `BaseTunerLayer`. Importing registers nothing. Making a config registers its method with peft; to load
a saved adapter with `PeftModel.from_pretrained` in a process that has made no config, call `valign.adapters.register_tuners` first.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.error import NoMatchingPeftModuleError
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from valign.adapters.tuner_layer import PREFIX, TunerLayer, target_names, tuner_layers
from valign.checks import check_range
from valign.models.files.adapter_files import LoraFactors


class TunerType(str):
    """A name that peft and transformers take for one of peft's own types: a string that also has ``name`` and ``value``."""

    @property
    def name(self) -> str:
        return str(self)

    @property
    def value(self) -> str:
        return str(self)


@dataclass
class TunerConfig(PeftConfig):
    """Where a tuner sits; each method adds how. Making one registers its method with peft.

    Raises: ValueError for fields that cannot go together or are out of range; TypeError for unknown fields.
    """

    kind: ClassVar[TunerType]  # written to adapter_config.json as "peft_type"

    target_modules: list[str] | set[str] | str | None = None  # endings of module names, or one regular expression, as in LoRA
    exclude_modules: list[str] | set[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None  # trained whole and saved beside the adapter, such as a classification head

    @classmethod
    def model_class(cls) -> "type[TunerModel]":
        """The tuner of this method."""
        raise NotImplementedError  # abstract: each method names its tuner

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        register_tuner(type(self))
        self.peft_type = self.kind  # type: ignore[assignment]
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"{type(self).__name__}.layers_pattern must come with layers_to_transform, got {self.layers_pattern!r} alone."
            )


def register_tuner(config: type[TunerConfig]) -> None:
    """Tell peft of a method, once; a second call changes nothing.

    Raises: RuntimeError if the name is taken by another library's class.
    """
    kind, model = config.kind, config.model_class()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, config)  # type: ignore[arg-type]
    if known is not config:
        raise RuntimeError(f"peft type {kind} must be free or valign's, got {known.__module__}.{known.__qualname__}.")
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = model  # type: ignore[index]
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = model.prefix  # type: ignore[index]


class TunerModel(BaseTuner):
    """peft's tuner for a `TunerLayer`. When something is refused, the model is as before."""

    prefix: str = PREFIX
    tuner_layer_cls: type[TunerLayer]
    # mostly query and value
    target_module_mapping: dict[str, Any] = dict(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)  # noqa: RUF012

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: Mapping[str, Any]) -> PeftConfig:
        model_type = model_config.get("model_type")
        if getattr(peft_config, "target_modules", None) is None:
            if model_type not in self.target_module_mapping:
                raise ValueError(
                    f"{type(peft_config).__name__}.target_modules must be given for a model of type {model_type!r}, got None. "
                    "Name module endings, such as to_q, to_k, to_v and to_out.0 for a diffusers U-Net."
                )
            targets = self.target_module_mapping[model_type]
            peft_config.target_modules = targets if isinstance(targets, str) else set(targets)  # type: ignore[attr-defined]
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        owners: dict[int, str] = {}
        self.tied: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if id(parameter) in owners:
                self.tied[id(parameter)] = f"{owners[id(parameter)]} and {name}"
            owners.setdefault(id(parameter), name)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        self.tuner_layer_cls.check(target, current_key, peft_config)
        if id(target.weight) in self.tied:
            raise ValueError(
                f"target_modules must not name tied layers, got {current_key}: one tensor is {self.tied[id(target.weight)]}. "
                "Leave it out, or load the model with tie_word_embeddings=False."
            )
        layer = self.tuner_layer_cls(target, current_key)
        layer._active_adapter = adapter_name
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            names = target_names(model, self.tuner_layer_cls, self.peft_config[adapter_name])
            raise NoMatchingPeftModuleError(f"{error} target_modules can name {names}.") from None
        except Exception:
            for name, layer in list(tuner_layers(model)):
                if adapter_name not in layer.scaling:
                    continue
                if len(layer.scaling) > 1:
                    layer.delete_adapter(adapter_name)
                else:
                    parent, _, child = name.rpartition(".")
                    setattr(model.get_submodule(parent), child, layer.base_layer)
            raise

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """peft's, but a second time is an error. (`merge_and_unload` after it is not.)

        Raises: ValueError if all of ``adapter_names`` (the active ones when None) are merged.
        """
        names = self.active_adapters if adapter_names is None else adapter_names
        merged = {name for _, layer in tuner_layers(self.model) for name in layer.merged_adapters}
        if names and merged.issuperset(names):
            raise ValueError(
                f"merge_adapter.adapter_names must not all be merged already, got {', '.join(names)}. Call unmerge_adapter first."
            )
        super().merge_adapter(adapter_names, safe_merge)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        state_dict = dict(state_dict)
        for name, layer in tuner_layers(model):
            if adapter_name in layer.scaling:
                attributes = (*layer.adapter_layer_names, *layer.other_param_names)
                stems = (f"{name}.", f"base_model.model.{name}.")  # an adapter saved from a PeftModel, on a model injected in place
                keys = {a: stem + a for stem in stems for a in attributes if stem + a in state_dict}
                saved = {a: state_dict[key] for a, key in keys.items()}
                layer.before_load(adapter_name, saved)
                state_dict.update({keys[a]: tensor for a, tensor in saved.items()})
        return super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )


def check_dropout(name: str, dropout: float) -> None:
    check_range(f"{name}.dropout", dropout, low=0.0, high=1.0)


@torch.no_grad()
def lora_factors(model: nn.Module, adapter: str = "default") -> dict[str, LoraFactors]:
    """Exact factors of every module's change, scale folded into ``up``; `save_adapter` writes them.

    The rank is the method's: r for SVFit, LoLDU and NOLA, up to the full rank for CLIP-SVD, the number of coefficients for LoCA.
    For a smaller one truncate with `peft.convert_to_lora`, or merge.

    Returns: By module name without peft's ``base_model.model.``, on the CPU.
    Raises: ValueError if there is no such adapter, or it sits on convolutions or transposed layers, which these files do not hold.
    """
    found = {}
    for name, layer in tuner_layers(model):
        if adapter not in layer.scaling:
            continue
        if isinstance(layer.get_base_layer(), (_ConvNd, Conv1D)):
            raise ValueError(f"lora_factors.model must have its adapter on nn.Linear, got {name}. Merge it instead.")
        factors = layer.factors(adapter)
        down, up = factors.down.cpu(), (factors.up * layer.scaling[adapter]).cpu()
        found[name.removeprefix("base_model.model.")] = LoraFactors(down.contiguous(), up.contiguous(), 1.0)
    if not found:
        raise ValueError(f"lora_factors.model must have an adapter of valign.adapters called {adapter!r}, got none.")
    return found
