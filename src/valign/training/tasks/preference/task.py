"""Train on pairs of a preferred and a rejected image, as a task of the engine. What a micro-batch computes is in `pair_step`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from math import inf
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from valign.checks import read_options
from valign.interfaces import PairCache
from valign.optimizers import OPTIMIZERS
from valign.training.engine.displacement import DisplacementMonitor
from valign.training.engine.draws import Visits, share
from valign.training.engine.processes import flatten_gradients, on_main, reduce_sum, spread_gradients
from valign.training.engine.selection import Selection
from valign.training.engine.task import LoopConfig, TrainingTask, Validation
from valign.training.tasks.preference.batches import PairBatch, split_rows
from valign.training.tasks.preference.compiling import compiled_step
from valign.training.tasks.preference.pair_step import SUMS, PairStep
from valign.training.tasks.preference.reference import reference_table
from valign.training.tasks.preference.trainable import TrainableAdapter
from valign.training.tasks.preference.validation import Validator


class PreferenceTask(TrainingTask):
    """A trainable adapter on some rows of a cache of pairs.

    Args:
        out: Folder of the run, for the table of reference errors.
        validate: ``step -> score``, lower is better; replaces the validation loss as the score.
    """

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
        self.step, self.own_score, self.trainable = step, validate, trainable
        self.config, self.accelerator = step.config, step.accelerator
        config = self.config
        train, held_out = split_rows(cache, rows, config.val_fraction)
        self.source = trainable.source(cache, train, config)
        self.micro = config.pairs_per_step // (self.accelerator.num_processes * config.memory.micro_batches)
        self.validator = Validator(step, trainable.source(cache, held_out, config), self.micro) if len(held_out) else None
        self.terms = (False, True) if config.safe_prompt_term else (False,)  # under the safe caption?
        self.visits = Visits(len(train), config.pairs_per_step, config.seed)
        self.diverged: list[str] = []  # names of this process' micro-batches whose loss is not finite
        trainable.start(step, self.source)
        self.handle = trainable.rules()
        self.hooks = {"adapter": self.handle}
        options = read_options(OPTIMIZERS[config.optimizer_name], {"weight_decay": config.weight_decay}, name=config.optimizer_name)
        optimizer = options.build(self.handle.groups(), [], config.learning_rate)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        self.handle.watch(optimizer)
        self.schedule = config.schedule()
        self.max_norm = config.max_grad_norm if config.optimizer == "adamw" and config.max_grad_norm else inf
        self.selection = Selection(config.max_drift, config.patience)
        self.displacement = DisplacementMonitor(config.displacement_warn, config.displacement_stop, config.displacement_window)
        self.warned = False
        self.loop = LoopConfig(
            steps=config.steps,
            label=label,
            checkpoint_every=config.checkpoint_every,
            keep_checkpoints=config.keep_checkpoints,
            validate_every=config.validate_every if self.validator or validate else 0,
            sample_every=config.sample_every,
            trackers=config.trackers,
            recipe=config.recipe(),
        )
        if config.memory.gradient_checkpointing:
            step.model.checkpoint_gradients(True)
        self.fast: Callable[[], AbstractContextManager[None]] = nullcontext
        if config.compile:
            first = self.source.visit(self.visits.at(0)[: self.micro])
            self.fast = compiled_step(step, first, self.parameters())
        self.tables = {
            safe: reference_table(step, self.source, out / "reference", safe_caption=safe, batch=self.micro)
            for safe in (self.terms if config.precompute_ref_draws else ())
        }

    def parameters(self) -> list[nn.Parameter]:
        return list(self.trainable.parameters().values())

    def tensors(self) -> Mapping[str, Tensor]:
        return self.trainable.state()

    def gradients(self, step: int) -> dict[str, float]:
        """Over all pairs of the step and all processes; means over the pairs."""
        with self.fast():
            sums = self._summed(self.visits.at(step))
        parameters = self.parameters()
        sums = spread_gradients(parameters, reduce_sum(self.accelerator, flatten_gradients(parameters, sums)))
        config, terms = self.config, len(self.terms)
        means = dict(zip(SUMS, (sums / (config.pairs_per_step * terms)).tolist(), strict=True))
        means["loss"] *= terms
        means["retention"] *= terms
        if config.winner_safeguard is None:
            del means["loser_scale"]
        if not config.retain_weight:
            del means["retention"]
        means["winner_displacement"] = means["winner_error"] - means["winner_reference"]
        means["loser_displacement"] = means["loser_error"] - means["loser_reference"]
        return means

    def _summed(self, places: list[tuple[int, int]]) -> Tensor:
        """Add this process' gradients; return its sums named in `SUMS`."""
        config, accelerator = self.config, self.accelerator
        sums, self.diverged = torch.zeros(len(SUMS), device=accelerator.device), []
        for micro in range(config.memory.micro_batches):
            mine = share(
                places,
                micro=micro,
                micros=config.memory.micro_batches,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            )
            sums += self._pairs(mine)
            if config.retain_weight:
                sums += self.step.retain(self.source.retained(mine), share=1 / config.pairs_per_step)
        return sums

    def _pairs(self, mine: list[tuple[int, int]]) -> Tensor:
        """Add the gradients of a micro-batch's pairs; return its sums named in `SUMS`."""
        sums = torch.zeros(len(SUMS), device=self.accelerator.device)
        for safe in self.terms:
            batch = self.source.visit(mine, safe_caption=safe)
            reference = self.tables[safe].at(mine) if safe in self.tables else self.step.errors(batch, reference=True)
            found = self.step.backward(batch, reference, share=1 / self.config.pairs_per_step)
            sums += found
            if not found.isfinite().all():
                self.diverged.append(_name(batch))
        return sums

    def suspects(self) -> str:
        names: Sequence[str] = gather_object(self.diverged)
        return f" at {'; '.join(names)}" if names else ""

    def inspect(self, number: int, record: Mapping[str, float]) -> str:
        """``"displacement"`` once the winners' error is too far above the reference; warn before."""
        level = self.displacement.update(record["winner_displacement"], record["winner_reference"])
        if level != "ok" and not self.warned and self.accelerator.is_main_process:
            print(
                f"warning: step {number}: the winners' error is {self.displacement.ratio:.1%} above the reference: images will "
                "break. Lower the learning rate, raise beta, or set sft_weight or winner_safeguard.",
                file=sys.stderr,
            )
        self.warned = level != "ok"
        return "displacement" if level == "stop" else ""

    def may_keep(self) -> bool:
        return self.displacement.level == "ok"

    def validate(self, number: int) -> Validation:
        found, own_score = self.validator() if self.validator is not None else {}, self.own_score
        score = found["val_loss"] if own_score is None else on_main(self.accelerator, lambda: float(own_score(number)))
        return Validation(score, {**found, "val_score": score})

    def notes(self, progress: Mapping[str, Any]) -> dict[str, Any]:
        scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
        return {
            "selection": progress["selection"],
            "alarm": self.displacement.state(),
            "stopped": progress["stopped"],
            "scaler": scaler,
            "seconds": progress["seconds"],
        }

    def extra(self) -> dict[str, Any]:
        return self.handle.extra()

    def restore(self, extra: Mapping[str, Any]) -> None:
        if extra:
            self.handle.restore(extra)

    def resumed(self, notes: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        self.displacement.restore(notes["alarm"])
        if notes["scaler"]:
            self.accelerator.scaler.load_state_dict(notes["scaler"])


def _name(batch: PairBatch) -> str:
    return ", ".join(f"pair {pair} (timestep {int(timestep)})" for pair, timestep in zip(batch.ids, batch.timesteps, strict=True))
