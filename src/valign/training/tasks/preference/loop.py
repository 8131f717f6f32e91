"""The loop over steps: what follows from each, when to stop, what to save. What a step computes is in `pair_step`."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from valign.checks import UserError
from valign.interfaces import PairCache
from valign.progress import track
from valign.runs import Run
from valign.training.engine.checkpoint import Checkpoints
from valign.training.engine.compiling import compiled_step
from valign.training.engine.displacement import DisplacementMonitor
from valign.training.engine.draws import Visits, share
from valign.training.engine.metrics import MetricsLog
from valign.training.engine.optimization import build_optimizer, flatten_gradients, rate_at, spread_gradients
from valign.training.engine.previews import Previews
from valign.training.engine.processes import on_main, reduce_sum
from valign.training.engine.selection import Selection
from valign.training.tasks.preference.batches import PairBatch, split_rows
from valign.training.tasks.preference.pair_step import SUMS, PairStep
from valign.training.tasks.preference.reference import reference_table
from valign.training.tasks.preference.trainable import TrainableAdapter
from valign.training.tasks.preference.validation import Validator


@dataclass(frozen=True)
class TrainResult:
    """What a finished training left behind."""

    adapter: Path
    steps: int  # steps run
    best_step: int  # the step whose factors are in ``adapter``
    stopped: str  # "" (all steps run), "patience" or "displacement"
    metrics: dict[str, float] = field(default_factory=dict)  # of the best step
    seconds: float = field(default=0.0, compare=False)  # in training steps alone, over all calls of the run


class PreferenceLoop:
    """All state of one training, and how it moves from step to step."""

    def __init__(
        self,
        step: PairStep,
        cache: PairCache,
        rows: Tensor,
        out: Path,
        validate: Callable[[int], float] | None,
        label: str,
        trainable: TrainableAdapter,
    ) -> None:
        self.trainable = trainable
        self.step, self.out, self.validate, self.label = step, out, validate, label
        self.config, self.accelerator, model = step.config, step.accelerator, step.model
        config = self.config
        train, held_out = split_rows(cache, rows, config.val_fraction)
        self.source = trainable.source(cache, train, config)
        self.micro = config.pairs_per_step // (self.accelerator.num_processes * config.accumulation)
        self.validator = Validator(step, trainable.source(cache, held_out, config), self.micro) if len(held_out) else None
        self.terms = (False, True) if config.safe_prompt_term else (False,)  # under the safe caption?
        self.visits = Visits(len(train), config.pairs_per_step, config.seed)
        trainable.start(step, self.source)
        self.rules = trainable.rules()
        self.optimizer = self.accelerator.prepare_optimizer(build_optimizer(self.rules.groups(), config))
        self.rules.watch(self.optimizer.optimizer)
        self.alarm = DisplacementMonitor(config.alarm_warn, config.alarm_stop, config.alarm_window)
        self.warned, self.seconds = False, 0.0
        self.selection = Selection(config.max_drift, config.patience)
        self.checkpoints = Checkpoints(out / "checkpoints")
        self.log = MetricsLog(out / "metrics.jsonl")
        self.previews = Previews(trainable.sampler, out / "samples", config.sample_prompts, config.sample_steps, trainable.off)
        if config.gradient_checkpointing:
            model.pipe.unet.enable_gradient_checkpointing()
        self.fast: Callable[[], AbstractContextManager[None]] = nullcontext
        if config.compile:
            first = self.source.visit(self.visits.at(0)[: self.micro])
            self.fast = compiled_step(step, first, list(trainable.parameters().values()))

    def run(self) -> str:
        """Train to the end; say why it ended."""
        config, accelerator = self.config, self.accelerator
        done, stopped = self._resume()
        folder = self.out / "reference"
        self.tables = {
            safe: reference_table(self.step, self.source, folder, safe_caption=safe, batch=self.micro)
            for safe in (self.terms if config.precompute_ref_draws else ())
        }
        if config.trackers:
            accelerator.init_trackers(
                "valign", config={k: v for k, v in config.recipe().items() if isinstance(v, int | float | str)}
            )
        done = max(done, self.rules.spent)
        steps = range(done, config.steps)
        try:
            for step in track(steps, self.label, total=config.steps, done=done) if accelerator.is_main_process else steps:
                if stopped:
                    break
                stopped = self._one(step)
        finally:
            for tracker in accelerator.trackers:  # not `end_training`: it takes the other processes away from the next expert
                tracker.finish()
        return stopped

    def _one(self, step: int) -> str:
        """Step ``step`` (from 0) with all that follows from it."""
        config, number = self.config, step + 1
        started = perf_counter()
        with self.fast():
            record = self._train(step)
        self.seconds += perf_counter() - started
        level = self.alarm.update(record["winner_displacement"], record["winner_reference"])
        self._warn(level, number)
        checkpoint = number % config.checkpoint_every == 0 or number == config.steps
        settled = self.rules.settled or number == config.steps
        stopped = "displacement" if level == "stop" else ""
        if self._validates and (number % config.validate_every == 0 or number == config.steps):
            record |= (found := self._validate(number))
            best = settled and self.selection.offer(number, score=found["val_score"], drift=found.get("drift", 0.0))
            checkpoint, stopped = checkpoint or best, stopped or ("patience" if self.selection.exhausted else "")
        elif not self._validates and checkpoint and level == "calm" and settled:
            self.selection.best_step = number
        if self.accelerator.is_main_process:
            self.log.append({"step": number, **record})
        if config.trackers:
            self.accelerator.log(record, step=number)
        if config.sample_every and number % config.sample_every == 0:
            on_main(self.accelerator, lambda: self.previews.write(number))
        if checkpoint or stopped:
            on_main(self.accelerator, lambda: self._save(number, stopped))
        return stopped

    def _train(self, step: int) -> dict[str, float]:
        """Gradient over all pairs of the step, then one move of the factors."""
        config, accelerator, parameters = self.config, self.accelerator, list(self.trainable.parameters().values())
        rate = rate_at(step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate", 1.0)
        places, sums = self.visits.at(step), torch.zeros(len(SUMS), device=accelerator.device)
        suspects: list[str] = []
        for micro in range(config.accumulation):
            mine = share(
                places,
                micro=micro,
                micros=config.accumulation,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            for safe in self.terms:
                batch = self.source.visit(mine, safe_caption=safe)
                reference = self.tables[safe].at(mine) if safe in self.tables else self.step.errors(batch, reference=True)
                found = self.step.backward(batch, reference, share=1 / config.pairs_per_step)
                sums += found
                if found[-1] or not found.isfinite().all():
                    suspects.append(_name(batch))
            if config.retain_weight:
                sums += self.step.retain(self.source.retained(mine), share=1 / config.pairs_per_step)
        flat = reduce_sum(accelerator, flatten_gradients(parameters, sums))
        sums = spread_gradients(parameters, flat)
        if sums[-1] or not sums.isfinite().all():
            self._diverged(step + 1, gather_object(suspects))
        penalty = self.rules.penalty()
        if penalty is not None:  # the same on every process, and of no pair: added once, after the sum
            accelerator.backward(penalty)
        norm = self._move(parameters, step)
        means = dict(zip(SUMS, (sums / (config.pairs_per_step * len(self.terms))).tolist(), strict=True))
        means["loss"] *= len(self.terms)
        means["retention"] *= len(self.terms)
        del means["not_finite"]
        if config.winner_safeguard is None:
            del means["loser_scale"]
        if not config.retain_weight:
            del means["retention"]
        means["winner_displacement"] = means["winner_error"] - means["winner_reference"]
        means["loser_displacement"] = means["loser_error"] - means["loser_reference"]
        return {**means, "gradient_norm": norm, "learning_rate": rate}

    def _move(self, parameters: list[torch.nn.Parameter], step: int) -> float:
        clip = self.config.max_grad_norm if self.config.optimizer == "adamw" and self.config.max_grad_norm else float("inf")
        norm = float(self.accelerator.clip_grad_norm_(parameters, clip))
        if norm != norm or (norm == float("inf") and self.accelerator.scaler is None):
            self._diverged(step + 1, [])
        self.optimizer.step()
        self.rules.after_step(step)
        self.optimizer.zero_grad()
        return norm if norm != float("inf") else 0.0  # float16: the scaler has skipped this step and lowers its scale

    @property
    def _validates(self) -> bool:
        return self.validator is not None or self.validate is not None

    def _validate(self, number: int) -> dict[str, float]:
        found = self.validator() if self.validator is not None else {}
        if self.validate is not None:
            call = self.validate
            return {**found, "val_score": on_main(self.accelerator, lambda: float(call(number)))}
        return {**found, "val_score": found["val_loss"]}

    def _warn(self, level: str, number: int) -> None:
        if level != "calm" and not self.warned and self.accelerator.is_main_process:
            print(
                f"warning: step {number}: the winners' error is {self.alarm.ratio:.1%} above the reference: images will break. "
                "Lower the learning rate, raise beta, or set sft_weight or winner_safeguard.",
                file=sys.stderr,
            )
        self.warned = level != "calm"

    def _diverged(self, number: int, suspects: list[str]) -> None:
        kept = self.checkpoints.steps()
        where = f"Kept: {self.checkpoints.path(kept[-1])}. " if kept else "No checkpoint was written yet. "
        raise UserError(
            f"The loss of step {number} must be finite, got NaN or infinity"
            f"{' at ' + '; '.join(suspects) if suspects else ' in the gradient'}. "
            f"{where}Lower the learning rate, or look at these pairs; then train into a new folder."
        )

    def _save(self, number: int, stopped: str) -> None:
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        state: dict[str, Any] = {"selection": self.selection.state(), "alarm": self.alarm.state(), "stopped": stopped}
        state |= {"scaler": scaler, "seconds": self.seconds}
        self.checkpoints.save(number, self.trainable.state(), self.optimizer.optimizer, state, extra=self.rules.extra() or None)
        self.checkpoints.prune(self.config.keep_checkpoints, also=self.selection.best_step)

    def _resume(self) -> tuple[int, str]:
        """Steps done, and why the training had ended, if it had."""
        steps = on_main(self.accelerator, self.checkpoints.steps)
        done = steps[-1] if steps else 0
        on_main(self.accelerator, lambda: self.log.rewind(done))
        if not done:
            return 0, ""
        if self.rules.extra():
            self.rules.restore(self.checkpoints.extra(done))
        state = self.checkpoints.load(done, self.trainable.state(), self.optimizer.optimizer)
        self.selection.restore(state["selection"])
        self.alarm.restore(state["alarm"])
        self.seconds = state.get("seconds", 0.0)
        if state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        return done, state["stopped"]

    def finish(self, run: Run, stopped: str, metadata: dict[str, Any]) -> TrainResult:
        """Write the best step's factors as the adapter, and close the run."""
        return on_main(self.accelerator, lambda: self._finish(run, stopped, metadata))

    def _finish(self, run: Run, stopped: str, metadata: dict[str, Any]) -> TrainResult:
        steps, best = self.checkpoints.steps()[-1], self.selection.best_step
        if not best:
            raise UserError(
                f"{self.out} has no step worth keeping: {'winners were displaced' if stopped else 'no validation gave a number'}. "
                "Lower the learning rate, raise beta, or set sft_weight or winner_safeguard; train into a new folder."
            )
        self.checkpoints.load(best, self.trainable.state())
        self.trainable.save(self.out, {**metadata, "step": best})
        lines = {int(line["step"]): line for line in self.log.read()}
        metrics = {name: float(value) for name, value in lines[best].items() if name != "step"}
        run.finish(steps=steps, best_step=best, stopped=stopped, metrics=metrics, seconds=self.seconds)
        return TrainResult(self.trainable.result(self.out), steps, best, stopped, metrics, self.seconds)


def _name(batch: PairBatch) -> str:
    return ", ".join(f"pair {pair} (timestep {int(timestep)})" for pair, timestep in zip(batch.ids, batch.timesteps, strict=True))
