"""AdaLoRA as peft has it (arXiv 2303.10512)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import AdaLoraConfig
from torch import Tensor

from valign.adapters.base import AdapterHandle, AdapterOptions, AttachContext, attach_peft
from valign.checks import check_range


@dataclass(frozen=True, kw_only=True)
class AdaLoRAOptions(AdapterOptions):
    """From a higher rank down to an average of ``rank``."""

    adaptive: ClassVar[bool] = True

    rank: int = 8  # average at the end
    init_rank: int | None = None  # None is 1.5 times the rank
    orthogonality: float = 0.1  # weight of the penalty; the authors' 0.1 on most of GLUE
    learning_rate: float = 4e-3  # more than LoRA's: all factors start near 0

    def __post_init__(self) -> None:
        check_range("AdaLoRAOptions.rank", self.rank, low=1)
        check_range("AdaLoRAOptions.orthogonality", self.orthogonality, low=0)
        check_range("AdaLoRAOptions.learning_rate", self.learning_rate, above=0)
        if self.init_rank is not None:
            check_range("AdaLoRAOptions.init_rank", self.init_rank, low=self.rank, hint="It falls to the rank.")

    def attach(self, context: AttachContext) -> AdapterHandle:
        first = round(1.5 * self.rank) if self.init_rank is None else self.init_rank
        config = AdaLoraConfig(
            init_r=first,
            target_r=self.rank,
            lora_alpha=first,
            tinit=round(0.1 * context.steps),
            tfinal=round(0.3 * context.steps),
            deltaT=max(1, context.steps // 100),
            total_step=context.steps,
            target_modules=list(context.targets),
        )
        return AdaLoRAHandle(attach_peft(context, config), self.orthogonality)


class AdaLoRAHandle(AdapterHandle):
    """peft's allocator, with the penalty that peft adds only to models with a loss of their own."""

    AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")

    def __init__(self, network: Any, orthogonality: float) -> None:
        super().__init__(network)
        self.orthogonality, self.allocated = orthogonality, False

    @property
    def settled(self) -> bool:
        return self.allocated

    def penalty(self) -> Float[Tensor, ""] | None:
        terms = []
        for name, factor in self.network.named_parameters():
            if factor.requires_grad and ("lora_A" in name or "lora_B" in name):
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                terms.append((gram - torch.eye(len(gram), device=gram.device)).norm())
        return self.orthogonality * torch.stack(terms).mean()

    def after_step(self, step: int) -> None:
        self.network.base_model.update_and_allocate(step)  # type: ignore[union-attr, operator]
        config = self.network.peft_config["default"]  # type: ignore[union-attr, index]
        self.allocated = step >= config.total_step - config.tfinal  # type: ignore[union-attr]

    def extra(self) -> dict[str, Any]:
        allocator, config = self.network.base_model.rankallocator, self.network.peft_config["default"]  # type: ignore[union-attr, index]
        state = {"pattern": config.rank_pattern, "allocated": self.allocated}  # type: ignore[union-attr]
        return state | {name: dict(getattr(allocator, name)) for name in self.AVERAGES}

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.allocated = extra["allocated"]
        self.network.peft_config["default"].rank_pattern = extra["pattern"]  # type: ignore[union-attr, index]
        for name in self.AVERAGES:
            setattr(self.network.base_model.rankallocator, name, dict(extra[name]))  # type: ignore[union-attr, arg-type]

    def numbers(self) -> int:
        """Of the triplets whose value is not masked to 0, as SoRA counts."""
        layers: list[Any] = [layer for layer in self.network.modules() if "default" in getattr(layer, "lora_E", ())]
        return sum(int(layer.lora_E["default"].count_nonzero()) * (layer.in_features + layer.out_features + 1) for layer in layers)
