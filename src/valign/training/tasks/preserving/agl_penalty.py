"""AGL on a model in training: the Fisher matrices of its adapted weights, once, and the penalties of a step."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from valign.adapters.changes import ChangeFactors, WeightChanges, adapted_layers
from valign.checks import UserError
from valign.models.heads.task_model import NOT_COUNTED, TaskModel
from valign.objectives import AGL
from valign.objectives.preserving.agl import AGLTerms, FisherSum, LayerFisher, WeightChange
from valign.progress import track
from valign.randomness import generator_for

ALL = "all trained numbers"


class AglPenalty:
    """Made once the adapter sits on the model; the adapter as it then stands is the reference.

    Args:
        rows: Whose loss safety's gradients are of, one at a time.
        steps: Of the whole training.
        seed: Of answers drawn from the model.
    Raises: UserError for an adapter whose changes cannot be read, and ValueError for gradients that are zero or not finite.
    """

    def __init__(self, agl: AGL, model: TaskModel, rows: Sequence[Any], *, steps: int, seed: int) -> None:
        self.agl, self.model, self.rows, self.steps, self.seed = agl, model, rows, steps, seed
        self.changes = WeightChanges(model.network)
        self._flat_start = self._flat().detach().clone() if agl.projector == "vector" else None
        self.squares: dict[str, Tensor] = {}
        self._plain = agl.trust != "task_ema" or _lora_factors(model.network)
        if not self._plain:
            raise UserError("AGL.trust=task_ema must go with plain LoRA, got another adapter. Use fisher_diagonal.")
        self.fishers = self.estimate()

    def estimate(self) -> dict[str, LayerFisher]:
        """Fisher matrices of the model as it stands, one calibration row at a time, in evaluation mode."""
        model, names = self.model, [ALL] if self.agl.projector == "vector" else list(adapted_layers(self.model.network))
        sums = {name: FisherSum(self.agl.projector) for name in names}
        was = model.training
        model.eval()
        for number, row in enumerate(track(self.rows, "estimate the Fisher matrix")):
            for name, gradient in self._gradients(row, number).items():
                sums[name].add(gradient)
        model.train(was)
        return {name: self.agl.fisher(found, name=name) for name, found in sums.items()}

    def terms(self, step: int) -> dict[str, Tensor]:
        """The penalties of step ``step`` (from 0) by name (`AGLTerms`), each summed over the adapted weights."""
        warm, parts = self.agl.warm(step, self.steps), []
        for name, change in self._now().items():
            if name not in self.fishers:
                raise UserError(f"AGL must have a Fisher matrix of every adapted weight, got none for {name}. Start the run anew.")
            parts.append(self.agl.terms(change, self.fishers[name], trust=self._trust(name), warm=warm))
        return {name: torch.stack([getattr(part, name) for part in parts]).sum() for name in AGLTerms._fields}

    def note_gradients(self) -> None:
        """Follow the task's gradients, before anything else is added to them; for ``task_ema``."""
        if self.agl.trust != "task_ema":
            return
        for name, layer in adapted_layers(self.model.network).items():
            found = _change_gradient(layer).square()
            held = self.squares.get(name)
            self.squares[name] = found if held is None else self.agl.ema_decay * held + (1 - self.agl.ema_decay) * found

    def after_step(self, step: int) -> None:
        every = self.agl.refresh_every
        if every and (step + 1) % every == 0:
            saved = [(p, p.grad) for p in self.model.parameters()]
            self.fishers = self.estimate()
            for parameter, gradient in saved:
                parameter.grad = gradient

    def extra(self) -> dict[str, Any]:
        """What a run cannot compute again when it resumes."""
        parts = ("eigenvalues", "basis", "diagonal") if self.agl.projector != "coordinate" else ("diagonal", "chosen")
        fishers = {name: {part: getattr(one, part) for part in parts} for name, one in self.fishers.items()}
        return {"squares": dict(self.squares), "fishers": fishers if self.agl.refresh_every else {}}

    def restore(self, extra: Mapping[str, Any]) -> None:
        device = self.model.device
        self.squares = {name: tensor.to(device) for name, tensor in extra["squares"].items()}
        for name, parts in extra["fishers"].items():
            known = {part: tensor.to(device) for part, tensor in parts.items()}
            diagonal = known["diagonal"]
            none = {"eigenvalues": diagonal.new_zeros(0), "basis": diagonal.new_zeros(len(diagonal), 0)}
            self.fishers[name] = LayerFisher(**{**none, **known})

    def _now(self) -> dict[str, WeightChange]:
        if self._flat_start is not None:
            return {ALL: WeightChange((self._flat() - self._flat_start)[:, None])}
        return {name: _change(found) for name, found in self.changes.now().items()}

    def _trust(self, name: str) -> Tensor | None:
        if self.agl.trust != "task_ema":
            return None
        known = self.squares.get(name, torch.ones_like(self.fishers[name].diagonal))
        return known / known.mean().clamp(min=torch.finfo(known.dtype).tiny) if self.agl.fisher_normalize == "mean" else known

    def _trained(self) -> list[nn.Parameter]:
        return [p for _, p in sorted(self.model.network.named_parameters()) if p.requires_grad]

    def _flat(self) -> Tensor:
        return torch.cat([p.flatten().float() for p in self._trained()])

    def _gradients(self, row: Any, number: int) -> dict[str, Tensor]:
        """The gradient of one row's mean loss, by weight."""
        batch = self.model.batch([row])
        if self.agl.fisher_labels == "model":
            batch.target[:, 1:] = self._drawn(batch, number)
        if self.agl.projector == "vector":
            loss = self.model.loss(batch) / batch.weight
            found = torch.autograd.grad(loss, self._trained(), allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(self._trained(), found, strict=True)]
            return {ALL: torch.cat([part.flatten().float() for part in parts])[:, None]}
        layers = adapted_layers(self.model.network)
        with watched_gradients(layers) as sums:
            loss = self.model.loss(batch) / batch.weight
            torch.autograd.grad(loss, [p for p in self.model.parameters() if p.requires_grad], allow_unused=True)
        missing = next((name for name in layers if name not in sums), None)
        if missing is not None:
            raise UserError(f"AGL must have a gradient in every adapted weight, got none in {missing}. Leave it out of --targets.")
        return sums

    @torch.no_grad()
    def _drawn(self, batch: Any, number: int) -> Tensor:
        """Answers from the model's own distribution at the places that are trained."""
        draws = generator_for("fisher labels", self.seed, number)
        chances = self.model(batch).float()[:, :-1].softmax(2).cpu().flatten(0, 1)
        found = torch.multinomial(chances, 1, generator=draws).view(len(batch.target), -1).to(batch.target.device)
        return torch.where(batch.target[:, 1:] == NOT_COUNTED, batch.target[:, 1:], found)


@contextmanager
def watched_gradients(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Gather the gradient of each layer's weight, ``[fan_out, fan_in]``, from its inputs and the gradients of its outputs.

    So no weight needs a gradient of its own: it may be frozen, or quantized.
    """
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            seen = inputs[0].detach()

            def add(gradient: Tensor) -> None:
                found = gradient.detach().flatten(0, -2).float().T @ seen.flatten(0, -2).float()
                sums[name] = sums[name] + found if name in sums else found

            output.register_hook(add)

        return forward

    hooks = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield sums
    finally:
        for hook in hooks:
            hook.remove()


def _change(found: ChangeFactors) -> WeightChange:
    return WeightChange(found.up, found.down)


def _lora_factors(network: nn.Module) -> bool:
    """Whether every adapted layer is a plain LoRA."""
    return all(
        hasattr(layer, "lora_A") and not layer.lora_variant and layer.active_adapters[0] in layer.lora_A  # type: ignore[index, operator]
        for layer in adapted_layers(network).values()
    )


def _change_gradient(layer: Any) -> Tensor:
    """``s (gB A + B gA)``, an approximation of the gradient by the change itself."""
    (name,) = layer.active_adapters
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return layer.scaling[name] * (up.grad @ down + up @ down.grad).detach()  # type: ignore[no-any-return]
