"""SOMF: one mask over the changes of all fine-tuned models, learned on a small set of safety preferences (arXiv 2405.09055).

The "subspace" of the paper is a mask over coordinates, not a linear subspace.
"""

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from valign.checks import UserError, option
from valign.merging.deltas import Delta, DeltaSource, DenseDelta, NamedDeltas
from valign.merging.experts import listed
from valign.merging.realign.base import Change, RealignContext, RealignMethod
from valign.merging.realign.fuse import Fuse, fused
from valign.merging.realign.vectors import AdapterChanges, Vectors
from valign.methods import Method
from valign.models.files.adapter_files import LoraFactors
from valign.models.files.tensor_stream import TensorIndex, stream_tensors
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.schedule import Schedule
from valign.training.engine.task import LoopConfig, TrainingTask

METHOD = Method(
    slug="somf",
    title="SOMF: one learned mask over the changes of all fine-tuned models",
    paper="arXiv 2405.09055",
    room="merging",
    entry="valign.merging.realign.somf:somf",
    fidelity="variant",
    note="the mask's mean is not differentiated by default (the reference's rescale is a setting), the reference model is the "
    "exact fusion instead of a noisy one, the export is deterministic, TIES trims weight by weight",
)

MASKS = Path("mask", "masks.safetensors")  # in the result's folder
Rescale = Literal["detach", "mean", "none"]
log = logging.getLogger(__name__)
Keep = Callable[[str, Sequence[Tensor]], list[Tensor]]  # name of a masked tensor, each model's -> the same, masked
Fusing = Callable[[str, Sequence[Tensor]], Tensor]  # name of a masked tensor, each model's -> one


@runtime_checkable
class SafetyPreferences(Protocol):
    """Pairs of a safe and an unsafe answer, and the network, at the fine-tunings' start, that tells how likely it finds them."""

    network: nn.Module

    def __len__(self) -> int: ...
    def fingerprint(self) -> str: ...

    def score(self, places: Sequence[int], weights: Mapping[str, Tensor], draw: int) -> Float[Tensor, "pair 2"]:
        """Log-likelihoods of safe and unsafe answers of some pairs, up to a constant, with gradients into ``weights``.

        Args:
            weights: By parameter name of ``network``, in the place of its own.
            draw: Number of the step, on which noise depends, where there is noise.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Somf(RealignMethod):
    """Learn one mask over all fine-tuned models' changes on safety preferences, and keep what passes it (arXiv 2405.09055)."""

    strength: float = option(
        1.0, help="how far the mask goes: 0 leaves the (fused) fine-tuned model, 1 is the learned mask", low=0, high=1
    )
    space: Literal["auto", "factors", "product"] = option(
        "auto",
        help="what is masked: the factors of adapters, as the authors do, or the change of the weight; auto: factors if it can",
    )
    rescale: Rescale = option(
        "detach", help="divide by the mask's mean: without its gradient, as the authors' (mean), or not at all (none)"
    )
    temperature: float = option(0.5, help="of the binary-Concrete mask", above=0)
    start_logit: float = option(0.0, help="of every mask entry; 0 is probability one half", rare=True, needs={"masks": (None,)})
    granularity: Literal["entry", "row", "tensor"] = option("entry", help="what one mask value covers; coarser takes less memory")
    export: Literal["soft", "binary"] = option("soft", help="probabilities, or 1 where the logit is above 0")
    sampled_export: bool = option(False, help="export a random draw of the mask, as the authors' code does", rare=True)
    masks: Path | None = option(None, help="mask/masks.safetensors of an earlier run, instead of learning")
    steps: int = option(200, help="optimizer steps", low=1, needs={"masks": (None,)})
    batch_size: int = option(8, help="pairs per step", low=1, needs={"masks": (None,)})
    learning_rate: float = option(0.1, help="AdamW, of the logits; cosine", above=0, needs={"masks": (None,)})
    beta: float = option(0.1, help="of the DPO loss", above=0, needs={"masks": (None,)})
    seed: int = option(0, help="of the draws of the mask and of the pairs")
    checkpoint_every: int = option(50, help="steps between checkpoints", low=0, rare=True, needs={"masks": (None,)})

    uses_safety: ClassVar[bool] = False
    learns: ClassVar[bool] = True
    example: ClassVar[str] = "--base base --aligned aligned --finetuned tuned --pairs preferences.jsonl -o realigned"

    def prepare(self, vectors: Vectors, context: RealignContext) -> Change:
        self.check_models(vectors)
        if self.masks is None and context.objective is None:
            raise UserError("somf must have safety preferences to learn from, got none. Name them by --pairs, or --masks of a run.")
        space = masked_space(self.space, vectors)
        if self.masks is not None:
            path, known = self.masks, "given"
        else:
            assert context.folder is not None
            path, known = context.folder / MASKS, "learned"
            if not path.exists():
                learn_masks(self, vectors, space, context.objective, path)
        index = TensorIndex(path)
        lone = sorted(set(index.places) - {part for name in vectors.names for part in space.parts(name)})
        if lone:
            raise UserError(f"{path} must hold masks of what was fine-tuned, got others: {listed(lone)}. Use those of this run.")
        emptied: list[str] = []
        context.results.update({"masks": known, "masked": len(index.places), "space": space.name, "emptied": emptied})

        def keep(part: str, tasks: Sequence[Tensor]) -> list[Tensor]:
            if part not in index.places:
                return list(tasks)
            mask = self.exported(index.read(part), part)
            if not mask.any() and self.rescale != "none":
                log.warning("the mask of %s is empty: nothing of its fine-tuning is kept", part)
                emptied.append(part)
            scaled = 1 + self.strength * (rescaled(mask, self.rescale) - 1)
            return [task * scaled for task in tasks]

        return lambda at: space.masked(at.name, keep if self.strength else lambda _, tasks: list(tasks), self._fuse(vectors.models))

    def _fuse(self, models: tuple[str, ...]) -> Fusing:
        return lambda part, tasks: fused(self.fuse, self.fuse_scale, part, models, [DenseDelta(task) for task in tasks]).delta()

    def exported(self, logits: Float[Tensor, "rows columns"], name: str) -> Float[Tensor, "rows columns"]:
        """The mask that is used in the end; deterministic unless ``sampled_export``."""
        mask = logits.sigmoid()
        if self.sampled_export:
            mask = concrete(logits, self.temperature, generator_for("somf", "export", self.seed, name))
        return (mask > 0.5).float() if self.export == "binary" else mask


def concrete(logits: Float[Tensor, "rows columns"], temperature: float, random: torch.Generator) -> Float[Tensor, "rows columns"]:
    """A draw of the binary-Concrete mask, ``sigmoid((logit + log u - log(1 - u)) / T)``, in (0, 1)."""
    eps = torch.finfo(torch.float32).eps
    u = torch.rand(logits.shape, generator=random).clamp(eps, 1 - eps).to(logits.device)
    return ((logits + u.log() - (1 - u).log()) / temperature).sigmoid()


def rescaled(mask: Float[Tensor, "rows columns"], how: Rescale) -> Float[Tensor, "rows columns"]:
    """The mask over its own mean, so that a constant mask changes nothing; an empty one stays empty.

    With ``"mean"``, the authors' choice, the mean has a gradient: entries that do not matter are driven to 0, because that raises
    the ones that do. ``"detach"`` stops that.
    """
    if how == "none":
        return mask
    mean = mask.mean()
    return mask / torch.where(mean > 0, mean.detach() if how == "detach" else mean, 1.0)


class MaskedSpace(ABC):
    """What the masks lie over: tensors of each weight's change, named after it."""

    name: str

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """Names of a weight's masked tensors."""

    @abstractmethod
    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        """A weight's masked tensors by name, of each model, float32."""

    @abstractmethod
    def assembled(self, name: str, tensors: Mapping[str, Tensor]) -> Delta:
        """The change of the weight that the masked and fused tensors make, with gradients."""

    def masked(self, name: str, keep: Keep, fuse: Fusing) -> Delta:
        """Mask, fuse, assemble."""
        return self.assembled(name, {part: fuse(part, keep(part, tasks)) for part, tasks in self.tensors(name).items()})


class ProductSpace(MaskedSpace):
    """The changes of weight themselves."""

    name = "product"

    def parts(self, name: str) -> tuple[str, ...]:
        return (name,)

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        return {name: [task.delta() for task in self.vectors.read(name).tasks]}

    def assembled(self, name: str, tensors: Mapping[str, Tensor]) -> Delta:
        return DenseDelta(tensors[name])


class FactorSpace(MaskedSpace):
    """The changes of both LoRA factors, each with a mask of its own: not the same as masking their product.

    Where adapters go on from the safety adapter, they are the differences to its factors; otherwise the factors themselves.
    """

    name = "factors"

    def parts(self, name: str) -> tuple[str, ...]:
        return (f"{name}.down", f"{name}.up")

    def tensors(self, name: str) -> dict[str, list[Tensor]]:
        start, models = self._factors(name)
        down, up = self.parts(name)
        return {down: [one.down - start.down for one in models], up: [one.up - start.up for one in models]}

    def assembled(self, name: str, tensors: Mapping[str, Tensor]) -> Delta:
        start, _ = self._factors(name)
        down, up = (tensors[part] for part in self.parts(name))
        return LoraFactors(torch.cat([start.down + down, start.down]), torch.cat([start.up + up, -start.up], dim=1), 1.0)

    def _factors(self, name: str) -> tuple[LoraFactors, list[LoraFactors]]:
        models = [_low_rank(task.delta(name)).folded() for task in self.vectors.tasks.values()]
        if self.vectors.continued:
            return _low_rank(self.vectors.safety.delta(name)).folded(), models
        return LoraFactors(torch.zeros_like(models[0].down), torch.zeros_like(models[0].up), 1.0), models


def masked_space(wanted: str, vectors: Vectors) -> MaskedSpace:
    """Factors or product. Raises: UserError for factors that cannot be compared, with the reason."""
    if wanted == "product":
        return ProductSpace(vectors)
    why = _no_factors(vectors)
    if why and wanted == "factors":
        raise UserError(f"somf can mask factors only of adapters that go together, got {why}. Set --space product.")
    return ProductSpace(vectors) if why else FactorSpace(vectors)


def _no_factors(vectors: Vectors) -> str:
    """Why factors cannot be masked; "" if they can. Warns of adapters that did not start from the safety adapter."""
    sources = [*vectors.tasks.values(), *([vectors.safety] if vectors.continued else [])]
    if any(set(source.names) != set(sources[0].names) for source in sources):
        return "adapters of different modules"
    far = 0
    for name in sources[0].names:
        deltas = [source.delta(name) for source in sources]
        factors = [delta for delta in deltas if isinstance(delta, LoraFactors)]
        if len(factors) < len(deltas):
            return f"whole models, or a dense change of {name}"
        if len({(one.rank, one.scale) for one in factors}) > 1:
            return f"different ranks or scales of {name}"
        if vectors.continued and factors[-1].down.norm() < (factors[0].down - factors[-1].down).norm():
            far += 1
    if far:
        log.warning(
            "in %d of %d modules the fine-tuned factors are far from the safety adapter's: were they trained on from it?",
            far,
            len(sources[0].names),
        )
    return ""


def _low_rank(delta: Delta) -> LoraFactors:
    assert isinstance(delta, LoraFactors)
    return delta


def learn_masks(options: Somf, vectors: Vectors, space: MaskedSpace, objective: SafetyPreferences, path: Path) -> None:
    """Learn the logits of one mask for each tensor that a fine-tuning changed, and write them to ``path``; resumes beside it.

    All task vectors are in memory, and with them the logits and two moments of AdamW for each of their entries.
    Raises: UserError for fewer than two pairs, or fine-tunings that changed nothing.
    """
    if len(objective) < 2:
        raise UserError(f"somf must have at least 2 safety preferences, got {len(objective)}. Give more pairs.")
    task = MaskTask(options, vectors, space, objective)
    TrainingLoop(task, start_processes(cpu=not torch.cuda.is_available()), out=path.parent).run()
    stream_tensors(path, ((name, logits.detach()) for name, logits in sorted(task.logits.items())))
    shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)


class MaskTask(TrainingTask):
    """DPO on safety preferences, where only the masks' logits train. The reference is the fine-tuned fusion, without noise."""

    def __init__(self, options: Somf, vectors: Vectors, space: MaskedSpace, objective: SafetyPreferences) -> None:
        self.options, self.space, self.objective = options, space, objective
        self.fuse = options._fuse(vectors.models)
        known = dict(objective.network.named_parameters())
        self.tasks: dict[str, dict[str, list[Tensor]]] = {}  # of each weight
        for name in vectors.names:
            if any(task.rank and bool(task.delta().any()) for task in vectors.read(name).tasks):
                if name not in known:
                    raise UserError(f"The network must have the weights that were fine-tuned, got no {name}. Use the same model.")
                self.tasks[name] = space.tensors(name)
        if not self.tasks:
            raise UserError("somf must have a fine-tuned model that differs from its start, got the same weights in both.")
        self.start = {name: known[name].detach().float() for name in self.tasks}
        self.logits = {
            part: torch.full(_mask_shape(options.granularity, models[0]), options.start_logit).requires_grad_(True)
            for parts in self.tasks.values()
            for part, models in parts.items()
        }
        self.optimizer = torch.optim.AdamW(list(self.logits.values()), lr=options.learning_rate, weight_decay=0.0)
        self.schedule = Schedule(steps=options.steps, decay="cosine", peak=options.learning_rate)
        self.visits = Visits(len(objective), min(options.batch_size, len(objective)), options.seed)
        self.loop = LoopConfig(steps=options.steps, label="learning masks", checkpoint_every=options.checkpoint_every)

    def weights(self, masks: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The network's weights under masks; None is the fine-tuned fusion."""
        found = {}
        for name, parts in self.tasks.items():
            kept = parts if masks is None else {part: [one * masks[part] for one in models] for part, models in parts.items()}
            change = self.space.assembled(name, {part: self.fuse(part, models) for part, models in kept.items()})
            found[name] = self.start[name] + change.delta().reshape(self.start[name].shape)
        return found

    def gradients(self, step: int) -> dict[str, float]:
        places = [place for place, _ in self.visits.at(step)]
        random = generator_for("somf", self.options.seed, step)
        masks = {
            part: rescaled(concrete(logits, self.options.temperature, random), self.options.rescale)
            for part, logits in self.logits.items()
        }
        scores = self.objective.score(places, self.weights(masks), step)
        with torch.no_grad():
            reference = self.objective.score(places, self.weights(None), step)
        margin = ((scores - reference) @ scores.new_tensor([1.0, -1.0])) * self.options.beta
        loss = -F.logsigmoid(margin).mean()
        loss.backward()
        return {"loss": float(loss.detach()), "accuracy": float((margin > 0).float().mean())}

    def tensors(self) -> Mapping[str, Tensor]:
        return self.logits


def _mask_shape(granularity: str, tensor: Tensor) -> tuple[int, int]:
    rows, columns = tensor.shape
    return {"entry": (rows, columns), "row": (rows, 1), "tensor": (1, 1)}[granularity]


def somf(
    tasks: Mapping[str, DeltaSource],
    objective: SafetyPreferences,
    folder: Path,
    *,
    strength: float = 1.0,
    fuse: Fuse = "none",
    **options: Any,
) -> Iterator[tuple[str, Delta]]:
    """``fuse(task_i * m / mean(m))``, the change from the fine-tunings' start, weight by weight in sorted order.

    Args:
        tasks: The fine-tuned models' changes from their start, by name: opened adapters or `NamedDeltas`, under the names of the
            network's parameters.
        objective: Safety preferences, with the network at the start.
        folder: For the learned masks, ``mask/masks.safetensors``, and the curves of their training.
        strength: In [0, 1]: the mask is ``1 + strength (m / mean(m) - 1)``; 0 leaves the (fused) fine-tuned model as it is.
        options: Further fields of `Somf`.
    """
    vectors = Vectors(AdapterChanges(NamedDeltas({}), ""), {name: AdapterChanges(task, "") for name, task in tasks.items()})
    change = Somf(strength=strength, fuse=fuse, **options).prepare(vectors, RealignContext(folder=folder, objective=objective))
    return ((at.name, change(at)) for at in vectors.items())
