"""The one loop over steps: rates, gradients, the optimizer's step, what follows from each, when to stop, what to save."""

from math import inf, isfinite
from pathlib import Path
from time import perf_counter
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from valign.checks import UserError
from valign.progress import track
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.previews import Previews
from valign.training.engine.processes import on_main
from valign.training.engine.schedule import set_rates
from valign.training.engine.task import TrainingTask


class TrainingLoop:
    """Train a task from its last checkpoint to the end.

    Args:
        out: For ``checkpoints`` and ``metrics.jsonl``; None writes nothing, and the log is in ``records`` alone.
        previews: Image grids every ``sample_every`` steps.
    """

    def __init__(
        self, task: TrainingTask, accelerator: Accelerator, *, out: Path | None = None, previews: Previews | None = None
    ) -> None:
        self.task, self.accelerator, self.out, self.previews = task, accelerator, out, previews
        self.checkpoints = Checkpoints(out / "checkpoints") if out else None
        self.log = MetricsLog(out / "metrics.jsonl") if out else None
        self.records: list[dict[str, Any]] = []  # of the steps that this call took
        self.done = 0  # steps
        self.seconds = 0.0  # in training steps alone, over all calls of the run

    def run(self) -> str:
        """Train; return why it ended: "" (all steps run), "patience" or the task's reason."""
        config, accelerator = self.task.loop, self.accelerator
        stopped = self._resume()
        if config.trackers:
            plain = {name: value for name, value in config.recipe.items() if isinstance(value, int | float | str)}
            accelerator.init_trackers("valign", config=plain)
        self.done = max([self.done, *(hook.spent for hook in self.task.hooks.values())])
        steps = range(self.done, config.steps)
        shown = track(steps, config.label, total=config.steps, done=self.done) if accelerator.is_main_process else steps
        try:
            for step in shown:
                if stopped:
                    break
                stopped = self._one(step)
                self.done = step + 1
        finally:
            for tracker in accelerator.trackers:  # not `end_training`: it takes the other processes away from the next training
                tracker.finish()
        return stopped

    def train_step(self, step: int) -> dict[str, float]:
        """Take step ``step`` (from 0): its gradients, then one move of the parameters. Return its record.

        Raises: UserError if a number of the task or the gradient is not finite.
        """
        task, accelerator = self.task, self.accelerator
        rate = set_rates(task.optimizer, task.schedule.at(step))
        record = task.gradients(step)
        if not all(map(isfinite, record.values())):
            self._diverged(step + 1, record["loss"], task.suspects())
        for hook in task.hooks.values():
            penalty = hook.penalty()
            if penalty is not None:
                accelerator.backward(penalty)
        if task.max_norm is not None:
            norm = float(accelerator.clip_grad_norm_(task.parameters(), task.max_norm))
            if norm != norm or (norm == inf and accelerator.scaler is None):
                self._diverged(step + 1, record["loss"], " in the gradient")
            record |= {"gradient_norm": norm if norm != inf else 0.0, "learning_rate": rate}  # float16: the scaler skips the step
        task.optimizer.step()
        for hook in task.hooks.values():
            hook.after_step(step)
        task.optimizer.zero_grad()
        return record

    def keep_best(self) -> int:
        """Put the best step's tensors back, or leave the last one's if none was selected; return its number."""
        best = (self.task.selection.best_step if self.task.selection else 0) or self.done
        if best != self.done and self.checkpoints is not None:
            self.checkpoints.load(best, self.task.tensors())
        return best

    def _one(self, step: int) -> str:
        """Step ``step`` (from 0) with all that follows from it."""
        task, config, number = self.task, self.task.loop, step + 1
        started = perf_counter()
        record = self.train_step(step)
        self.seconds += perf_counter() - started
        stopped, last = task.inspect(number, record), number == config.steps
        save = _due(number, config.checkpoint_every, last)
        settled = last or all(hook.settled for hook in task.hooks.values())
        if task.selection is not None and _due(number, config.validate_every, last):
            found = task.validate(number)
            record |= found.record
            save |= settled and task.selection.update(number, score=found.score, drift=found.record.get("drift", 0.0))
            stopped = stopped or ("patience" if task.selection.exhausted else "")
        elif task.selection is not None and not config.validate_every and save and settled and task.may_keep():
            task.selection.best_step = number
        self._note(number, record)
        if self.previews is not None and config.sample_every and number % config.sample_every == 0:
            previews = self.previews
            on_main(self.accelerator, lambda: previews.write(number))
        if self.checkpoints is not None and (save or stopped):
            on_main(self.accelerator, lambda: self._save(number, stopped))
        return stopped

    def _note(self, number: int, record: dict[str, float]) -> None:
        self.records.append({"step": number, **record})
        if self.log is not None and self.accelerator.is_main_process:
            self.log.append(self.records[-1])
        if self.task.loop.trackers:
            self.accelerator.log(dict(record), step=number)

    def _save(self, number: int, stopped: str) -> None:
        assert self.checkpoints is not None
        task, selection = self.task, self.task.selection
        progress = {"selection": selection.state()} if selection else {}
        notes = task.notes({**progress, "stopped": stopped, "seconds": self.seconds})
        self.checkpoints.save(number, task.tensors(), _plain(task), notes, extra=task.extra() or None)
        self.checkpoints.prune(task.loop.keep_checkpoints, also=selection.best_step if selection else 0)

    def _resume(self) -> str:
        """Go on where the last checkpoint is; return why the training had ended, "" if it had not."""
        checkpoints, log, task = self.checkpoints, self.log, self.task
        if checkpoints is None or log is None:
            return ""
        steps = on_main(self.accelerator, checkpoints.steps)
        self.done = steps[-1] if steps else 0
        on_main(self.accelerator, lambda: log.rewind(self.done))
        if not self.done:
            return ""
        extra = checkpoints.extra(self.done) if task.extra() else {}
        task.restore(extra)
        notes = checkpoints.load(self.done, task.tensors(), _plain(task))
        if task.selection is not None:
            task.selection.restore(notes["selection"])
        self.seconds = notes.get("seconds", 0.0)
        task.resumed(notes, extra)
        return str(notes.get("stopped", ""))

    def _diverged(self, number: int, loss: float, where: str) -> None:
        kept = self.checkpoints.steps() if self.checkpoints else []
        known = f"Kept: {self.checkpoints.path(kept[-1])}. " if self.checkpoints and kept else ""
        raise UserError(
            f"The loss and gradient of step {number} must be finite, got {loss:g}{where}. {known}Lower the learning rate, or look "
            "at these data; then train into a new folder."
        )


def _due(number: int, every: int, last: bool) -> bool:
    return bool(every) and (number % every == 0 or last)


def _plain(task: TrainingTask) -> Any:
    """The optimizer without accelerate's wrapper."""
    return task.optimizer.optimizer if isinstance(task.optimizer, AcceleratedOptimizer) else task.optimizer
