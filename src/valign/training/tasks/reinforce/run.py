"""Reinforce a chat model into a folder: the checks, the run record, what the method learns first, the training, the adapter."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from valign.adapters import adapter_bytes
from valign.checks import UserError, check_choice
from valign.data.chats import ChatPair, Conversation
from valign.data.chats.dual_preferences import DualPreference
from valign.data.chats.reward_prompts import RewardPrompt, fingerprint, require
from valign.files import hash_value
from valign.models.files.tensor_fingerprint import fingerprint_tensors
from valign.models.language.loading import LoadedChat
from valign.models.language.scalar import ScalarChat, load_scalar, new_scalar
from valign.objectives.rewards import RewardFunction
from valign.objectives.rewards.alphaalign import TEMPLATE, VerifiableSafety
from valign.objectives.rewards.dr_irl import ShadowReward
from valign.objectives.rewards.safe_rlhf import Multiplier
from valign.runs import Run
from valign.training.engine.loop import TrainingLoop
from valign.training.engine.processes import start_processes
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.alphaalign import AlphaAlignMethod
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.dpo_task import DPOTask
from valign.training.tasks.reinforce.dr_irl import DrIrlMethod, TextEncoder, balanced, check_categories
from valign.training.tasks.reinforce.group_method import GroupMethod
from valign.training.tasks.reinforce.group_task import GroupTask
from valign.training.tasks.reinforce.grpo_lagrangian import LagrangianMethod
from valign.training.tasks.reinforce.plain import PlainMethod
from valign.training.tasks.reinforce.ppo_task import PPOConfig, PPOTask
from valign.training.tasks.reinforce.scalar_task import ScalarConfig, cost_pairs, fit_scalar, reward_pairs
from valign.training.tasks.reinforce.shadow import ShadowConfig, scalar_reward, shadow_rewards
from valign.training.tasks.supervised.finetune import save_chat_adapter

METHODS = ("alphaalign", "dr-irl", "safe-rlhf", "grpo-lagrangian", "grpo")
LEAST_PAIRS = 2  # dual preferences that a reward and a cost model are learnt from


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    """The options of every method; each reads its own."""

    safety: VerifiableSafety = field(default_factory=VerifiableSafety)
    template: str = TEMPLATE
    loss: ShadowReward = field(default_factory=ShadowReward)
    shadow: ShadowConfig = field(default_factory=ShadowConfig)
    scaled: bool = True  # difficulty scaling of dr-irl
    tau: float | None = None
    scalar: ScalarConfig = field(default_factory=ScalarConfig)
    multiplier: Multiplier = field(default_factory=Multiplier)
    ppo: PPOConfig = field(default_factory=PPOConfig)

    def recipe(self, method: str) -> dict[str, Any]:
        """What ``method`` reads, JSON-able."""
        read = {
            "alphaalign": ("safety", "template"),
            "dr-irl": ("loss", "shadow", "scaled", "tau", "scalar"),
            "safe-rlhf": ("scalar", "multiplier", "ppo"),
            "grpo-lagrangian": ("scalar", "multiplier", "ppo"),
            "grpo": (),
        }[method]
        whole = asdict(self)
        return {name: whole[name] for name in read}


@dataclass(frozen=True, kw_only=True)
class RewardSources:
    """Where scores come from. A reward or cost is a function, a scalar model, or learnt from ``preferences``.

    Args:
        names: What each is called, for the run's record; a model's is its fingerprint.
        encoder: Of sentences, for dr-irl.
        ptx: Chats for the supervised loss beside PPO's.
    """

    reward: RewardFunction | None = None
    cost: RewardFunction | None = None
    reward_model: ScalarChat | None = None
    cost_model: ScalarChat | None = None
    preferences: Sequence[DualPreference] = ()
    encoder: TextEncoder | None = None
    ptx: Sequence[Conversation] = ()
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ReinforceResult:
    """What a finished reinforcement left behind."""

    adapter: str  # the folder that peft loads, or transformers after full fine-tuning
    method: str
    steps: int
    last: dict[str, float]  # the last step's record
    trained: int  # numbers that the method has learnt, without critics
    adapter_bytes: int
    learnt: dict[str, float] = field(default_factory=dict)  # share of its pairs that each scalar model ranks


def reinforce(
    loaded: LoadedChat,
    prompts: Sequence[RewardPrompt],
    out: Path,
    method: str,
    tuning: Tuning,
    config: ReinforceConfig,
    options: MethodOptions,
    sources: RewardSources,
    *,
    targets: tuple[str, ...] = (),
) -> ReinforceResult:
    """Train ``loaded`` by ``method``; write ``out/adapter``, scalar models, ``metrics.jsonl``, ``checkpoints`` and ``run.json``.

    A finished run is returned as it is; an interrupted one goes on from its last checkpoint, with the same bytes on a CPU.
    Raises: UserError if the run is of another recipe or input, the method lacks what it needs, a reward is not finite, nothing was
        learnt, or several processes were started.
    """
    check_choice("--method", method, METHODS)
    _check_sources(method, sources)
    require(prompts, needs={"alphaalign": ("harmful",)}.get(method, ()), what=method)
    accelerator = start_processes(trackers=config.trackers, folder=out, cpu=loaded.model.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise UserError(f"train rl runs in one process, got {accelerator.num_processes}. Start it without accelerate launch.")
    inputs = {
        "model": fingerprint_tensors(loaded.model.state_dict()),
        "prompts": fingerprint(prompts),
        "preferences": hash_value([asdict(row) for row in sources.preferences]),
        "ptx": hash_value([row.content for row in sources.ptx]),
        **{name: hash_value(called) for name, called in sources.names.items()},
    }
    recipe = {
        "method": method,
        "config": config.recipe(),
        "options": options.recipe(method),
        "tuning": tuning.recipe(),
        "targets": list(targets),
        "template": hash_value(loaded.renderer.tokenizer.chat_template),
    }
    run = Run.open(out, step="reinforce", recipe=recipe, inputs=inputs, seed=config.seed)
    if run.done:
        return ReinforceResult(**run.results)
    work = _Reinforcement(loaded, prompts, out, tuning, config, options, sources, accelerator, targets)
    learnt: dict[str, float] = {}
    task = work.ppo(learnt) if method == "safe-rlhf" else work.groups(BUILDERS[method](work, learnt))
    return _trained(run, task, loaded, accelerator, out, method, learnt)


def prefer(
    loaded: LoadedChat,
    pairs: Sequence[ChatPair],
    out: Path,
    tuning: Tuning,
    config: ReinforceConfig,
    *,
    targets: tuple[str, ...] = (),
) -> ReinforceResult:
    """Train ``loaded`` by DPO on pairs of answers into ``out``, as `reinforce` does; see `DPOTask`.

    Raises: UserError as `DPOTask`, and if the run is of another recipe or input.
    """
    accelerator = start_processes(trackers=config.trackers, folder=out, cpu=loaded.model.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise UserError(f"train dpo runs in one process, got {accelerator.num_processes}. Start it without accelerate launch.")
    inputs = {
        "model": fingerprint_tensors(loaded.model.state_dict()),
        "pairs": hash_value([[pair.safe.content, pair.unsafe.content] for pair in pairs]),
    }
    recipe = {"config": config.recipe(), "tuning": tuning.recipe(), "targets": list(targets)}
    run = Run.open(out, step="dpo", recipe=recipe, inputs=inputs, seed=config.seed)
    if run.done:
        return ReinforceResult(**run.results)
    task = DPOTask(loaded, pairs, tuning, config, out, targets=targets)
    return _trained(run, task, loaded, accelerator, out, "dpo", {})


def _trained(
    run: Run,
    task: GroupTask | PPOTask | DPOTask,
    loaded: LoadedChat,
    accelerator: Accelerator,
    out: Path,
    method: str,
    learnt: dict[str, float],
) -> ReinforceResult:
    """Train to the end, save the adapter, finish the run."""
    loop = TrainingLoop(task, accelerator, out=out)
    loop.run()
    if not task.policy.moved():
        raise UserError(
            f"The policy must differ after {loop.done} steps of {method}, got the same weights: every group of answers had equal "
            "rewards, or the learning rate is too low. Look into metrics.jsonl."
        )
    folder = out / "adapter"
    shutil.rmtree(folder, ignore_errors=True)  # written, but not yet recorded, when an earlier call was killed
    save_chat_adapter(folder, task.policy.handle, loaded)
    lines = loop.log.read() if loop.log else []
    result = ReinforceResult(
        adapter=str(folder),
        method=method,
        steps=loop.done,
        last={name: float(value) for name, value in lines[-1].items() if name != "step"} if lines else {},
        trained=task.policy.handle.numbers(),
        adapter_bytes=adapter_bytes(folder),
        learnt=learnt,
    )
    run.finish(**asdict(result))
    return result


def _check_sources(method: str, sources: RewardSources) -> None:
    scored = sources.reward is not None or sources.reward_model is not None
    if method == "grpo" and not scored:
        raise UserError("--method grpo must have a reward to follow, got none. Name one by --reward.")
    if method in ("safe-rlhf", "grpo-lagrangian"):
        lacking = [what for what, known in (("--reward", scored), ("--cost", sources.cost or sources.cost_model)) if not known]
        if lacking and len(sources.preferences) < LEAST_PAIRS:
            raise UserError(
                f"--method {method} must have {' and '.join(lacking)}, or --preferences to learn them from, got neither. "
                "Give a table of two answers with more_helpful_response_id and safer_response_id."
            )
    if method == "dr-irl" and sources.encoder is None:
        raise UserError("--method dr-irl must have an encoder of sentences, got none.")


@dataclass
class _Reinforcement:
    """One run's parts."""

    loaded: LoadedChat
    prompts: Sequence[RewardPrompt]
    out: Path
    tuning: Tuning
    config: ReinforceConfig
    options: MethodOptions
    sources: RewardSources
    accelerator: Accelerator
    targets: tuple[str, ...]

    def groups(self, method: GroupMethod) -> GroupTask:
        return GroupTask(
            self.loaded, self.prompts, method, self.tuning, self.config, self.accelerator, self.out, targets=self.targets
        )

    def ppo(self, learnt: dict[str, float]) -> PPOTask:
        reward, cost, critics = self.scorers(learnt)
        return PPOTask(
            self.loaded,
            self.prompts,
            reward,
            cost,
            critics,
            self.options.multiplier,
            self.tuning,
            self.config,
            self.options.ppo,
            self.accelerator,
            ptx=self.sources.ptx,
            targets=self.targets,
        )

    def scorers(self, learnt: dict[str, float]) -> tuple[RewardFunction, RewardFunction, tuple[ScalarChat, ScalarChat]]:
        """Reward and cost as functions, and as models that critics start from; fresh ones where a score comes from no model."""
        found: list[RewardFunction] = []
        critics: list[ScalarChat] = []
        given = ((self.sources.reward, self.sources.reward_model), (self.sources.cost, self.sources.cost_model))
        for place, (name, (function, model)) in enumerate(zip(("reward", "cost"), given)):
            if function is None and model is None:
                model = self._learn(name, learnt)
            found.append(function or scalar_reward(model, self.config.batch_size))  # type: ignore[arg-type]
            critics.append(model or new_scalar(self.loaded, seed=self.config.seed + place))
        return found[0], found[1], (critics[0], critics[1])

    def helpfulness(self) -> RewardFunction | None:
        model = self.sources.reward_model
        return self.sources.reward or (scalar_reward(model, self.config.batch_size) if model is not None else None)

    def shadows(self) -> dict[str, RewardFunction]:
        options = self.options
        return shadow_rewards(
            self.loaded,
            balanced(self.prompts),
            self.out / "shadow",
            loss=options.loss,
            shadow=options.shadow,
            scalar=options.scalar,
            config=self.config,
            tuning=self.tuning,
            accelerator=self.accelerator,
            targets=self.targets,
        )

    def _learn(self, name: str, learnt: dict[str, float]) -> ScalarChat:
        """A reward or cost model from the preferences, in ``out/NAME``."""
        folder, rows, config = self.out / name, self.sources.preferences, self.options.scalar
        pairs, loss = reward_pairs(rows) if name == "reward" else cost_pairs(rows, config)
        if not (folder / "config.json").exists():
            made = new_scalar(self.loaded, seed=self.config.seed)
            place, label = self.out / f"{name}-training", f"{name} model"
            fit_scalar(made, pairs, loss, config, self.accelerator, out=place, seed=self.config.seed, label=label)
            made.save(folder)
        model = load_scalar(folder, self.loaded, what=f"The {name} model")
        model.model.requires_grad_(False)
        first, second = (model.scored([pair[side] for pair in pairs]) for side in (0, 1))
        learnt[name] = float((first > second).float().mean())
        return model


def _alphaalign(work: _Reinforcement, learnt: dict[str, float]) -> GroupMethod:
    return AlphaAlignMethod(work.helpfulness(), work.options.safety, template=work.options.template)


def _dr_irl(work: _Reinforcement, learnt: dict[str, float]) -> GroupMethod:
    assert work.sources.encoder is not None
    helpful = work.helpfulness()
    check_categories(work.prompts, dict.fromkeys(balanced(work.prompts), lambda prompts, outputs: None), helpful)  # type: ignore[arg-type, return-value]
    return DrIrlMethod(work.shadows(), helpful, work.sources.encoder, scaled=work.options.scaled, tau=work.options.tau)


def _lagrangian(work: _Reinforcement, learnt: dict[str, float]) -> GroupMethod:
    reward, cost, _ = work.scorers(learnt)
    return LagrangianMethod(reward, cost, work.options.multiplier, fixed=work.options.ppo.fixed_multiplier)


def _plain(work: _Reinforcement, learnt: dict[str, float]) -> GroupMethod:
    reward = work.helpfulness()
    assert reward is not None
    return PlainMethod(reward)


BUILDERS: dict[str, Callable[[_Reinforcement, dict[str, float]], GroupMethod]] = {
    "alphaalign": _alphaalign,
    "dr-irl": _dr_irl,
    "grpo-lagrangian": _lagrangian,
    "grpo": _plain,
}
