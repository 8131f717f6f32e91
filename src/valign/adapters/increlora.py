"""Start every module at rank 1 and give rank where the importance score asks for it (IncreLoRA, arXiv 2308.12043)."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from valign.adapters.base import (
    AdapterHandle,
    AdapterOptions,
    AttachContext,
    LoraHandle,
    check_modules,
    check_precision,
    exported_numbers,
    peft_lora,
)
from valign.adapters.factors import FactorVariant, LoraFactors, export_lora, fresh_linears, mark, only_adapter, write_factors
from valign.checks import UserError, check_range
from valign.methods import Method

METHOD = Method(
    slug="increlora",
    title="IncreLoRA: rank is added where the importance score asks for it",
    paper="arXiv 2308.12043",
    room="adapters",
    entry="valign.adapters.increlora:IncreLoRA",
    fidelity="variant",
    note="scores of micro-batches add up, modules of equal score grow together and the last round takes what is left, "
    "unlike the authors' code",
)

STD = 0.02  # of A and B at the start
EARLY = 1e-5  # gain of a reserve component that learns early
EPS = 1e-5  # beside the rank in the scale
STEP_RANKS = {2: 1, 4: 2, 6: 3, 8: 4}  # average rank -> components added at a time


def importance(delta: Float[Tensor, "fan_out fan_in"], gradient: Float[Tensor, "fan_out fan_in"]) -> Float[Tensor, ""]:
    """``sum |delta * gradient| / sqrt(numel)``: neither mean nor sum, as in the authors' code."""
    return (delta * gradient).abs().sum() / sqrt(delta.numel())


def restart_rate(step: int, *, start: int, warmup: int, total: int) -> float:
    """Share of the learning rate for a group added at step ``start``: linear up over ``warmup`` steps, then linear down to 0
    at ``total``."""
    local, length = step - start, total - start
    if local < warmup:
        return local / max(1, warmup)
    return max(0.0, (length - local) / max(1, length - warmup))


class Blocks(nn.Module):
    """One module's gains, and the components beyond the first block (that is peft's own A and B)."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self.first_gain = nn.Parameter(first)
        self.down, self.up, self.gain = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()


class Growing(FactorVariant):
    """``alpha / (R + 1e-5) * B (A * E)`` over all components; builds the change densely while it is scored."""

    def __init__(self, owner: "IncreLoRA", module: str) -> None:
        self.owner, self.module = owner, module

    def factors(self, layer: Any, name: str) -> LoraFactors:
        blocks, first = layer.lora_blocks[name], layer.lora_A[name].weight
        gain = torch.cat([blocks.first_gain, *blocks.gain])
        down = (gain[:, None] * torch.cat([first, *blocks.down])).to(first.dtype)
        up = torch.cat([layer.lora_B[name].weight, *blocks.up], dim=1)
        alpha = layer.lora_alpha[name] or layer.r[name]  # 0 is the rank at the start, as in the authors' code
        return LoraFactors(down, up, alpha / (self.owner.ranks[self.module] + EPS))

    def exported(self, layer: Any, name: str) -> LoraFactors:
        """Without the components whose gain is 0."""
        full, blocks = self.factors(layer, name), layer.lora_blocks[name]
        keep = torch.cat([blocks.first_gain, *blocks.gain]) != 0
        return LoraFactors(full.down[keep], full.up[:, keep], full.scale)

    def forward(self, module: Any, active_adapter: str, x: Tensor, result: Tensor, **rest: Any) -> Tensor:  # type: ignore[override]
        lora = self.factors(module, active_adapter)
        if not (self.owner.scoring and lora.down.requires_grad):
            return super().forward(module, active_adapter, x, result, **rest)
        delta = lora.scale * (lora.up @ lora.down)
        fixed = delta.detach()
        delta.register_hook(lambda gradient: self.owner.note(self.module, importance(fixed, gradient)))
        return result + linear(module.lora_dropout[active_adapter](x), delta)


class IncreLoRA:
    """``delta W = alpha / (R + 1e-5) B (A * E)``; modules with the highest score get components until the total rank is spent.

    Score: ``S = sum |dW * dL/ddW| / sqrt(numel)`` summed over the micro-batches of a step, ``I`` its running mean, ``U`` that of
    ``|S - I|``, score ``I U``. At steps ``> init_warmup`` that are multiples of ``interval`` the ``top`` best grow. Every module
    keeps a reserve whose directions learn early (gain 1e-5, fixed), so that a new component starts well and without a jump; old
    components shrink by the growth of ``R``. Equals of the ``top``-th grow too; the last round grows by what is left, best first.

        incre = IncreLoRA(model, average_rank=2, generator=generator)     # a new LoRA of rank 1
        optimizer = AdamW(incre.parameters(), lr=1e-3);  incre.watch(optimizer)
        (loss + 0.1 * incre.orthogonality()).backward();  optimizer.step()

    Parameter groups are added while it runs: set learning rates by a loop over the groups, or let ``restart_warmup`` do it. For a
    resume, make everything anew, `load_state_dict`, then write `adapter_state` back and load the optimizer.

    Args:
        average_rank: Of the modules at the end; ``total`` names the sum itself.
        step_rank: Components a growing module gets; by average rank 1, 2, 3, 4 for 2, 4, 6, 8.
        betas: Of the two running means, (0, 1).
        early: Let the reserve's directions learn before they are used. Without it the start is exactly the base model.
        restart_warmup, total_steps: If given, each group warms up anew and all end at 0 together.
    Raises: ValueError for numbers outside their range; as `fresh_linears`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        generator: torch.Generator,
        average_rank: int = 2,
        total: int | None = None,
        step_rank: int | None = None,
        top: int = 2,
        init_warmup: int = 1000,
        interval: int = 1000,
        betas: tuple[float, float] = (0.85, 0.85),
        early: bool = True,
        restart_warmup: int | None = None,
        total_steps: int | None = None,
        adapter: str | None = None,
    ) -> None:
        for name, number in (("top", top), ("interval", interval), ("average_rank", average_rank)):
            check_range(f"IncreLoRA.{name}", number, low=1)
        check_range("IncreLoRA.init_warmup", init_warmup, low=0)
        for beta in betas:
            if not 0 < beta < 1:
                raise ValueError(f"IncreLoRA.betas must be in (0, 1), got {beta!r}.")
        if step_rank is None and average_rank not in STEP_RANKS:
            raise ValueError(f"IncreLoRA.step_rank must be given for average rank {average_rank}, got None. Known: 2, 4, 6, 8.")
        self.step_rank = STEP_RANKS[average_rank] if step_rank is None else step_rank
        check_range("IncreLoRA.step_rank", self.step_rank, low=1)
        if (restart_warmup is None) != (total_steps is None):
            raise ValueError("IncreLoRA.restart_warmup and total_steps must come together, got one of them.")
        check_range("IncreLoRA.restart_warmup", restart_warmup or 0, low=0)
        check_range("IncreLoRA.total_steps", 1 if total_steps is None else total_steps, low=1)
        self.adapter, self.generator = only_adapter(model, adapter), generator
        self.top, self.init_warmup, self.interval, self.betas, self.early = top, init_warmup, interval, betas, early
        self.restart_warmup, self.total_steps = restart_warmup, total_steps
        self.layers = fresh_linears(model, self.adapter, "IncreLoRA")
        self.ranks = {name: int(layer.r[self.adapter]) for name, layer in self.layers.items()}
        self.target = average_rank * len(self.layers) if total is None else total
        check_range("IncreLoRA.total", self.target, low=sum(self.ranks.values()), hint="That is the rank at the start.")
        self.step, self.scoring = 0, sum(self.ranks.values()) < self.target
        self.mean, self.spread = dict.fromkeys(self.layers, 0.0), dict.fromkeys(self.layers, 0.0)
        self._noted: dict[str, Tensor] = {}
        self.growths: list[dict[str, Any]] = []  # {"step": t, "grown": {module: components}}, to be replayed
        self._clocks: list[tuple[int, float]] = []  # step at which each parameter group came, and its learning rate at the height
        self.optimizer: torch.optim.Optimizer | None = None
        for name, layer in self.layers.items():
            self._install(name, layer)

    def parameters(self) -> list[nn.Parameter]:
        """The first blocks, A, B and gain of every module; the rest joins while training."""
        found: list[nn.Parameter] = []
        for layer in self.layers.values():
            found += [
                layer.lora_A[self.adapter].weight,
                layer.lora_B[self.adapter].weight,
                layer.lora_blocks[self.adapter].first_gain,
            ]
        return found

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow ``optimizer``: score and grow before each of its steps (after backward and clipping).

        Raises: UserError if it cannot take new parameter groups.
        """
        if not hasattr(optimizer, "add_param_group"):
            raise UserError("IncreLoRA.watch must get an optimizer with add_param_group, got none. Use one of torch.optim.")
        self.optimizer = optimizer
        self._clocks = [(0, float(group["lr"])) for group in optimizer.param_groups]
        reserve = [
            p for layer in self.layers.values() for part in ("down", "up") for p in getattr(layer.lora_blocks[self.adapter], part)
        ]
        if self.early and reserve:
            self._add_group(reserve, 0)
        optimizer.register_step_pre_hook(lambda *_: self.before_step())

    def note(self, module: str, score: Float[Tensor, ""]) -> None:
        """Add a micro-batch's score."""
        self._noted[module] = self._noted[module] + score.detach() if module in self._noted else score.detach()

    def before_step(self) -> None:
        """Update the scores, grow if it is time, set learning rates. Raises: TypeError for gains in half precision."""
        check_precision("IncreLoRA's gains", (layer.lora_blocks[self.adapter].first_gain for layer in self.layers.values()))
        if self.scoring:
            one, two = self.betas
            for name in self.layers:
                now = float(self._noted.get(name, 0.0))
                self.mean[name] = one * self.mean[name] + (1 - one) * now
                self.spread[name] = two * self.spread[name] + (1 - two) * abs(now - self.mean[name])
            if self.step > self.init_warmup and self.step % self.interval == 0:
                self._grow()
        self._noted.clear()
        if self.restart_warmup is not None and self.total_steps is not None and self.optimizer is not None:
            for group, (start, rate) in zip(self.optimizer.param_groups, self._clocks, strict=True):
                group["lr"] = rate * restart_rate(self.step, start=start, warmup=self.restart_warmup, total=self.total_steps)
        self.step += 1

    def scores(self) -> dict[str, float]:
        """``I U`` of every module."""
        return {name: self.mean[name] * self.spread[name] for name in self.layers}

    def orthogonality(self) -> Float[Tensor, ""]:
        """Mean over all A and B, reserve included, of ``|A A^T - 1|`` and ``|B^T B - 1|`` (Frobenius, not squared); weight 0.1
        there."""
        terms = []
        for layer in self.layers.values():
            blocks = layer.lora_blocks[self.adapter]
            down = torch.cat([layer.lora_A[self.adapter].weight, *blocks.down])
            up = torch.cat([layer.lora_B[self.adapter].weight, *blocks.up], dim=1)
            for gram in (down @ down.T, up.T @ up):
                terms.append((gram - torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).norm())
        return torch.stack(terms).mean()

    def state_dict(self) -> dict[str, Any]:
        """What is not in the adapter's tensors (`adapter_state`) or the optimizer."""
        return {
            "modules": list(self.layers),
            "step": self.step,
            "growths": [{"step": growth["step"], "grown": dict(growth["grown"])} for growth in self.growths],
            "mean": dict(self.mean),
            "spread": dict(self.spread),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Grow as the saved one did. Call it once, on a new object that watches a new optimizer, before the tensors are loaded.

        Raises: UserError for other modules, or an object that has trained.
        """
        check_modules("IncreLoRA", state["modules"], self.layers)
        if self.step:
            raise UserError(f"IncreLoRA.load_state_dict must be called on a new object, got one at step {self.step}. Make it anew.")
        for growth in state["growths"]:
            self.step = growth["step"]
            self._activate(growth["grown"])
        self.step, self.mean, self.spread = state["step"], dict(state["mean"]), dict(state["spread"])
        self.generator.set_state(state["generator"])

    def _install(self, name: str, layer: Any) -> None:
        first = layer.lora_A[self.adapter].weight
        rank = layer.r[self.adapter]
        write_factors(
            layer, self.adapter, down=self._draw(first, rank, layer.in_features), up=self._draw(first, layer.out_features, rank)
        )
        if not hasattr(layer, "lora_blocks"):
            layer.lora_blocks = nn.ModuleDict()
            layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_blocks")
        layer.lora_blocks[self.adapter] = Blocks(torch.zeros(rank, device=first.device))
        layer.lora_variant[self.adapter] = Growing(self, name)
        mark(layer, self.adapter, "IncreLoRA")
        if self.scoring:
            self._reserve(layer, self.step_rank)

    def _reserve(self, layer: Any, count: int) -> list[nn.Parameter]:
        """Append components that are not used yet; return what of them learns early."""
        blocks, first = layer.lora_blocks[self.adapter], layer.lora_A[self.adapter].weight
        for _ in range(count):
            blocks.down.append(nn.Parameter(self._draw(first, 1, layer.in_features), requires_grad=self.early))
            blocks.up.append(nn.Parameter(self._draw(first, layer.out_features, 1), requires_grad=self.early))
            gain = torch.full((1,), EARLY if self.early else 0.0, device=first.device)
            blocks.gain.append(nn.Parameter(gain, requires_grad=False))
        return [*blocks.down[len(blocks.down) - count :], *blocks.up[len(blocks.up) - count :]] if self.early else []

    def _draw(self, like: Tensor, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.generator.device) * STD
        return drawn.to(device=like.device, dtype=like.dtype)

    def _grow(self) -> None:
        left, scores = self.target - sum(self.ranks.values()), self.scores()
        grown: dict[str, int] = {}
        order = sorted(self.layers, key=lambda module: (-scores[module], module))
        least = scores[order[min(self.top, len(order)) - 1]]
        for name in order:
            count = min(self.step_rank, left - sum(grown.values()))
            if count and scores[name] >= least:
                grown[name] = count
        self._activate(grown)

    def _activate(self, grown: dict[str, int]) -> None:
        """Turn reserve components into used ones, and lay in new reserve; end the scoring when the total is reached."""
        joining: list[nn.Parameter] = []
        for name, count in grown.items():
            layer, used = self.layers[name], self.ranks[name] - int(self.layers[name].r[self.adapter])
            blocks = layer.lora_blocks[self.adapter]
            for index in range(used, used + count):
                parts = [blocks.gain[index]] if self.early else [blocks.gain[index], blocks.down[index], blocks.up[index]]
                for part in parts:
                    part.requires_grad_(True)
                joining += parts
            self.ranks[name] += count
            joining += self._reserve(layer, count)
        self.growths.append({"step": self.step, "grown": dict(grown)})
        self._add_group(joining, self.step)
        if sum(self.ranks.values()) >= self.target:
            self._finish()

    @torch.no_grad()
    def _finish(self) -> None:
        """The leftover reserve is nothing from now on."""
        self.scoring = False
        for name, layer in self.layers.items():
            blocks, used = layer.lora_blocks[self.adapter], self.ranks[name] - int(layer.r[self.adapter])
            for index in range(used, len(blocks.gain)):
                blocks.gain[index].zero_()

    def _add_group(self, parameters: list[nn.Parameter], start: int) -> None:
        if self.optimizer is None:
            raise UserError("IncreLoRA must watch an optimizer before it grows, got none. Call watch first.")
        options = {key: value for key, value in self.optimizer.param_groups[0].items() if key not in ("params", "param_names")}
        self.optimizer.add_param_group({**options, "params": parameters})
        self._clocks.append((start, self._clocks[0][1]))


@dataclass(frozen=True, kw_only=True)
class IncreLoRAOptions(AdapterOptions):
    """`IncreLoRA` as an adapter: grows from rank 1 in the first half of the training."""

    expert: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    rank: int = 8  # average at the end
    top: int = 2  # modules that grow at a time
    orthogonality: float = 0.1
    dropout: float = 0.0
    learning_rate: float = 4e-3  # more than LoRA's: all factors start near 0

    def __post_init__(self) -> None:
        check_range("IncreLoRAOptions.rank", self.rank, low=1)
        check_range("IncreLoRAOptions.top", self.top, low=1)
        check_range("IncreLoRAOptions.orthogonality", self.orthogonality, low=0)
        check_range("IncreLoRAOptions.dropout", self.dropout, low=0, high=1)
        check_range("IncreLoRAOptions.learning_rate", self.learning_rate, above=0)

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = peft_lora(context, r=1, lora_alpha=float(self.rank), lora_dropout=self.dropout)
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
        return IncreLoRAHandle(network, made, self.orthogonality)


class IncreLoRAHandle(LoraHandle):
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
