"""The loop over steps of a fine-tuning: one for every method, every task and every model."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from valign.adapters.adaptive import halves
from valign.checks import UserError
from valign.data.tasks.base import Row, TaskData
from valign.models.heads.task_model import TaskModel
from valign.progress import track
from valign.randomness import generator_for
from valign.training.adapting import AttachContext, Tuning, default_targets
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.draws import Visits
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.selection import Selection
from valign.training.tasks.supervised.config import SupervisedConfig
from valign.training.tasks.supervised.judging import judge


class SupervisedLoop:
    """All state of one training. Without ``out`` nothing is written, no step but the last is kept, and the curve is in ``records``.

    The model comes back trained, its ``network`` under the method's adapter.
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
        out: Path | None = None,
        targets: tuple[str, ...] = (),
        validation: tuple[Row, ...] = (),
        label: str = "fine-tune",
    ) -> None:
        self.model, self.data, self.config, self.accelerator, self.label = model, data, config, accelerator, label
        self.validation = validation if config.validate_every and out is not None else ()
        self.visits = Visits(len(data.train), config.batch_size, config.seed)
        own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        model.train()
        self.handle = tuning.adapter.attach(self._ground(default_targets(model.network, targets)))
        model.network = self.handle.network
        if model.head is not None:
            model.head.requires_grad_(True)
        self._frozen = own - {id(p) for p in model.parameters() if p.requires_grad}
        self.optimizer = tuning.optimizer.build(*self._groups(tuning.learning_rate), tuning.learning_rate)
        for group in self.optimizer.param_groups:
            group["heights"] = {name: group[name] for name in ("lr", "adam_lr") if name in group}
        self.handle.watch(self.optimizer)
        draws = generator_for("perturbation", config.seed)
        beside = tuning.perturbation
        self.perturbation = beside.start(model.network, self.optimizer, draws) if beside else None
        self.selection = Selection(max_drift=0.0, patience=config.patience)
        self.checkpoints = Checkpoints(out / "checkpoints") if out else None
        self.log = MetricsLog(out / "metrics.jsonl") if out else None
        self.records: list[dict[str, float]] = []
        self.done = 0

    def run(self) -> str:
        """Train to the end; say why it ended: ``""`` (all steps) or ``"patience"``."""
        config, stopped = self.config, self._resume()
        if config.trackers:
            plain = {name: value for name, value in config.recipe().items() if isinstance(value, int | float | str)}
            self.accelerator.init_trackers("valign", config=plain)
        first = max(self.done, self.handle.spent)
        try:
            for step in track(range(first, config.steps), self.label, total=config.steps, done=first):
                if stopped:
                    break
                stopped = self._one(step)
                self.done = step + 1
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        return stopped

    def _one(self, step: int) -> str:
        """Step ``step`` (from 0) with all that follows from it."""
        config, number = self.config, step + 1
        record, last, stopped = self.train_step(step), number == config.steps, ""
        save = bool(config.checkpoint_every) and (number % config.checkpoint_every == 0 or last)
        if self.validation and (number % config.validate_every == 0 or last):
            found = judge(self.model, self.validation, batch_size=config.eval_batch)
            record |= {f"val_{name}": value for name, value in found.items()}
            score = self.data.task.score
            if self.handle.settled:
                save |= self.selection.offer(number, score=found["loss"] if score == "loss" else -found[score])
            stopped = "patience" if self.selection.exhausted else ""
        self._note(number, record)
        if self.checkpoints is not None and (save or stopped):
            self._save(number, stopped)
        return stopped

    def train_step(self, step: int) -> dict[str, float]:
        """Gradient over all rows of the step, then one move."""
        config, share = self.config, self.config.share_at(step)
        for group in self.optimizer.param_groups:
            for name, height in group["heights"].items():
                group[name] = height * group.get("rate", 1.0) * share
        rows = [self.data.train[place] for place, _ in self.visits.at(step)]
        size = -(-len(rows) // config.accumulation)
        total = 0.0
        with _drawing("dropout", config.seed, step):
            batches = [self.model.batch(rows[first : first + size]) for first in range(0, len(rows), size)]
            weight = sum(batch.weight for batch in batches)
            for batch in batches:
                with self.accelerator.autocast():
                    loss = self.model.loss(batch) / weight
                loss.backward()
                total += float(loss.detach())
            penalty = self.handle.penalty()
            if penalty is not None:
                penalty.backward()
        moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = float(nn.utils.clip_grad_norm_(moved, config.max_grad_norm or float("inf")))
        if not (total < float("inf") and norm < float("inf")):
            raise UserError(
                f"The loss and gradient of step {step + 1} must be finite, got {total:g} and {norm:g}. Lower the learning rate."
            )
        self.optimizer.step()
        self.handle.after_step(step)
        self.optimizer.zero_grad()
        return {"loss": total, "gradient_norm": norm, "learning_rate": share * self.optimizer.param_groups[0]["heights"]["lr"]}

    def keep_best(self) -> int:
        """Put the best step's weights into the model, or leave the last one's; return its number."""
        best = self.selection.best_step or self.done
        if best != self.done:
            assert self.checkpoints is not None
            self._load(best, optimizer=False)
        return best

    def _ground(self, targets: tuple[str, ...]) -> AttachContext:
        config, head = self.config, self.model.head
        parts = halves(len(self.data.train), generator=generator_for("halves", config.seed))

        def loss(number: int, half: int | None) -> Tensor:
            known = range(len(self.data.train)) if half is None else parts[half]
            picked = Visits(len(known), config.batch_size, config.seed).at(number)
            with _drawing("start", config.seed, number, str(half)), self.accelerator.autocast():
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
            first_rate=config.share_at(0),
            seed=config.seed,
            loss=loss,
        )

    def _groups(self, rate: float) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of the adapter, and of the head."""
        network = [{**group, "lr": rate} for group in self.handle.groups()]
        head = list(self.model.head.parameters()) if self.model.head is not None else []
        return network, [{"params": head, "lr": self.config.head_learning_rate, "weight_decay": 0.0}] if head else []

    def _note(self, number: int, record: Mapping[str, float]) -> None:
        line: dict[str, Any] = {"step": number, **record}
        self.records.append(line)
        if self.log is not None:
            self.log.append(line)
        if self.config.trackers:
            self.accelerator.log(dict(record), step=number)

    def _state(self) -> dict[str, Tensor]:
        """Every tensor that is not the base model's own, or is but trains; equal storage once, the one that is in use."""
        found, seen = {}, set()
        for name, tensor in sorted(self.model.state_dict(keep_vars=True).items()):
            place = (tensor.data_ptr(), tensor.numel())
            if id(tensor) not in self._frozen and (tensor.numel() == 0 or place not in seen):
                seen.add(place)
                found[name] = tensor
        return found

    def _save(self, number: int, stopped: str) -> None:
        assert self.checkpoints is not None
        extra = {"method": self.handle.extra(), "beside": self.perturbation.state_dict() if self.perturbation else {}}
        state = {"selection": self.selection.state(), "stopped": stopped}
        self.checkpoints.save(number, self._state(), self.optimizer, state, extra=extra)
        self.checkpoints.prune(self.config.keep_checkpoints, also=self.selection.best_step)

    def _load(self, step: int, *, optimizer: bool) -> dict[str, Any]:
        assert self.checkpoints is not None
        if optimizer:
            self.handle.restore(self.checkpoints.extra(step)["method"])
        return self.checkpoints.load(step, self._state(), self.optimizer if optimizer else None)

    def _resume(self) -> str:
        """Go on where the last checkpoint is; say why the training had ended, if it had."""
        steps = self.checkpoints.steps() if self.checkpoints else []
        if self.log is not None:
            self.log.rewind(steps[-1] if steps else 0)
        if not steps or self.checkpoints is None:
            return ""
        self.done = steps[-1]
        state = self._load(self.done, optimizer=True)
        self.selection.restore(state["selection"])
        if self.perturbation is not None:
            self.perturbation.load_state_dict(self.checkpoints.extra(self.done)["beside"])
        return str(state["stopped"])


@contextmanager
def _drawing(*key: str | int) -> Iterator[None]:
    """Dropout, and the noise of diffusion, hang on torch's global seed: set it by name inside the block, and put it back."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(generator_for(*key).initial_seed())
        yield
