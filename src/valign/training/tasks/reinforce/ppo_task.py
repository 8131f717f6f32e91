"""PPO under a limit on the expected cost (Safe RLHF) as a task of the engine: one policy, two critics, one multiplier."""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from valign.checks import UserError, check_options, option
from valign.data.chats import Conversation
from valign.data.chats.reward_prompts import RewardPrompt, require
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.generation import ChatAnswer
from valign.models.language.loading import LoadedChat
from valign.models.language.scalar import ScalarChat
from valign.objectives.rewards import RewardFunction
from valign.objectives.rewards.safe_rlhf import (
    Multiplier,
    actor_loss,
    critic_loss,
    estimated_advantages,
    lagrangian_advantages,
    token_signals,
)
from valign.randomness import generator_for
from valign.training.engine.draws import Visits
from valign.training.engine.schedule import keep_peaks
from valign.training.engine.task import TrainingTask, changing_tensors
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.group_method import Rollout, check_rewards
from valign.training.tasks.reinforce.group_task import TrainedPolicy, check_room, loop_config, templated
from valign.training.tasks.reinforce.grpo_lagrangian import CostWindow


@dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """What PPO has beside a plain reinforcement. ``prompts * group`` prompts make a step, with one answer each."""

    token_kl: float = option(0.02, help="weight of each token's divergence from the model as it was", low=0)
    critic_learning_rate: float = option(5e-7, help="of both critics", above=0)
    gamma: float = option(1.0, help="discount of later tokens", above=0, high=1, rare=True)
    gae: float = option(0.95, help="lambda of the generalized advantage estimate", low=0, high=1, rare=True)
    value_clip: float = option(5.0, help="how far a critic's value may move before its error is clipped", above=0, rare=True)
    update_iters: int = option(1, help="steps on the same answers", low=1, rare=True)
    ptx: float = option(16.0, help="weight of the supervised loss on --ptx-data, beside the policy's", low=0, rare=True)
    fixed_multiplier: bool = option(False, help="leave lambda at its start (an ablation)", rare=True)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Episodes:
    """Answers of one step, right-padded, with what was known when they were sampled."""

    ids: Int[Tensor, "row token"]
    seen: Int[Tensor, "row token"]  # attention mask
    mask: Bool[Tensor, "row next"]  # per predicted token: whether it is an answer's
    old: Float[Tensor, "row next"]
    joint: Float[Tensor, "row next"]  # advantages
    values: tuple[Float[Tensor, "row next"], Float[Tensor, "row next"]]  # of the reward's and the cost's critic
    returns: tuple[Float[Tensor, "row next"], Float[Tensor, "row next"]]


class PPOTask(TrainingTask):
    """The critics start as the reward and the cost model, all of whose weights train.

    Args:
        reward, cost: Score whole answers. critics: Start of the value models, for reward and cost; copied.
        ptx: Chats whose supervised loss is added to the policy's; none for none.
    Raises: UserError for prompts that are too long.
    """

    def __init__(
        self,
        loaded: LoadedChat,
        prompts: Sequence[RewardPrompt],
        reward: RewardFunction,
        cost: RewardFunction,
        critics: tuple[ScalarChat, ScalarChat],
        rule: Multiplier,
        tuning: Tuning,
        config: ReinforceConfig,
        ppo: PPOConfig,
        accelerator: Accelerator,
        *,
        ptx: Sequence[Conversation] = (),
        targets: tuple[str, ...] = (),
    ) -> None:
        require(prompts, needs=(), what="safe-rlhf")
        if config.steps % ppo.update_iters:
            raise UserError(
                f"--steps must be a multiple of update_iters {ppo.update_iters}, got {config.steps}. Change one of them."
            )
        self.prompts, self.reward, self.cost, self.config, self.ppo = prompts, reward, cost, config, ppo
        self.chats = templated(prompts, None)
        check_room(loaded, self.chats, config)
        self.supervised = ChatTaskModel(loaded) if ptx else None  # freezes the model, so before the adapter
        self.ptx = self.supervised.fitting(ptx, "--ptx-data, row") if self.supervised is not None else []
        self.policy = TrainedPolicy(loaded, tuning, config, targets=targets, reference=True)
        if self.supervised is not None:
            self.supervised.network = self.policy.network
        self.critics = tuple(ScalarChat(deepcopy(one.model).train().requires_grad_(True), one.renderer) for one in critics)
        self.window = CostWindow(rule, fixed=ppo.fixed_multiplier)
        self.schedule = config.shares()
        self.visits = Visits(len(prompts), config.prompts * config.group, config.seed)
        rates = (config.learning_rate, ppo.critic_learning_rate, ppo.critic_learning_rate)
        self.parts = [self.policy.trained, *(list(one.model.parameters()) for one in self.critics)]
        groups = [{"params": part, "lr": rate} for part, rate in zip(self.parts, rates)]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        keep_peaks(self.optimizer)
        self.policy.handle.watch(self.optimizer)
        self.hooks = {"adapter": self.policy.handle}
        self.loop = loop_config(config, "safe-rlhf")
        if ppo.update_iters > 1 and config.checkpoint_every % ppo.update_iters:
            raise UserError(
                f"--checkpoint-every must be a multiple of update_iters {ppo.update_iters}, got {config.checkpoint_every}."
            )
        self.episodes: Episodes | None = None

    def gradients(self, step: int) -> dict[str, float]:
        ppo, record = self.ppo, dict[str, float]()
        if step % ppo.update_iters == 0 or self.episodes is None:
            self.episodes, record = self._sample(step)
        found = self.episodes
        self.policy.network.train()
        loss = actor_loss(
            self._log_probs(self.policy.network, found.ids, found.seen), found.old, found.joint, found.mask, clip=self.config.clip
        )
        loss.backward()
        errors = []
        for critic, old, returns in zip(self.critics, found.values, found.returns):
            error = critic_loss(critic.values(found.ids, found.seen)[:, :-1], old, returns, found.mask, clip=ppo.value_clip)
            error.backward()
            errors.append(float(error.detach()))
        record = {"loss": float(loss.detach())} | record | {"reward_critic": errors[0], "cost_critic": errors[1]}
        if self.supervised is not None and ppo.ptx:
            record["ptx"] = self._supervise(step)
        norms = [float(clip_grad_norm_(part, self.config.max_grad_norm or inf, error_if_nonfinite=True)) for part in self.parts]
        return record | {"gradient_norm": norms[0]}

    def tensors(self) -> dict[str, Tensor]:
        policy = changing_tensors(self.policy.network, self.policy.frozen)
        named = {f"policy.{name}": tensor for name, tensor in policy.items()}
        for what, critic in zip(("reward", "cost"), self.critics):
            named |= {f"{what}_critic.{name}": tensor for name, tensor in critic.model.named_parameters()}
        return named

    def extra(self) -> dict[str, Any]:
        return {**super().extra(), "multiplier": self.window.extra()}

    def restore(self, extra: Mapping[str, Any]) -> None:
        super().restore(extra)
        self.window.restore(extra["multiplier"])

    def _sample(self, step: int) -> tuple[Episodes, dict[str, float]]:
        """One answer to each prompt of the step, with all that stays fixed while it is learnt from."""
        config, ppo = self.config, self.ppo
        places = [place for place, _ in self.visits.at(step // ppo.update_iters)]
        seed = generator_for("rollouts", config.seed, step).initial_seed()
        chats = [self.chats[place] for place in places]
        answers = self.policy.answers(chats, config, seed=seed, temperature=config.temperature)
        prompts, texts = [self.prompts[place] for place in places], [answer.text for answer in answers]
        rollouts = [Rollout(*row) for row in zip(prompts, places, texts)]
        reward, cost = self.reward(prompts, texts), self.cost(prompts, texts)
        for name, scores in (("reward", reward), ("cost", cost)):
            check_rewards(name, scores, rollouts)
        ids, seen, mask = padded_answers(
            [self.policy.loaded.renderer.prompt(chat) for chat in chats], answers, self.policy.network.device
        )
        with torch.no_grad():
            old, start = (self._log_probs(network, ids, seen) for network in (self.policy.network, self.policy.reference))
            values = tuple(critic.values(ids, seen)[:, :-1] for critic in self.critics)
        kl = (old - start) * mask
        signals = token_signals(kl, reward.to(old), cost.to(old), mask, weight=ppo.token_kl)
        parts = [estimated_advantages(signal, value, mask, gamma=ppo.gamma, gae=ppo.gae) for signal, value in zip(signals, values)]
        joint = lagrangian_advantages(parts[0][0], parts[1][0], self.window.value)
        noted = self.window.update(cost, step)
        record = {
            "reward": float(reward.mean()),
            "cost": float(cost.mean()),
            "kl": float((kl.sum(1) / mask.sum(1)).mean()),
            "answer_tokens": float(mask.sum(1).float().mean()),
            **noted,
        }
        return Episodes(ids, seen, mask, old, joint, values, (parts[0][1], parts[1][1])), record  # type: ignore[arg-type]

    def _log_probs(self, network: Any, ids: Int[Tensor, "row token"], seen: Int[Tensor, "row token"]) -> Float[Tensor, "row next"]:
        """Of each next token, at the temperature of the sampling."""
        logits = network(input_ids=ids, attention_mask=seen, use_cache=False).logits[:, :-1].float()
        return (logits / self.config.temperature).log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]

    def _supervise(self, step: int) -> float:
        assert self.supervised is not None
        rows = [self.ptx[place] for place, _ in Visits(len(self.ptx), self.config.prompts, self.config.seed).at(step)]
        batch = self.supervised.batch(rows)
        loss = self.supervised.loss(batch) / batch.weight
        (self.ppo.ptx * loss).backward()
        return float(loss.detach())


def padded_answers(
    prompts: Sequence[Sequence[int]], answers: Sequence[ChatAnswer], device: Any
) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"], Bool[Tensor, "row next"]]:
    """Prompts with their answers, padded on the right; the attention mask; and, per next token, whether it is an answer's.

    Raises: UserError for an answer without a token.
    """
    if empty := sum(not answer.ids for answer in answers):
        raise UserError(f"Answers must have at least one token, got {empty} without. Raise --answer-tokens.")
    rows = [[*prompt, *answer.ids] for prompt, answer in zip(prompts, answers)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    seen = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    places = torch.arange(1, width, device=device)
    first = torch.tensor([len(prompt) for prompt in prompts], device=device)[:, None]
    last = torch.tensor([len(row) for row in rows], device=device)[:, None]
    return ids, seen, (places >= first) & (places < last)
