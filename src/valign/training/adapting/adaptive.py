"""Methods that find ranks or modules while they train; each is told the length of the training and fits its phases into it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn

from valign.adapters import export_lora
from valign.adapters.adaptive import CoDyRA, DiffoRA, IncreLoRA, SoRA
from valign.adapters.adaptive.checking import check_modules
from valign.adapters.adaptive.increlora import STEP_RANKS
from valign.checks import check_range
from valign.training.adapting.base import AdapterHandle, AttachContext, LoraHandle, seeded
from valign.training.adapting.low_rank import Lora


@dataclass(frozen=True, kw_only=True)
class AdaLora:
    """AdaLoRA (arXiv 2303.10512) as peft has it: from a higher rank down to an average of ``rank``."""

    rank: int = 8  # average at the end
    init_rank: int | None = None  # None is 1.5 times the rank
    orthogonality: float = 0.1  # weight of the penalty; the authors' 0.1 on most of GLUE
    learning_rate: float = 4e-3  # more than LoRA's: all factors start near 0

    def __post_init__(self) -> None:
        check_range("AdaLora.rank", self.rank, low=1)
        check_range("AdaLora.orthogonality", self.orthogonality, low=0)
        check_range("AdaLora.learning_rate", self.learning_rate, above=0)
        if self.init_rank is not None:
            check_range("AdaLora.init_rank", self.init_rank, low=self.rank, hint="It falls to the rank.")

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
        with seeded(context):
            return AdaLoraHandle(get_peft_model(context.network, config), self.orthogonality)  # type: ignore[arg-type]


class AdaLoraHandle(AdapterHandle):
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


@dataclass(frozen=True, kw_only=True)
class Sora(Lora):
    """`valign.adapters.adaptive.SoRA`."""

    threshold: float | None = None  # None: so that gates from N(0, 1) lose about 30 % over the training
    l1_weight: float = 0.0

    def attach(self, context: AttachContext) -> AdapterHandle:
        threshold = 0.4 / context.steps if self.threshold is None else self.threshold
        network = self.lora(context)
        return SoraHandle(
            network, SoRA(network, threshold=threshold, l1_weight=self.l1_weight, generator=context.generator("gates"))
        )


class SoraHandle(LoraHandle):
    """The gates are a group of their own, without weight decay, and shut after each step."""

    def __init__(self, network: Any, sora: SoRA) -> None:
        super().__init__(network)
        self.sora = sora

    def groups(self) -> list[dict[str, Any]]:
        gates = list(self.sora.gates().values())
        return [{"params": self.sora.weights(), "rate": 1.0}, {"params": gates, "rate": 1.0, "weight_decay": 0.0}]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.sora.watch(optimizer)

    def penalty(self) -> Float[Tensor, ""] | None:
        return self.sora.l1() if self.sora.l1_weight else None

    def extra(self) -> dict[str, Any]:
        return self.sora.state_dict()

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.sora.load_state_dict(dict(extra))

    def numbers(self) -> int:
        return self.sora.parameters_left()


@dataclass(frozen=True, kw_only=True)
class Codyra(Lora):
    """`valign.adapters.adaptive.CoDyRA` for one task; its merge is that of any LoRA."""

    rank: int = 16
    max_threshold: float = 5e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.lora(context)
        levels = max(1, min(50, (context.steps - context.steps // 2)))
        made = CoDyRA(
            network,
            steps=context.steps,
            generator=context.generator("gates"),
            max_threshold=self.max_threshold,
            levels=levels,
        )
        return CodyraHandle(network, made)


class CodyraHandle(LoraHandle):
    """Gates that shut in the second half."""

    def __init__(self, network: Any, codyra: CoDyRA) -> None:
        super().__init__(network)
        self.codyra = codyra

    @property
    def settled(self) -> bool:
        return self.codyra.iteration == len(self.codyra.trace)

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.codyra.parameters(), "rate": 1.0, "weight_decay": 0.0}]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.codyra.watch(optimizer)

    def extra(self) -> dict[str, Any]:
        return self.codyra.state_dict()

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.codyra.load_state_dict(dict(extra))

    def numbers(self) -> int:
        return exported_numbers(self.network)


@dataclass(frozen=True, kw_only=True)
class Increlora:
    """`valign.adapters.adaptive.IncreLoRA`: grows from rank 1 in the first half of the training."""

    rank: int = 8  # average at the end
    top: int = 2  # modules that grow at a time
    orthogonality: float = 0.1
    dropout: float = 0.0
    learning_rate: float = 4e-3  # more than LoRA's: all factors start near 0

    def __post_init__(self) -> None:
        check_range("Increlora.rank", self.rank, low=1)
        check_range("Increlora.top", self.top, low=1)
        check_range("Increlora.orthogonality", self.orthogonality, low=0)
        check_range("Increlora.dropout", self.dropout, low=0, high=1)
        check_range("Increlora.learning_rate", self.learning_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = Lora(rank=1, alpha=float(self.rank), dropout=self.dropout).lora(context)
        modules = sum(1 for _ in export_lora(network))
        step_rank = STEP_RANKS.get(self.rank, max(1, self.rank // 2))
        rounds = max(1, -(-(self.rank - 1) * modules // (self.top * step_rank)))
        warmup = round(0.1 * context.steps)
        made = IncreLoRA(
            network,
            generator=context.generator("blocks"),
            average_rank=self.rank,
            step_rank=step_rank,
            top=self.top,
            init_warmup=warmup,
            interval=max(1, (context.steps // 2 - warmup) // rounds),
        )
        return IncreloraHandle(network, made, self.orthogonality)


class IncreloraHandle(LoraHandle):
    """Parameter groups come as it grows."""

    def __init__(self, network: Any, increlora: IncreLoRA, orthogonality: float) -> None:
        super().__init__(network)
        self.increlora, self.orthogonality = increlora, orthogonality

    @property
    def settled(self) -> bool:
        return not self.increlora.scoring

    def groups(self) -> list[dict[str, Any]]:
        return [{"params": self.increlora.parameters(), "rate": 1.0}]

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        self.increlora.watch(optimizer)

    def penalty(self) -> Float[Tensor, ""] | None:
        return self.orthogonality * self.increlora.orthogonality()

    def extra(self) -> dict[str, Any]:
        return self.increlora.state_dict()

    def restore(self, extra: Mapping[str, Any]) -> None:
        self.increlora.load_state_dict(dict(extra))

    def numbers(self) -> int:
        return exported_numbers(self.network)


@dataclass(frozen=True, kw_only=True)
class Diffora(Lora):
    """`valign.adapters.adaptive.DiffoRA`: a quarter of the steps goes into the search, the rest into the modules that it chose.

    As fewer modules are left, each gets ``rank / ratio``, so that about as much is trained as with LoRA.
    """

    ratio: float = 0.5  # share of the modules that is kept, (0, 1]
    search_share: float = 0.25  # of the steps; an alternation is two of them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("Diffora.ratio", self.ratio, above=0, high=1)
        check_range("Diffora.search_share", self.search_share, above=0, high=0.9)

    def attach(self, context: AttachContext) -> AdapterHandle:
        rounds = max(1, round(self.search_share * context.steps / 2))
        network = self.lora(context)
        search = DiffoRA(network, steps=rounds, lr=self.learning_rate)
        start = [parameter.detach().clone() for parameter in context.head]
        head = torch.optim.AdamW(context.head, lr=self.learning_rate) if context.head else None
        for number in range(rounds):
            search.step(
                lambda number=number: _with_head(context.loss(number, 0), head, context.head),  # type: ignore[misc]
                lambda number=number: context.loss(number, 1),  # type: ignore[misc]
            )
            if head is not None:
                head.step()
                head.zero_grad()
        with torch.no_grad():
            for parameter, value in zip(context.head, start):
                parameter.copy_(value)
        found = search.select(ratio=self.ratio)
        network.unload()
        rank = round(self.rank / self.ratio)
        again = self.lora(
            context, r=rank, lora_alpha=rank if self.alpha is None else self.alpha, target_modules=list(found.selected)
        )
        return DifforaHandle(again, spent=2 * rounds, selected=found.selected)


class DifforaHandle(LoraHandle):
    """A LoRA on what the search chose; a resumed run searches again, with the same outcome on a CPU."""

    def __init__(self, network: Any, *, spent: int, selected: tuple[str, ...]) -> None:
        super().__init__(network, spent=spent)
        self.selected = selected

    def extra(self) -> dict[str, Any]:
        return {"selected": list(self.selected)}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Raises: UserError if this search chose other modules, which a GPU's rounding may do."""
        hint = "The search came out otherwise on this device; train in a new folder."
        check_modules("Diffora", extra["selected"], self.selected, hint=hint)


def exported_numbers(network: nn.Module) -> int:
    """Numbers in the plain LoRA that is left."""
    return sum(lora.down.numel() + lora.up.numel() for lora in export_lora(network).values())


def _with_head(loss: Tensor, head: torch.optim.Optimizer | None, parameters: tuple[nn.Parameter, ...]) -> Tensor:
    """The same loss, and the head's gradient of it."""
    if head is not None:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
            parameter.grad = gradient
    return loss
