"""Start LoRA with a generous rank and let training shut what it does not need (SoRA, arXiv 2311.11696)."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions, check_modules
from valign.adapters.factors import lora_layers, only_adapter
from valign.adapters.gate import Prox, gates, install_gates, shut, surviving
from valign.checks import UserError, check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="sora",
    title="SoRA: sparse gates decide how much rank each module keeps",
    paper="arXiv 2311.11696",
    room="adapters",
    entry="valign.adapters.sora:SoRA",
    fidelity="exact",
    note="the paper's soft threshold after each step of the gates; the released code's masked updates are a setting "
    "(`prox=reference`)",
)


class SoRA:
    """``delta W = s B diag(g) A`` with ``s = alpha / r_max``; after each step of the gates' optimizer
    ``g <- sign(g) max(|g| - xi, 0)``.

    A component whose gate is 0 leaves A and B without gradient, but the gate keeps its own, so it can come back. `export_lora`
    gives plain LoRA of the surviving ranks, at the same scale.

        sora = SoRA(model, threshold=1e-3, generator=generator)
        main, gate = AdamW(sora.weights(), lr=8e-4, weight_decay=0.1), sora.gate_optimizer(lr=8e-4)
        (loss + sora.l1()).backward(); main.step(); gate.step()          # in this order; the gates shut by themselves

    Args:
        model: With a new LoRA of rank ``r_max`` on linear layers.
        threshold: ``xi`` of every step, >= 0; not multiplied by the learning rate unless ``threshold_times_lr``. 0 shuts nothing.
        l1_weight: Of `l1`, added to the loss by the caller.
        prox: ``"reference"`` for the released code's three masked updates, see `reference_threshold`.
        gate_init: N(0, 1), or ones, which is plain LoRA.
        generator: Of the gates.
    Raises: ValueError for negative numbers; as `fresh_linears`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generator: torch.Generator,
        threshold: float = 1e-3,
        l1_weight: float = 0.0,
        prox: Prox = "soft",
        threshold_times_lr: bool = False,
        gate_init: Literal["normal", "ones"] = "normal",
        adapter: str | None = None,
    ) -> None:
        check_range("SoRA.threshold", threshold, low=0)
        check_range("SoRA.l1_weight", l1_weight, low=0)
        check_choice("SoRA.prox", prox, ("soft", "reference"))
        check_choice("SoRA.gate_init", gate_init, ("normal", "ones"))
        self.model, self.adapter = model, only_adapter(model, adapter)
        self.threshold, self.l1_weight, self.prox, self.threshold_times_lr = threshold, l1_weight, prox, threshold_times_lr
        install_gates(model, self.adapter, "SoRA", generator=generator, scaled=True, ones=gate_init == "ones")

    def gates(self) -> dict[str, nn.Parameter]:
        """By module, float32, ``[rank]``."""
        return gates(self.model, self.adapter)

    def weights(self) -> list[nn.Parameter]:
        """A and B of every module, for the main optimizer."""
        layers = lora_layers(self.model, self.adapter).values()
        return [part[self.adapter].weight for layer in layers for part in (layer.lora_A, layer.lora_B)]

    def gate_optimizer(self, *, lr: float) -> torch.optim.AdamW:
        """The gates' own AdamW, without weight decay, watched."""
        optimizer = torch.optim.AdamW(self.gates().values(), lr=lr, weight_decay=0.0)
        self.watch(optimizer)
        return optimizer

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Shut gates after each step of ``optimizer``, which holds them; a scheduler may change its learning rate."""
        own = {id(gate) for gate in self.gates().values()}
        held = [group for group in optimizer.param_groups if own & {id(parameter) for parameter in group["params"]}]
        if not held:
            raise UserError("SoRA.watch must get the optimizer that holds the gates, got one without. Use gate_optimizer.")
        if any(group.get("weight_decay") for group in held):
            warnings.warn("SoRA's gates should have no weight decay: the threshold is their only pull towards 0.", stacklevel=2)
        optimizer.register_step_post_hook(lambda *_: self.shut(lr=float(held[0]["lr"])))

    def shut(self, *, lr: float = 1.0) -> None:
        """One proximal step; ``lr`` counts with ``threshold_times_lr`` only."""
        shut(self.gates(), self.threshold * (lr if self.threshold_times_lr else 1.0), self.prox)

    def l1(self) -> Float[Tensor, ""]:
        """``l1_weight`` times the mean of ``|g|`` over all gates of the model."""
        return self.l1_weight * torch.cat(list(self.gates().values())).abs().mean()

    def ranks(self) -> dict[str, int]:
        """Surviving rank of each module."""
        return surviving(self.gates())

    def parameters_left(self) -> int:
        """Numbers in the exported LoRA: ``sum of (fan_out + fan_in) rank``."""
        layers, ranks = lora_layers(self.model, self.adapter), self.ranks()
        return sum((layer.in_features + layer.out_features) * ranks[name] for name, layer in layers.items())

    def state_dict(self) -> dict[str, Any]:
        """What is not in the adapter's tensors (`adapter_state`): the threshold and the modules."""
        return {"threshold": self.threshold, "modules": sorted(self.gates())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: UserError for a state of other modules."""
        check_modules("SoRA", state["modules"], self.gates())
        self.threshold = state["threshold"]


class Round(NamedTuple):
    """How a training with one threshold ended."""

    threshold: float
    score: float
    parameters: int  # left


def prune_in_rounds(sora: SoRA, thresholds: Sequence[float], train: Callable[[], float]) -> list[Round]:
    """See how much can be shut: one threshold after the other, each from the weights that the one before left.

    Args:
        thresholds: Any list, or a `threshold_schedule`; each >= 0.
        train: Trains to the end with new optimizers, and returns the score.
    """
    for threshold in thresholds:
        check_range("prune_in_rounds.thresholds", threshold, low=0)
    rounds = []
    for threshold in thresholds:
        sora.threshold = threshold
        score = train()
        rounds.append(Round(threshold, score, sora.parameters_left()))
    return rounds


@dataclass(frozen=True, kw_only=True)
class SoRAOptions(LowRankOptions):
    """`SoRA` as an adapter."""

    expert: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    threshold: float | None = None  # None: so that gates from N(0, 1) lose about 30 % over the training
    l1_weight: float = 0.0

    def attach(self, context: AttachContext) -> AdapterHandle:
        threshold = 0.4 / context.steps if self.threshold is None else self.threshold
        network = self.new_lora(context)
        return SoRAHandle(
            network, SoRA(network, threshold=threshold, l1_weight=self.l1_weight, generator=context.generator("gates"))
        )


class SoRAHandle(LoraHandle):
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
