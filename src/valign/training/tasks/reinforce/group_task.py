"""Reinforcement by groups of answers as a task of the engine."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from valign.adapters import AttachContext, default_targets
from valign.checks import UserError
from valign.data.chats.reward_prompts import RewardPrompt, require
from valign.models.language.generation import ChatAnswer, answer_chats
from valign.models.language.loading import LoadedChat
from valign.objectives.rewards.alphaalign import prompted
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.schedule import keep_peaks
from valign.training.engine.task import LoopConfig, TrainingTask, changing_tensors
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.group_method import GroupMethod

LOGGED = {  # trl's metrics that are worth a column -> its name in the log
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "equal_groups",
    "kl": "kl",
    "entropy": "entropy",
    "clip_ratio/region_mean": "clipped",
    "completions/mean_length": "answer_tokens",
    "completions/clipped_ratio": "cut_off",
}


class TrainedPolicy:
    """A chat model under the adapter of ``tuning``, and the model as it was.

    Args:
        reference: Whether the model as it was is kept, as a copy.
    """

    def __init__(
        self, loaded: LoadedChat, tuning: Tuning, config: ReinforceConfig, *, targets: tuple[str, ...], reference: bool
    ) -> None:
        network = loaded.model
        network.requires_grad_(False)
        self.reference = deepcopy(network).eval() if reference else None
        own = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
        self.handle = tuning.adapter.attach(_context(network, config, targets))
        self.network: Any = self.handle.network
        self.frozen = own - {id(p) for p in self.network.parameters() if p.requires_grad}
        self.loaded = replace(loaded, model=self.network)
        self.start = [parameter.detach().clone() for parameter in self.trained]

    @property
    def trained(self) -> list[Tensor]:
        """Parameters of the adapter."""
        return [parameter for parameter in self.network.parameters() if parameter.requires_grad]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""
        return [{**group, "lr": rate} for group in self.handle.groups()]

    def merged(self) -> Any:
        """The bare network with what was learnt in its weights, and without what trl has put on it."""
        bare = self.handle.merged()
        bare.__dict__.pop("forward", None)
        return bare

    def moved(self) -> bool:
        """Whether any trained number differs from its start."""
        return any(not torch.equal(now, then) for now, then in zip(self.trained, self.start))

    def answers(
        self, chats: Sequence[Any], config: ReinforceConfig, *, seed: int = 0, temperature: float = 0.0
    ) -> list[ChatAnswer]:
        """One answer per chat, in evaluation mode."""
        was = self.network.training
        self.network.eval()
        found = answer_chats(
            self.loaded, chats, max_tokens=config.answer_tokens, batch_size=config.batch_size, temperature=temperature, seed=seed
        )
        self.network.train(was)
        return found


def templated(prompts: Sequence[RewardPrompt], template: str | None) -> list[list[dict[str, str]]]:
    """The chats that the policy sees."""
    return [prompt.messages if template is None else prompt.with_query(prompted(prompt.query, template)) for prompt in prompts]


def check_room(loaded: LoadedChat, chats: Sequence[Any], config: ReinforceConfig) -> None:
    """Refuse chats that leave no room for an answer, before anything is trained. Raises: UserError with the row."""
    sizes = [len(loaded.renderer.prompt(chat)) for chat in chats]
    longest = max(range(len(sizes)), key=sizes.__getitem__)
    if loaded.window is not None and sizes[longest] + config.answer_tokens > loaded.window:
        raise UserError(
            f"Prompt {longest + 1} must leave room for {config.answer_tokens} tokens of answer in the model's {loaded.window}, got "
            f"{sizes[longest]} tokens of prompt. Lower --answer-tokens, shorten the template, or leave that prompt out."
        )


class GroupTask(TrainingTask):
    """Trains ``loaded`` by the advantages of `GroupMethod` over groups of sampled answers.

    Raises: UserError for prompts without the labels that the method needs, or too long ones.
    """

    def __init__(
        self,
        loaded: LoadedChat,
        prompts: Sequence[RewardPrompt],
        method: GroupMethod,
        tuning: Tuning,
        config: ReinforceConfig,
        accelerator: Accelerator,
        folder: Path,
        *,
        targets: tuple[str, ...] = (),
    ) -> None:
        from valign.training.tasks.reinforce.group_trainer import GroupTrainer  # trl is slow to import

        require(prompts, needs=method.needs, what=method.name)
        self.prompts, self.method, self.config = prompts, method, config
        self.chats = templated(prompts, method.template)
        check_room(loaded, self.chats, config)
        self.policy = TrainedPolicy(loaded, tuning, config, targets=targets, reference=config.kl > 0)
        with apart():  # trl seeds the whole process
            self.trainer = GroupTrainer(
                self.policy.network, loaded, self.policy.reference, prompts, self.chats, method, config, folder
            )
        self.schedule, self.max_norm = config.shares(), config.max_grad_norm or inf
        self.visits = Visits(len(prompts), config.prompts, config.seed)
        self.optimizer = tuning.optimizer.build(self.policy.groups(config.learning_rate), [], config.learning_rate)
        keep_peaks(self.optimizer)
        self.policy.handle.watch(self.optimizer)
        self.hooks = {"adapter": self.policy.handle}
        self.loop = loop_config(config, method.name)

    def gradients(self, step: int) -> dict[str, float]:
        config, trainer, method = self.config, self.trainer, self.method
        places = [place for place, _ in self.visits.at(step)]
        epoch = -(-len(self.prompts) // config.prompts)
        method.before_step(step, self.prompts, epoch, self._greedy)
        seed = generator_for("rollouts", config.seed, step).initial_seed()
        trainer.sampler = lambda chats: self.policy.answers(chats, config, seed=seed, temperature=config.temperature)
        trainer._step, trainer._buffered_inputs = step * config.accumulation, None
        loss, rows = 0.0, trainer.rows(places)
        with apart():
            torch.manual_seed(seed)
            for _ in range(config.accumulation):
                loss += float(trainer.training_step(self.policy.network, rows, None))
        metrics = trainer._metrics["train"]
        record = {"loss": loss} | {ours: _mean(metrics[theirs]) for theirs, ours in LOGGED.items() if metrics.get(theirs)}
        record |= {name: float(column.mean()) for name, column in zip(method.columns, trainer.scores.T)}
        metrics.clear()
        return record | method.after_step(step, trainer.scores)

    def tensors(self) -> dict[str, Tensor]:
        return changing_tensors(self.policy.network, self.policy.frozen)

    def extra(self) -> dict[str, Any]:
        return {**super().extra(), "method": self.method.extra()}

    def restore(self, extra: Mapping[str, Any]) -> None:
        super().restore(extra)
        self.method.restore(extra["method"])

    def _greedy(self, prompts: Sequence[RewardPrompt]) -> list[str]:
        chats = templated(prompts, self.method.template)
        return [answer.text for answer in self.policy.answers(chats, self.config)]


@contextmanager
def apart() -> Iterator[None]:
    """Work of trl's that leaves the process' random numbers as they were, and whose remarks on its own internals are not shown."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def loop_config(config: ReinforceConfig, name: str) -> LoopConfig:
    """When the loop does what."""
    return LoopConfig(
        steps=config.steps,
        label=f"reinforce by {name}",
        checkpoint_every=config.checkpoint_every,
        keep_checkpoints=config.keep_checkpoints,
        trackers=config.trackers,
        recipe=config.recipe(),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _context(network: Any, config: ReinforceConfig, targets: tuple[str, ...]) -> AttachContext:
    def loss(number: int, half: int | None) -> Tensor:
        raise UserError(
            "The adapter must not look at losses of labelled rows to start, which reinforcement has not. Take lora, pissa or full."
        )

    return AttachContext(
        network=network,
        head=(),
        targets=default_targets(network, targets),
        steps=config.steps,
        batch_size=config.prompts * config.group,
        first_rate=config.shares().at(0),
        seed=config.seed,
        loss=loss,
    )
