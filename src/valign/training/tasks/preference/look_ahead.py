"""A training on pairs that looks ahead: what it learns must also hold after a simulated benign fine-tuning (ResAlign)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from valign.adapters.changes import ChangeFactors, change_of
from valign.checks import UserError
from valign.objectives import denoising_error
from valign.objectives.robust.look_ahead import LookAhead, implicit_gradient
from valign.randomness import generator_for
from valign.training.engine.processes import reduce_sum
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.pair_step import SUMS, PairStep
from valign.training.tasks.preference.task import PreferenceTask

FULL_RATE = 0.1  # learning rate of whole weights, by that of a LoRA
PROBE = 1e-3  # root mean square, over the weights, of the step of a finite difference
Item = TypeVar("Item")


@dataclass(frozen=True)
class Scenario:
    """One simulated fine-tuning: which pairs' safe sides it is trained on, and how."""

    number: int  # in the whole training
    pairs: tuple[int, ...]
    first_visit: int  # of the pairs, so that no two fine-tunings share a draw
    steps: int
    rate: float
    way: str
    rank: int

    def visits(self, step: int, size: int) -> list[tuple[int, int]]:
        """``(pair, visit)`` of its step ``step`` (from 0)."""
        places = range(step * size, (step + 1) * size)
        return [(self.pairs[place % len(self.pairs)], self.first_visit + step) for place in places]


@dataclass
class WeightOffsets:
    """Changes of the weights of some linear layers, beside any adapter, while `on`; ``layers`` by name."""

    layers: dict[str, nn.Module]
    now: tuple[dict[str, ChangeFactors], ...] = ()  # they add up

    @contextmanager
    def on(self, *changes: dict[str, ChangeFactors]) -> Iterator[None]:
        """Inside, every layer also answers with its part of the changes."""
        hooks = [layer.register_forward_hook(self._hook(name)) for name, layer in self.layers.items()]
        before, self.now = self.now, changes
        try:
            yield
        finally:
            self.now = before
            for hook in hooks:
                hook.remove()

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, they are as they were loaded."""
        before, self.now = self.now, ()
        try:
            yield
        finally:
            self.now = before

    def _hook(self, name: str) -> Any:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            for change in self.now:
                one, seen = change[name], inputs[0]
                seen = linear(seen.to(one.up.dtype), one.down) if one.down is not None else seen.to(one.up.dtype)
                output = output + linear(seen, one.up).to(output.dtype)
            return output

        return forward


@dataclass
class BenignFuture:
    """Simulates fine-tunings on the safe sides of pairs, of the denoiser with its adapter as it stands; leaves both untouched.

    Raises: UserError if no layer has one of the ``inner_targets``.
    """

    step: PairStep
    source: PairSource
    options: LookAhead
    offsets: WeightOffsets = field(init=False)

    def __post_init__(self) -> None:
        endings = self.options.inner_targets
        modules: list[tuple[str, Any]] = sorted(self.step.model.denoiser.named_modules())
        found: dict[str, nn.Module] = {
            name: module
            for name, module in modules
            if any(f".{name}".endswith(f".{ending}") for ending in endings) and _is_linear(module)
        }
        if not found:
            raise UserError(f"LookAhead.inner_targets must name linear layers of the denoiser, got {', '.join(endings)}.")
        self.offsets = WeightOffsets(found)

    def scenario(self, step: int, number: int) -> Scenario:
        """What fine-tuning ``number`` (from 0) of the training's step ``step`` is, by the seed alone."""
        options, place = self.options, step * self.options.scenarios + number
        draws = generator_for("look-ahead", self.step.config.seed, place)

        def drawn(items: Sequence[Item]) -> Item:
            return items[int(torch.randint(len(items), (), generator=draws))]

        pairs = torch.randperm(len(self.source), generator=draws)[: options.inner_rows].tolist()
        return Scenario(
            place,
            tuple(pairs),
            place * max(1, *options.inner_steps),
            drawn(options.inner_steps),
            drawn(options.inner_rates),
            drawn(options.inner_ways),
            drawn(options.inner_ranks),
        )

    def reach(self, scenario: Scenario) -> dict[str, ChangeFactors]:
        """The weights' changes after the fine-tuning, without gradients."""
        started = {name: self._start(name, layer, scenario) for name, layer in self.offsets.layers.items()}
        trained = [part for one in started.values() for part in (one.up, one.down) if part is not None]
        rate = scenario.rate * (FULL_RATE if scenario.way == "full" else 1.0)
        optimizer = torch.optim.Adam([part.requires_grad_() for part in trained], lr=rate)
        for step in range(scenario.steps):
            with self.offsets.on(started):
                gradients = torch.autograd.grad(self.loss(scenario, step), trained)
            for part, gradient in zip(trained, gradients, strict=True):
                part.grad = gradient
            optimizer.step()
        return {
            name: ChangeFactors(one.up.detach(), None if one.down is None else one.down.detach()) for name, one in started.items()
        }

    def loss(self, scenario: Scenario, step: int) -> Tensor:
        """Mean denoising error of safe images under their safe captions, with gradients."""
        batch = self.source.visit(scenario.visits(step, self.options.inner_batch), safe_caption=True)
        images = batch.pieces(split=True)[0]
        with self.step.accelerator.autocast():
            answer = self.step.model.predict(images.noisy, images.timesteps, images.conditioning)
        return denoising_error(answer, images.target).mean()

    def curvature(self, scenario: Scenario, reached: dict[str, ChangeFactors], direction: Tensor) -> Tensor:
        """The Hessian of `loss` by whole weights, times ``direction``, by a central difference."""
        size = PROBE / float(direction.square().mean().sqrt().clamp(min=torch.finfo(direction.dtype).tiny))
        ahead, behind = (self._slope(scenario, reached, sign * size * direction) for sign in (1, -1))
        return (ahead - behind) / (2 * size)

    def probe(self, flat: Tensor | None = None) -> dict[str, ChangeFactors]:
        """Changes of whole weights, trainable: zeros, or ``flat`` cut into layers."""
        shapes = {name: _shape(layer) for name, layer in self.offsets.layers.items()}
        sizes = [rows * columns for rows, columns in shapes.values()]
        parts = torch.zeros(sum(sizes), device=self.step.model.device) if flat is None else flat
        cut = zip(shapes.items(), parts.split(sizes), strict=True)
        return {name: ChangeFactors(part.view(shape).clone().requires_grad_()) for (name, shape), part in cut}

    def _slope(self, scenario: Scenario, reached: dict[str, ChangeFactors], moved: Tensor) -> Tensor:
        probe = self.probe(moved)
        with self.offsets.on(reached, probe):
            gradients = torch.autograd.grad(self.loss(scenario, 0), [one.up for one in probe.values()])
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _start(self, name: str, layer: nn.Module, scenario: Scenario) -> ChangeFactors:
        """A LoRA as peft starts it, or no change of the whole weight."""
        rows, columns = _shape(layer)
        device = self.step.model.device
        if scenario.way == "full":
            return ChangeFactors(torch.zeros(rows, columns, device=device))
        draws = generator_for("look-ahead start", self.step.config.seed, scenario.number, name)
        down = (2 * torch.rand(scenario.rank, columns, generator=draws) - 1) / columns**0.5
        return ChangeFactors(torch.zeros(rows, scenario.rank, device=device), down.to(device))


class LookAheadTask(PreferenceTask):
    """`PreferenceTask` whose pair loss is also taken after simulated fine-tunings; what it retains is held at the start alone.

    Args:
        look_ahead: How they are simulated.
    """

    def __init__(self, step: PairStep, *rest: Any, look_ahead: LookAhead) -> None:
        self.ahead = look_ahead
        super().__init__(step, *rest)
        self.future = BenignFuture(self.step, self.source, look_ahead)
        apart = step.off

        @contextmanager
        def off(model: Any) -> Iterator[None]:
            with apart(model), self.future.offsets.off():
                yield

        self.step = replace(step, off=off)
        if look_ahead.implicit_steps:
            for layer in self._adapted().values():
                change_of(layer)  # raises for an adapter whose change cannot be read
        self.reached: list[tuple[Scenario, dict[str, ChangeFactors]]] = []
        self.moved = 0.0  # pair loss after the fine-tunings, summed over this process' pairs

    def gradients(self, step: int) -> dict[str, float]:
        scenarios = [self.future.scenario(step, number) for number in range(self.ahead.scenarios)]
        self.reached = [(scenario, self.future.reach(scenario)) for scenario in scenarios]
        self.moved = 0.0
        record = super().gradients(step)
        moved = float(reduce_sum(self.accelerator, torch.tensor(self.moved, device=self.accelerator.device)))
        return {**record, "look_ahead_loss": moved / self.config.pairs_per_step}

    def _pairs(self, mine: list[tuple[int, int]]) -> Tensor:
        """As it is and after each fine-tuning: ``plain + share * mean(after - plain)``, which is plain where nothing moved."""
        parameters, share = self.parameters(), self.ahead.look_ahead_share / self.ahead.scenarios
        held = _taken(parameters)
        sums = super()._pairs(mine)
        plain = _taken(parameters)
        total = [gradient.clone() for gradient in plain]
        for scenario, reached in self.reached:
            for place, gradient in enumerate(self._after(scenario, reached, mine, parameters)):
                total[place] += share * (gradient - plain[place])
        for parameter, before, own in zip(parameters, held, total, strict=True):
            parameter.grad = before + own
        return sums

    def _after(
        self, scenario: Scenario, reached: dict[str, ChangeFactors], mine: list[tuple[int, int]], parameters: Sequence[nn.Parameter]
    ) -> list[Tensor]:
        """The pairs' gradients where the fine-tuning leads, through what it does to the weights."""
        future = self.future
        implicit = self.ahead.implicit_steps if scenario.steps else 0  # nothing moved: there is nothing to go through
        probe = (future.probe(),) if implicit else ()
        with future.offsets.on(reached, *probe):
            found = super()._pairs(mine)
        self.moved += float(found[SUMS.index("loss")]) / self.ahead.scenarios
        for whole in probe:
            slope = torch.cat([one.up.grad.flatten() for one in whole.values() if one.up.grad is not None])
            bent = implicit_gradient(
                slope,
                lambda direction: future.curvature(scenario, reached, direction),
                proximity=self.ahead.proximity,
                iterations=implicit,
            )
            self._through(bent.gradient - slope)
        return _taken(parameters)

    def _through(self, correction: Tensor) -> None:
        """Add what a gradient by whole weights is by the adapter's own numbers."""
        parts = self.future.probe(correction)
        adapted = self._adapted()
        changes = {name: change_of(layer) for name, layer in adapted.items()}
        whole = {name: one.up if one.down is None else one.up @ one.down for name, one in changes.items()}
        torch.stack([(parts[name].up.detach() * change).sum() for name, change in whole.items()]).sum().backward()

    def _adapted(self) -> dict[str, nn.Module]:
        """Layers that the adapter changes and fine-tuning, too."""
        return {name: layer for name, layer in self.future.offsets.layers.items() if isinstance(layer, BaseTunerLayer)}


def _taken(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Their gradients, which they lose."""
    found = [torch.zeros_like(one) if one.grad is None else one.grad for one in parameters]
    for one in parameters:
        one.grad = None
    return found


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Linear | BaseTunerLayer)


def _shape(layer: Any) -> tuple[int, int]:
    """Rows and columns of a linear layer's weight."""
    plain: Any = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    weight: Tensor = plain.weight
    return int(weight.shape[0]), int(weight.shape[1])
