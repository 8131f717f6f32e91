"""Direct preference optimization of a chat model (arXiv 2305.18290) as a task of the engine, on trl's DPOTrainer."""

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from valign.checks import UserError
from valign.data.chats import ChatPair
from valign.models.language.loading import LoadedChat
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.schedule import keep_peaks
from valign.training.engine.task import TrainingTask, changing_tensors
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.group_task import TrainedPolicy, apart, loop_config

LOGGED = {"rewards/accuracies": "ranked", "rewards/margins": "margin"}


class DPOTask(TrainingTask):
    """``-log sigmoid(beta (log pi/pi_ref (chosen) - log pi/pi_ref (rejected)))``; beta is ``config.kl``.

    A step takes ``config.prompts`` pairs.

    Raises: UserError without pairs, with beta 0, or for a pair that does not fit the model's window; nothing is cut.
    """

    def __init__(
        self,
        loaded: LoadedChat,
        pairs: Sequence[ChatPair],
        tuning: Tuning,
        config: ReinforceConfig,
        folder: Path,
        *,
        targets: tuple[str, ...] = (),
    ) -> None:
        from valign.training.tasks.reinforce.preference_trainer import PreferenceTrainer  # trl is slow to import

        if not pairs or not config.kl:
            raise UserError(f"dpo must have at least one pair and --kl (its beta) above 0, got {len(pairs)} and {config.kl:g}.")
        self.config = config
        self.rows = [_row(loaded, pair) for pair in pairs]
        longest = max(range(len(pairs)), key=lambda place: _size(self.rows[place]))
        if loaded.window is not None and _size(self.rows[longest]) > loaded.window:
            got = _size(self.rows[longest])
            raise UserError(f"Pair {longest + 1} must have at most {loaded.window} tokens, got {got}. Shorten or delete it.")
        self.policy = TrainedPolicy(loaded, tuning, config, targets=targets, reference=True)
        with apart():  # trl seeds the whole process
            self.trainer = PreferenceTrainer(
                self.policy.network, loaded, self.policy.reference, beta=config.kl, accumulation=config.accumulation, folder=folder
            )
        self.schedule, self.max_norm = config.shares(), config.max_grad_norm or inf
        self.visits = Visits(len(pairs), config.prompts, config.seed)
        self.optimizer = tuning.optimizer.build(self.policy.groups(config.learning_rate), [], config.learning_rate)
        keep_peaks(self.optimizer)
        self.policy.handle.watch(self.optimizer)
        self.hooks = {"adapter": self.policy.handle}
        self.loop = loop_config(config, "dpo")

    def gradients(self, step: int) -> dict[str, float]:
        places = [place for place, _ in self.visits.at(step)]
        size = -(-len(places) // self.config.accumulation)
        loss, metrics = 0.0, self.trainer._metrics["train"]
        with apart():
            torch.manual_seed(generator_for("dpo", self.config.seed, step).initial_seed())
            for first in range(0, len(places), size):
                batch = self.trainer.collator([self.rows[place] for place in places[first : first + size]])
                loss += float(self.trainer.training_step(self.policy.network, batch, None))
        means = {ours: sum(metrics[theirs]) / len(metrics[theirs]) for theirs, ours in LOGGED.items() if metrics[theirs]}
        metrics.clear()
        return {"loss": loss} | means

    def tensors(self) -> dict[str, Tensor]:
        return changing_tensors(self.policy.network, self.policy.frozen)


def _row(loaded: LoadedChat, pair: ChatPair) -> dict[str, Any]:
    chosen, rejected = (loaded.renderer.chat(side.messages) for side in (pair.safe, pair.unsafe))
    (first, last), (start, end) = chosen.turns[-1], rejected.turns[-1]
    return {"prompt_ids": chosen.ids[:first], "chosen_ids": chosen.ids[first:last], "rejected_ids": rejected.ids[start:end]}


def _size(row: dict[str, Any]) -> int:
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))
