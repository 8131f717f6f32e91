"""Fine-tuning as a task of the engine: one for every method, every kind of data and every model."""

from collections.abc import Mapping
from math import inf
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from valign.adapters import AttachContext, default_targets, halves
from valign.data.tasks.base import TaskData, TaskRow
from valign.models.heads.task_model import TaskModel
from valign.randomness import generator_for
from valign.training.engine.draws import Visits, drawing
from valign.training.engine.processes import flatten_gradients, reduce_sum, spread_gradients
from valign.training.engine.schedule import keep_peaks
from valign.training.engine.selection import Selection
from valign.training.engine.task import LoopConfig, TrainingTask, Validation, changing_tensors
from valign.training.engine.tuning import Tuning
from valign.training.tasks.preserving.preservation import Preservation
from valign.training.tasks.supervised.config import SupervisedConfig
from valign.training.tasks.supervised.judging import judge


class SupervisedTask(TrainingTask):
    """A task model under the adapter of ``tuning``; the model comes back trained, its ``network`` under the adapter.

    Args:
        targets: Endings of the linear modules to adapt; none is the architecture's default.
        preservation: What keeps the model's safety, of this model and these steps; None for none.
        validation: Rows to validate on; none, or ``validate_every`` 0, keeps the last step.
    Raises: whatever the method refuses, before the first step.
    """

    def __init__(
        self,
        model: TaskModel,
        data: TaskData,
        tuning: Tuning,
        config: SupervisedConfig,
        accelerator: Accelerator,
        *,
        targets: tuple[str, ...] = (),
        preservation: Preservation | None = None,
        validation: tuple[TaskRow, ...] = (),
        label: str = "fine-tune",
    ) -> None:
        self.model, self.data, self.config, self.accelerator, self.validation = model, data, config, accelerator, validation
        self.schedule, self.max_norm = config.shares(), config.max_grad_norm or inf
        self.visits = Visits(len(data.train), config.batch_size, config.seed)
        self.preservation = preservation
        if preservation is not None:
            visited = {place for step in range(config.steps) for place, _ in self.visits.at(step)}
            preservation.start([data.train[place] for place in sorted(visited)], batch_size=config.eval_batch)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        model.train()
        found = default_targets(model.network if targets else model.main, targets)
        self.handle = tuning.adapter.attach(self._context(model.more_targets(found)))
        model.attached(self.handle)
        self.hooks = {"method": self.handle}
        model.network = self.handle.network
        if preservation is not None:
            preservation.attached()
            self.hooks["preserve"] = preservation
        if model.head is not None:
            model.head.requires_grad_(True)
        self._frozen = own - {id(p) for p in model.parameters() if p.requires_grad}
        self.optimizer = tuning.optimizer.build(*self._groups(tuning.learning_rate), tuning.learning_rate)
        keep_peaks(self.optimizer)
        self.handle.watch(self.optimizer)
        draws = generator_for("perturbation", config.seed)
        beside = tuning.perturbation
        self.perturbation = beside.start(model.network, self.optimizer, draws) if beside else None
        self.selection = Selection(max_drift=0.0, patience=config.patience)
        self.loop = LoopConfig(
            steps=config.steps,
            label=label,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            validate_every=config.validate_every if validation else 0,
            sample_every=config.sample_every,
            trackers=config.trackers,
            recipe=config.recipe(),
        )

    def gradients(self, step: int) -> dict[str, float]:
        """Over all rows of the step and all processes; the mean loss, and what preserves safety beside it by name."""
        config, preservation, accelerator, record = self.config, self.preservation, self.accelerator, {"loss": 0.0}
        if preservation is not None and preservation.training is not None:
            record["cross_entropy"] = 0.0
        rows: list[Any] = [self.data.train[place] for place, _ in self.visits.at(step)]
        rows += preservation.joined(step) if preservation is not None else []
        size = -(-len(rows) // (config.memory.micro_batches * accelerator.num_processes))
        with drawing("dropout", config.seed, step):
            parts = [rows[first : first + size] for first in range(0, len(rows), size)]
            parts = parts[accelerator.process_index :: accelerator.num_processes]
            batches = [self.model.batch(part) for part in parts]
            weight = self._total(sum(batch.weight for batch in batches))
            for part, batch in zip(parts, batches):
                with accelerator.autocast():
                    summed, plain = preservation.summed(part, batch) if preservation else (self.model.loss(batch), None)
                    loss = summed / weight * (preservation.retain_weight if preservation else 1)
                loss.backward()
                record["loss"] += float(loss.detach())
                if plain is not None:
                    record["cross_entropy"] += float(plain) / weight
            record = self._agreed(record, step)
            for name, term in preservation.beside(step) if preservation else ():
                term.backward()
                record[name] = float(term.detach())
        return record

    def _total(self, weight: float) -> float:
        """Of what all processes have."""
        if self.accelerator.num_processes == 1:
            return weight
        return float(reduce_sum(self.accelerator, torch.tensor(float(weight), device=self.accelerator.device)))

    def _agreed(self, record: dict[str, float], step: int) -> dict[str, float]:
        """Gradients and record summed over the processes, before anything is added that each computes alike, at equal draws."""
        if self.accelerator.num_processes == 1:
            return record
        parameters = self.parameters()
        own = torch.tensor(list(record.values()), device=self.accelerator.device)
        torch.manual_seed(generator_for("beside", self.config.seed, step).initial_seed())
        sums = spread_gradients(parameters, reduce_sum(self.accelerator, flatten_gradients(parameters, own)))
        return dict(zip(record, sums.tolist(), strict=True))

    def validate(self, number: int) -> Validation:
        found, score = judge(self.model, self.validation, batch_size=self.config.eval_batch), self.data.task.score
        return Validation(found["loss"] if score == "loss" else -found[score], {f"val_{name}": found[name] for name in found})

    def tensors(self) -> dict[str, Tensor]:
        return changing_tensors(self.model, self._frozen)

    def notes(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        return {"selection": progress["selection"], "stopped": progress["stopped"]}

    def extra(self) -> dict[str, Any]:
        return {**super().extra(), "beside": self.perturbation.state_dict() if self.perturbation else {}}

    def resumed(self, notes: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        if self.perturbation is not None:
            self.perturbation.load_state_dict(extra["beside"])

    def _context(self, targets: tuple[str, ...]) -> AttachContext:
        config, head = self.config, self.model.head
        parts = halves(len(self.data.train), generator=generator_for("halves", config.seed))

        def loss(number: int, half: int | None) -> Tensor:
            known = range(len(self.data.train)) if half is None else parts[half]
            picked = Visits(len(known), config.batch_size, config.seed).at(number)
            with drawing("start", config.seed, number, str(half)), self.accelerator.autocast():
                batch = self.model.batch([self.data.train[known[place]] for place, _ in picked])
                return self.model.loss(batch) / batch.weight

        if head is not None:
            head.requires_grad_(True)
        return AttachContext(
            network=self.model.network,
            head=tuple(head.parameters()) if head is not None else (),
            targets=targets,
            steps=config.steps,
            batch_size=config.batch_size,
            first_rate=self.schedule.at(0),
            seed=config.seed,
            loss=loss,
            forget=self.preservation.forgetting(self.data.train) if self.preservation is not None else (),
        )

    def _groups(self, rate: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of the adapter, and of the head."""
        network = [{**group, "lr": rate} for group in self.handle.groups()]
        head = list(self.model.head.parameters()) if self.model.head is not None else []
        return network, [{"params": head, "lr": self.config.head_learning_rate, "weight_decay": 0.0}] if head else []
