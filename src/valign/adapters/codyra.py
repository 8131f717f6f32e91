"""Teach one task after another with as little rank as each needs, merged after every task (CoDyRA, arXiv 2412.01004)."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from valign.adapters.base import AdapterHandle, AttachContext, LoraHandle, LowRankOptions, check_modules, exported_numbers
from valign.adapters.factors import factors_of, fresh_linears, lora_layers, only_adapter, weight_of, write_weight
from valign.adapters.gate import Prox, gates, install_gates, shut, surviving, threshold_schedule
from valign.checks import UserError, check_choice, check_range
from valign.methods import Method

METHOD = Method(
    slug="codyra",
    title="CoDyRA: rank-selective LoRA for one task after another",
    paper="arXiv 2412.01004",
    room="adapters",
    entry="valign.adapters.codyra:CoDyRA",
    fidelity="exact",
    note="the paper's soft threshold and schedule; the released code's other updates are a setting (`prox=reference`)",
)


def threshold_trace(steps: int, *, max_threshold: float, levels: int = 50, dense: float = 0.5) -> list[float]:
    """The threshold at each iteration from 0: 0 while training is dense, then up the ``levels`` from 0 to ``max_threshold``.

    At every iteration ``it >= dense steps`` that is a multiple of ``(steps - dense steps) // levels`` the level goes up by one, to
    the last. The step is applied where ``it > dense steps``.

    Raises: ValueError for numbers outside their range, or too few steps for the levels.
    """
    check_range("threshold_trace.max_threshold", max_threshold, low=0)
    check_range("threshold_trace.levels", levels, low=1)
    if not 0 <= dense < 1:
        raise ValueError(f"threshold_trace.dense must be in [0, 1), got {dense!r}.")
    start = int(dense * steps)
    length = (steps - start) // levels
    if length < 1:
        raise ValueError(
            f"threshold_trace.steps must leave a step per level after the dense ones, got {steps - start} for {levels}. "
            "Train longer, or use fewer levels."
        )
    values = threshold_schedule(0.0, max_threshold, levels) if levels > 1 else [0.0]
    level, trace = 0, []
    for iteration in range(steps):
        if iteration >= start and iteration % length == 0:
            level = min(level + 1, levels - 1)
        trace.append(values[level] if iteration > start else 0.0)
    return trace


class CoDyRA:
    """``y = W x + B (g * A x)`` at scale 1; all of A, B, g train, and the proximal step takes ranks away in the second half of
    a task.

    One object per task. `finish` adds the surviving components to the base weight, in float32, and leaves the adapter a function of
    zero: delete it and attach a new one for the next task. Nothing of the old task's data or optimizer is kept.

        for task in stream:
            ...  # attach a new LoRA of rank 16
            codyra = CoDyRA(model, steps=500, generator=generator)
            optimizer = AdamW(codyra.parameters(), lr=5e-4, weight_decay=0, betas=(0.9, 0.9999));  codyra.watch(optimizer)
            ...  # 500 steps
            codyra.finish()

    Args:
        steps: Of this task.
        max_threshold, levels, dense: See `threshold_trace`; 5e-3, 50 and 0.5 as in the authors' script.
        prox: ``"reference"`` for the released code's three masked updates.
    Raises: ValueError for tied or half-known weights as `fresh_linears`, and as `threshold_trace`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        steps: int,
        generator: torch.Generator,
        max_threshold: float = 5e-3,
        levels: int = 50,
        dense: float = 0.5,
        prox: Prox = "soft",
        adapter: str | None = None,
    ) -> None:
        check_choice("CoDyRA.prox", prox, ("soft", "reference"))
        self.trace = threshold_trace(steps, max_threshold=max_threshold, levels=levels, dense=dense)
        self.model, self.adapter, self.prox, self.iteration, self.merged = model, only_adapter(model, adapter), prox, 0, False
        layers = fresh_linears(model, self.adapter, "CoDyRA", rewrites_base=True)
        if any(layer.get_base_layer().weight.dtype in (torch.float16, torch.bfloat16) for layer in layers.values()):
            warnings.warn(
                "CoDyRA merges into half-precision weights: many tasks add up rounding. Keep them in float32.", stacklevel=2
            )
        install_gates(model, self.adapter, "CoDyRA", generator=generator, scaled=False)

    def parameters(self) -> list[nn.Parameter]:
        """A, B and the gate of every module."""
        layers = lora_layers(self.model, self.adapter).values()
        parts = [[layer.lora_A[self.adapter].weight, layer.lora_B[self.adapter].weight] for layer in layers]
        return [parameter for pair in parts for parameter in pair] + list(gates(self.model, self.adapter).values())

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Count the steps of ``optimizer`` and shut gates after each."""
        optimizer.register_step_post_hook(lambda *_: self.after_step())

    def after_step(self) -> None:
        """One iteration of the task is over. Raises: UserError beyond the last."""
        if self.iteration >= len(self.trace):
            raise UserError(
                f"CoDyRA.steps must be the steps of the task, got {len(self.trace)} and one more. Give the right number."
            )
        shut(gates(self.model, self.adapter), self.trace[self.iteration], self.prox)
        self.iteration += 1

    def ranks(self) -> dict[str, int]:
        """Surviving rank of each module."""
        return surviving(gates(self.model, self.adapter))

    @torch.no_grad()
    def finish(self) -> dict[str, int]:
        """Merge what survived into the base weights; return the ranks. Modules without a rank keep their weight bit for bit.

        Raises: UserError the second time.
        """
        if self.merged:
            raise UserError("CoDyRA.finish must run once per task, got a second call. Attach a new LoRA for the next task.")
        ranks = self.ranks()
        for name, layer in lora_layers(self.model, self.adapter).items():
            if ranks[name]:
                write_weight(layer, weight_of(layer) + factors_of(layer, self.adapter).delta())
            layer.lora_B[self.adapter].weight.zero_()
        self.merged = True
        return ranks

    def state_dict(self) -> dict[str, Any]:
        """What is not in the adapter's tensors (`adapter_state`)."""
        modules = sorted(gates(self.model, self.adapter))
        return {"modules": modules, "iteration": self.iteration, "merged": self.merged, "trace": list(self.trace)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises: UserError for a state of other modules or of another schedule."""
        check_modules("CoDyRA", state["modules"], gates(self.model, self.adapter))
        if state["trace"] != self.trace:
            raise UserError("CoDyRA: the state was saved with another schedule. Use the same steps, levels and thresholds.")
        self.iteration, self.merged = state["iteration"], state["merged"]


def task_columns(tasks: Sequence[Sequence[str]]) -> list[range]:
    """Where each task's classes stand in one list of all.

    Raises: UserError for a class of two tasks: its text would be one task's answer and another's mistake.
    """
    names = [name for task in tasks for name in task]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"task_columns.tasks must have classes of their own, got {twice!r} twice. Rename one of them.")
    ends = [sum(map(len, tasks[: number + 1])) for number in range(len(tasks))]
    return [range(end - len(task), end) for task, end in zip(tasks, ends, strict=True)]


def image_text_loss(
    logits: Float[Tensor, "image text"],
    labels: Int[Tensor, " image"],
    *,
    columns: range | None = None,
    both: bool = True,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """CLIP's loss on one task: cross-entropy of the images over the task's classes, plus that of its texts over the batch.

    A text's target is 1 at every image of its class, not divided by their number; a class without an image adds 0 to the mean.

    Args:
        logits: One column per class text, scaled. labels: Column of each image's class.
        columns: Of the current task, see `task_columns`; the other classes take no part. None is all.
        both: False is the first term alone, for when only the text encoder trains.
        label_smoothing: Of the first term, [0, 1].
    Raises: ValueError for a label of another task.
    """
    columns = range(logits.shape[1]) if columns is None else columns
    own, inside = logits[:, columns.start : columns.stop], labels - columns.start
    if ((inside < 0) | (inside >= own.shape[1])).any():
        raise ValueError(
            f"image_text_loss.labels must be in [{columns.start}, {columns.stop}), got {labels.tolist()}. Use one task's images."
        )
    images = cross_entropy(own, inside, label_smoothing=label_smoothing)
    return images + cross_entropy(own.T, one_hot(inside, own.shape[1]).T.to(own.dtype)) if both else images


class ContinualScores(NamedTuple):
    """Of a task-by-task table: unseen tasks, all, all after the last, and what was lost or won since each was learnt."""

    transfer: float
    average: float
    last: float
    backward: float


def continual_scores(table: Sequence[Sequence[float]]) -> ContinualScores:
    """Summarize ``table[i][j]``, the score on task ``j`` after training on task ``i``.

    Transfer is the mean over tasks ``j >= 1`` of the mean over ``i < j`` (before it was learnt); a true 0 counts, unlike in the
    authors' code. Average is over the whole table, last over its last row. Backward (Lopez-Paz and Ranzato, arXiv 1706.08840) is
    the mean over all tasks but the last of ``table[-1][j] - table[j][j]``; below 0 is forgetting.

    Raises: ValueError unless the table is square with two rows or more.
    """
    size = len(table)
    if size < 2 or any(len(row) != size for row in table):
        raise ValueError(
            f"continual_scores.table must be square, from 2 x 2 on, got {[len(row) for row in table]}. One row per task."
        )
    columns = [sum(table[i][j] for i in range(j)) / j for j in range(1, size)]
    everything = sum(sum(row) for row in table) / size**2
    backward = sum(table[-1][j] - table[j][j] for j in range(size - 1)) / (size - 1)
    return ContinualScores(sum(columns) / len(columns), everything, sum(table[-1]) / size, backward)


@dataclass(frozen=True, kw_only=True)
class CoDyRAOptions(LowRankOptions):
    """`CoDyRA` as an adapter for one task; its merge is that of any LoRA."""

    expert: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True

    rank: int = 16
    max_threshold: float = 5e-3

    def attach(self, context: AttachContext) -> AdapterHandle:
        network = self.new_lora(context)
        levels = max(1, min(50, (context.steps - context.steps // 2)))
        made = CoDyRA(
            network,
            steps=context.steps,
            generator=context.generator("gates"),
            max_threshold=self.max_threshold,
            levels=levels,
        )
        return CoDyRAHandle(network, made)


class CoDyRAHandle(LoraHandle):
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
