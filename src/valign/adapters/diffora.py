"""Search which modules deserve a LoRA at all (DiffoRA, arXiv 2502.08905; a reconstruction)."""

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions, check_modules
from valign.adapters.factors import (
    FactorVariant,
    LoraFactors,
    add_parameter,
    fresh_linears,
    lora_layers,
    mark,
    only_adapter,
    plain,
)
from valign.checks import UserError, check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="diffora",
    title="DiffoRA: a short search for the modules that get a LoRA",
    paper="arXiv 2502.08905",
    room="adapters",
    entry="valign.adapters.diffora:DiffoRA",
    fidelity="variant",
    note="a reconstruction from the abstract and summaries: relaxation, scope, sharing and first order are ours",
)

Relaxation = Literal["sigmoid", "row_softmax"]
Scope = Literal["row", "global"]
Losses = Tensor | Iterable[Tensor]  # a loss, or one per micro-batch: they add up


class ModulePosition(NamedTuple):
    """Where a module stands in the table of layers and kinds."""

    row: str  # "model.layers.3"
    kind: str  # "self_attn.q_proj"


def position_of(module: str) -> ModulePosition:
    """Split a module's name behind its last layer number: ``model.layers.3.self_attn.q_proj`` -> layer 3, kind
    ``self_attn.q_proj``.

    A number at the very end (``to_out.0``) is part of the kind.
    """
    found = re.fullmatch(r"(.*\.\d+|\d+)\.(.*[A-Za-z_].*)", module)
    return ModulePosition(found[1], found[2]) if found else ModulePosition("", module)


def halves(count: int, *, generator: torch.Generator, batch_size: int = 1) -> tuple[list[int], list[int]]:
    """Indices of training and validation, drawn at random: disjoint, sorted, together all.

    Raises: UserError for fewer rows than two batches.
    """
    check_range("halves.batch_size", batch_size, low=1)
    if count < 2 * batch_size:
        raise UserError(f"DiffoRA must split the data in two, got {count} rows for two batches of {batch_size}. Give it more data.")
    order = torch.randperm(count, generator=generator).tolist()
    return sorted(order[: count // 2]), sorted(order[count // 2 :])


def choose(weights: Mapping[str, float], *, ratio: float = 0.5, scope: Scope = "row") -> list[str]:
    """The modules of the largest weights, sorted by name; of equals the first by name.

    Args:
        ratio: Share that is kept, (0, 1].
        scope: ``"row"`` keeps ``max(1, round(ratio * kinds))`` in each layer, ``"global"`` that share of all.
    """
    check_range("choose.ratio", ratio, above=0, high=1)
    check_choice("choose.scope", scope, ("row", "global"))
    rows: dict[str, list[str]] = {}
    for module in sorted(weights):
        rows.setdefault(position_of(module).row if scope == "row" else "", []).append(module)
    kept = []
    for modules in rows.values():
        if scope == "row" and len(modules) < 2:
            warnings.warn('DiffoRA has a layer with fewer than 2 kinds of modules; use scope="global".', stacklevel=2)
        kept += sorted(modules, key=lambda module: -weights[module])[: max(1, round(ratio * len(modules)))]
    return sorted(kept)


class Chosen(FactorVariant):
    """``p s B A``, ``p`` from the search."""

    def __init__(self, search: "DiffoRA") -> None:
        self.search = search

    def factors(self, layer: Any, name: str) -> LoraFactors:
        lora = plain(layer, name)
        return LoraFactors(lora.down, lora.up * self.search.gate_of(layer).to(lora.up.dtype), lora.scale)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a search found."""

    selected: tuple[str, ...]
    gates: Mapping[str, float]  # p per module; compare, do not read as probabilities

    def table(self) -> dict[str, dict[str, float]]:
        """``p`` by layer, then kind."""
        found: dict[str, dict[str, float]] = {}
        for module, gate in sorted(self.gates.items()):
            found.setdefault(position_of(module).row, {})[position_of(module).kind] = gate
        return found


class DiffoRA:
    """``y = W x + p s B A x`` with one relaxed choice ``p = sigmoid(a)`` per module; A, B fit one half of the data, ``a`` the
    other.

    First-order alternation, after ``warmup`` of the steps on A and B alone (while ``B = 0`` the choices have no gradient)::

        search = DiffoRA(model, steps=200)
        train, held_out = halves(len(data), generator=generator)
        for batch, other in ...:                         # batches of the two halves
            search.step(lambda: loss(batch), lambda: loss(other))
        found = search.select(ratio=0.5)

    Then train anew with ``LoraConfig(target_modules=list(found.selected))``, or `keep` the search's factors; `share_unselected`
    gives the other modules one common pair per kind. Select by rank, never by ``p > 0.5``: the values are not calibrated.

    Reconstructed from the abstract and short summaries: relaxation, scope, sharing and first order are choices.
    Args:
        steps: Of the search. warmup: Share of them without choices, [0, 1).
        lr: Of A and B (AdamW, no weight decay). choice_lr: Of ``a`` (Adam, betas 0.5 and 0.999).
        budget: Weight of ``mean(p)`` in the upper loss, >= 0.
        clip: Gradient norm of either level, > 0.
        reduce: Applied to every gradient before clipping, as its mean over processes.
    Raises: ValueError for numbers outside their range; as `fresh_linears`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        lr: float = 1e-4,
        choice_lr: float = 3e-2,
        warmup: float = 0.1,
        budget: float = 0.0,
        clip: float = 1.0,
        relaxation: Relaxation = "sigmoid",
        reduce: Callable[[Tensor], Tensor] | None = None,
        adapter: str | None = None,
    ) -> None:
        check_range("DiffoRA.steps", steps, low=1)
        check_range("DiffoRA.lr", lr, above=0)
        check_range("DiffoRA.choice_lr", choice_lr, above=0)
        check_range("DiffoRA.budget", budget, low=0)
        check_range("DiffoRA.clip", clip, above=0)
        check_choice("DiffoRA.relaxation", relaxation, ("sigmoid", "row_softmax"))
        if not 0 <= warmup < 1:
            raise ValueError(f"DiffoRA.warmup must be in [0, 1), got {warmup!r}.")
        self.model, self.adapter, self.reduce = model, only_adapter(model, adapter), reduce
        self.warmup_steps, self.budget, self.clip, self.relaxation, self.done = round(warmup * steps), budget, clip, relaxation, 0
        self.layers = fresh_linears(model, self.adapter, "DiffoRA")
        for layer in self.layers.values():
            device = layer.lora_A[self.adapter].weight.device
            add_parameter(layer, "lora_choice", self.adapter, torch.zeros((), device=device))
            layer.lora_variant[self.adapter] = Chosen(self)
            mark(layer, self.adapter, "DiffoRA")
        self._names = {id(layer): name for name, layer in self.layers.items()}
        rows: dict[str, list[str]] = {}
        for name in self.layers:
            rows.setdefault(position_of(name).row, []).append(name)
        self._rows = {name: modules for modules in rows.values() for name in modules}
        self.lower = torch.optim.AdamW(self.weights(), lr=lr, weight_decay=0.0)
        self.upper = torch.optim.Adam(self.choices().values(), lr=choice_lr, betas=(0.5, 0.999))

    def weights(self) -> list[nn.Parameter]:
        """A and B of every module."""
        return [part[self.adapter].weight for layer in self.layers.values() for part in (layer.lora_A, layer.lora_B)]

    def choices(self) -> dict[str, nn.Parameter]:
        """``a`` of every module, a float32 scalar."""
        return {name: layer.lora_choice[self.adapter] for name, layer in self.layers.items()}

    def gate_of(self, layer: Any) -> Float[Tensor, ""]:
        """``p`` of a layer: ``sigmoid(a)``, or its share of the layer's softmax times the number of kinds."""
        if self.relaxation == "sigmoid":
            return layer.lora_choice[self.adapter].sigmoid()
        name = self._names[id(layer)]
        row = self._rows[name]
        return len(row) * torch.stack([self.choices()[module] for module in row]).softmax(0)[row.index(name)]

    def step(self, train_loss: Callable[[], Losses], held_out_loss: Callable[[], Losses]) -> None:
        """One alternation: A and B on ``train_loss``, then, after the warm-up, the choices on ``held_out_loss``.

        Either is a loss, or an iterable of micro-batches' losses that is read one by one; they are summed.
        """
        self._move(_each(train_loss()), self.lower, self.weights())
        if self.done >= self.warmup_steps:
            losses = _each(held_out_loss())
            if self.budget:
                losses = chain(losses, [self.budget * torch.stack([self.gate_of(layer) for layer in self.layers.values()]).mean()])
            self._move(losses, self.upper, list(self.choices().values()))
        self.done += 1

    def _move(self, losses: Iterable[Tensor], optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        """One step of these parameters alone; no gradient is left behind on others."""
        optimizer.zero_grad()
        for loss in losses:
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        for parameter in parameters:
            if self.reduce is not None and parameter.grad is not None:
                parameter.grad = self.reduce(parameter.grad)
        nn.utils.clip_grad_norm_(parameters, self.clip)
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def select(self, *, ratio: float = 0.5, scope: Scope = "row") -> Outcome:
        """Discretize: the modules with the largest ``p``, see `choose`."""
        found = {name: float(self.gate_of(layer)) for name, layer in self.layers.items()}
        return Outcome(selected=tuple(choose(found, ratio=ratio, scope=scope)), gates=found)

    @torch.no_grad()
    def keep(self, outcome: Outcome, *, share: bool = False) -> None:
        """End the search with its own factors: ``B <- p B`` in selected modules, which changes no answer there.

        The others leave the LoRA, or, with ``share``, have one pair per kind from ``B = 0``, as `share_unselected`.
        """
        gates = {name: self.gate_of(layer) for name, layer in self.layers.items()}
        for name, layer in self.layers.items():
            up = layer.lora_B[self.adapter].weight
            up.mul_(gates[name] if name in outcome.selected else 0.0)
        for layer in self.layers.values():
            layer.lora_variant.pop(self.adapter)
            layer.lora_method.pop(self.adapter)
            del layer.lora_choice[self.adapter]
        if share:
            share_unselected(self.model, outcome.selected, adapter=self.adapter)
            return
        for name in sorted(set(self.layers) - set(outcome.selected)):
            self.layers[name].delete_adapter(self.adapter)

    def state_dict(self) -> dict[str, Any]:
        """What is not in the adapter's tensors (`adapter_state`)."""
        return {
            "modules": list(self.layers),
            "done": self.done,
            "lower": self.lower.state_dict(),
            "upper": self.upper.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: UserError for a state of other modules."""
        check_modules("DiffoRA", state["modules"], self.layers)
        self.done = state["done"]
        self.lower.load_state_dict(state["lower"])
        self.upper.load_state_dict(state["upper"])


def share_unselected(model: nn.Module, selected: Sequence[str], *, adapter: str | None = None) -> int:
    """Let all modules of one kind and shape that were not selected share one pair A, B of a new LoRA; return the number of pairs.

    Every user's factors are the same tensors, so their gradients add up. `export_lora` writes a copy for each.
    Raises: UserError for a selected module that the LoRA does not have.
    """
    adapter = only_adapter(model, adapter)
    layers = lora_layers(model, adapter)
    unknown = sorted(set(selected) - set(layers))
    if unknown:
        raise UserError(f"share_unselected.selected must name modules of the LoRA, got {unknown[0]}. Attach it to all modules.")
    first: dict[tuple[str, torch.Size, torch.Size], Any] = {}
    for name, layer in layers.items():
        if name in selected:
            continue
        down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        owner = first.setdefault((position_of(name).kind, down.shape, up.shape), layer)
        for part in ("lora_A", "lora_B"):
            getattr(layer, part)[adapter].weight = getattr(owner, part)[adapter].weight
    return len(first)


@torch.no_grad()
def gram_matrix(
    weight: Float[Tensor, "fan_out fan_in"],
    inputs: Float[Tensor, "sample fan_in"],
    *,
    slope: Callable[[Tensor], Tensor] = lambda z: (z > 0).to(z.dtype),
) -> Float[Tensor, "sample sample"]:
    """``H_ij = (x_i . x_j) <act'(W x_i), act'(W x_j)> / fan_out``, for a ReLU unless another ``slope`` is given.

    Its smallest eigenvalue (``torch.linalg.eigvalsh(H)[0]``) with and without a module's change is a diagnostic of the choice,
    never the rule.
    """
    slopes = slope(inputs @ weight.T)
    return (inputs @ inputs.T) * (slopes @ slopes.T) / len(weight)


def _each(losses: Losses) -> Iterable[Tensor]:
    return [losses] if isinstance(losses, Tensor) else losses


@dataclass(frozen=True, kw_only=True)
class DiffoRAOptions(LowRankOptions):
    """`DiffoRA` as an adapter: a quarter of the steps goes into the search, the rest into the modules that it chose.

    As fewer modules are left, each gets ``rank / ratio``, so that about as much is trained as with LoRA.
    """

    expert: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    ratio: float = 0.5  # share of the modules that is kept, (0, 1]
    search_share: float = 0.25  # of the steps; an alternation is two of them

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("DiffoRAOptions.ratio", self.ratio, above=0, high=1)
        check_range("DiffoRAOptions.search_share", self.search_share, above=0, high=0.9)

    def attach(self, context: AttachContext) -> AdapterHandle:
        """Raises: UserError on several processes, whose searches could end differently."""
        if context.processes > 1:
            raise UserError(f"diffora must search on one process, got {context.processes}. Start it without `accelerate launch`.")
        rounds = max(1, round(self.search_share * context.steps / 2))
        network = self.new_lora(context)
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
        again = self.new_lora(
            context, r=rank, lora_alpha=rank if self.alpha is None else self.alpha, target_modules=list(found.selected)
        )
        return DiffoRAHandle(again, spent=2 * rounds, selected=found.selected)


class DiffoRAHandle(LoraHandle):
    """A LoRA on what the search chose; a resumed run searches again, with the same outcome on a CPU."""

    def __init__(self, network: Any, *, spent: int, selected: tuple[str, ...]) -> None:
        super().__init__(network, spent=spent)
        self.selected = selected

    def extra(self) -> dict[str, Any]:
        return {"selected": list(self.selected)}

    def restore(self, extra: Mapping[str, Any]) -> None:
        """Raises: UserError if this search chose other modules, which a GPU's rounding may do."""
        hint = "The search came out otherwise on this device; train in a new folder."
        check_modules("DiffoRA", extra["selected"], self.selected, hint=hint)


def _with_head(loss: Tensor, head: torch.optim.Optimizer | None, parameters: tuple[nn.Parameter, ...]) -> Tensor:
    """The same loss, and the head's gradient of it."""
    if head is not None:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters, retain_graph=True)):
            parameter.grad = gradient
    return loss
