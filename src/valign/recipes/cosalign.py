"""CoSAlign (arXiv 2410.08968): a chat model learns to follow the safety config in its system prompt, by SFT and then by DPO."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from valign.checks import UserError, check_options, option
from valign.data.chats import ChatPair, Conversation
from valign.data.chats.config_prompts import MODES, sample_config
from valign.data.chats.judged_answers import JudgedPrompt
from valign.data.tasks.base import Task, TaskData
from valign.models.language.chat_task import ChatTaskModel
from valign.models.language.loading import load_chat
from valign.objectives.preference.cosa import TOLERANCE, ConfigError
from valign.training.engine.tuning import Tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.training.tasks.reinforce.run import ReinforceResult, prefer
from valign.training.tasks.supervised import SupervisedConfig, finetune

# allowed categories, in an order -> the system prompt; "" for none
ConfigWriter = Callable[[Sequence[str], np.random.Generator], str]


@dataclass(frozen=True, kw_only=True)
class CosalignConfig:
    """What a training to follow configs costs. DPO's own numbers are in `ReinforceConfig`: its ``kl`` is beta."""

    configs: int = option(1, help="configs of each of the four kinds per prompt", low=1)
    sft_steps: int = option(200, help="steps of supervised training on the best answers", low=1)
    sft_learning_rate: float = option(5e-7, help="of these", above=0)
    sft_batch: int = option(32, help="answers per step of these", low=1, rare=True)
    max_tokens: int = option(1024, help="of a config, a prompt and an answer together; longer ones are left out", low=16, rare=True)

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ConfigPairs:
    """Pairs under sampled configs, with what was counted while they were made."""

    pairs: list[ChatPair]
    kinds: dict[str, int]  # pairs by kind of config
    silent: int  # prompts whose answers all have one label, which yield no pair
    best: list[Conversation]  # under each config the preferred answers with the least error: what supervised training shows


def config_pairs(
    prompts: Sequence[JudgedPrompt],
    categories: Sequence[str],
    write: ConfigWriter,
    *,
    error: ConfigError | None = None,
    configs: int = 1,
    seed: int = 0,
) -> ConfigPairs:
    """For each prompt ``configs`` configs of each kind, and under each the preferred of every two labels of answers.

    Chosen and rejected share the system prompt, which is the config in words, and the prompt.
    Raises: UserError if no pair comes out.
    """
    rule, draws = error or ConfigError(), np.random.default_rng([seed, *b"cosalign"])
    found: list[ChatPair] = []
    best: list[Conversation] = []
    kinds: Counter[str] = Counter()
    for prompt in prompts:
        for mode in MODES:
            for _ in range(configs):
                allowed = sample_config(prompt.risks, mode, categories, draws)
                system = write(allowed, draws)
                made = rule.pairs(allowed, prompt.answers, categories, draws)
                kinds[mode] += len(made)
                found += [ChatPair(_chat(prompt, system, pair.chosen), _chat(prompt, system, pair.rejected)) for pair in made]
                least = min((pair.chosen_error for pair in made), default=0.0) + TOLERANCE
                best += [_chat(prompt, system, pair.chosen) for pair in made if pair.chosen_error <= least]
    silent = sum(len(prompt.answers) < 2 for prompt in prompts)
    if not found:
        raise UserError(
            f"Prompts must have answers of at least two labels to prefer one, got {len(prompts)} prompts without a pair. "
            "Add refusals beside answers."
        )
    return ConfigPairs(found, dict(kinds), silent, list(dict.fromkeys(best)))


def train_cosalign(
    model: str | Path,
    made: ConfigPairs,
    out: Path,
    tuning: Tuning,
    config: CosalignConfig,
    dpo: ReinforceConfig,
    *,
    device: str = "auto",
) -> ReinforceResult:
    """SFT on the best answers into ``out/sft``, then DPO on the pairs into ``out/dpo``; each resumes.

    A refusal is preferred to an answer that breaks the config, also where a third answer is better than both: shown as it is,
    it would teach to refuse what is open, so SFT leaves it to DPO.
    Chats that are too long are left out of both; a config is never cut.
    Raises: UserError for an adapter, whose start DPO could not load, and as `finetune` and `prefer`.
    """
    if tuning.name.split("+")[0] != "full":
        raise UserError(f"cosalign trains whole weights, SFT and then DPO from its result, got {tuning.name}. Use --adapter full.")
    subject = ChatTaskModel(load_chat(model, device=device, dtype="float32"), max_tokens=config.max_tokens, overlong="drop")
    rows = subject.fitting(made.best, "answer")
    held = max(1, len(rows) // 20)
    data = TaskData(Task(name="chat", kind="chat", score="loss"), tuple(rows[held:]), tuple(rows[:held]))
    supervised = SupervisedConfig(steps=config.sft_steps, batch_size=config.sft_batch, validate_every=0, seed=dpo.seed)
    start = finetune(
        subject, data, out / "sft", tuning.at(config.sft_learning_rate / tuning.learning_rate), supervised, label="sft"
    )
    loaded = load_chat(start.adapter, device=device, dtype="float32")
    fits = [pair for pair in made.pairs if _fits(subject, pair.safe) and _fits(subject, pair.unsafe)]
    return prefer(loaded, fits, out / "dpo", tuning, dpo)


def recipe(made: ConfigPairs, result: ReinforceResult) -> dict[str, Any]:
    """What a command prints: the pairs by kind, and the training's result."""
    return {"pairs": len(made.pairs), "by_kind": made.kinds, "prompts_without_a_pair": made.silent, **asdict(result)}


def _fits(subject: ChatTaskModel, chat: Conversation) -> bool:
    return len(subject.renderer.chat(chat.messages).ids) <= subject.max_tokens


def _chat(prompt: JudgedPrompt, system: str, answer: str) -> Conversation:
    before = (("system", system),) if system else ()
    return Conversation((*before, *prompt.turns, ("assistant", answer)))
