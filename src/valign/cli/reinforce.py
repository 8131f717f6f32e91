"""``valign train rl``: reinforce a chat model."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from valign.checks import UserError, close_to, option
from valign.cli.common import TableOptions, out
from valign.cli.early import TUNINGS, refuse_chat_folder
from valign.cli.options import configured, record, refuse_given, rest_of

if TYPE_CHECKING:
    from valign.data.chats.reward_prompts import RewardPrompt
    from valign.models.language.loading import LoadedChat
    from valign.training.tasks.reinforce.run import RewardSources

NOT_OF_DPO = ("group", "clip", "loss", "temperature", "answer_tokens", "batch_size")  # of answers that are sampled
WORLD = "chat"  # whose prompts, rewards and models have names

ChatFolder = Annotated[str, Option("--model", "-m", help="folder of a chat model, or chat/STAGE of the chat world")]
RunFolder = Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")]
Adapter = Annotated[str, Option("--adapter", "-a", help="ADAPTER[+OPTIMIZER], e.g. lora or full")]
Targets = Annotated[list[str], Option(help="ending of linear modules to adapt, e.g. q_proj; repeatable; default by architecture")]
Device = Annotated[str, Option(help="auto, cpu, cuda, ...")]


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """Where prompts and scores come from."""

    reward: str = option(
        "", help="helpfulness: chat, chat-right, safety, format, refusal, demonstration, or the folder of a reward model"
    )
    cost: str = option("", help="harm, above 0 where harmful: chat, or the folder of a model with a scalar head")
    preferences: str = option(
        "",
        help="to learn reward and cost from: chat, or a table with more_helpful_response_id and safer_response_id",
    )
    preference_count: int = option(600, help="of the chat world's pairs", low=2, rare=True, needs={"preferences": ("chat",)})
    prompt_count: int = option(600, help="of the chat world's prompts", low=6, rare=True)
    ptx_data: Path | None = option(None, help="chats whose supervised loss stands beside the policy's, for safe-rlhf")
    template: Path | None = option(None, help="file with the text around each query, which holds {query}", rare=True)
    scaled: bool = option(True, help="difficulty scaling of dr-irl (off: an ablation)", rare=True)
    tau: float | None = option(None, help="squared gap from which dr-irl drops a prompt; default 9 variances", low=0, rare=True)
    chat: str | None = option(None, help="endpoint or folder of a chat model that drafts missing demonstrations, for dr-irl")
    chat_model: str = option("default", help="model that the endpoint serves", needs={"chat": ()}, rare=True)
    key_env: str | None = option(None, help="environment variable with the endpoint's key", needs={"chat": ()}, rare=True)


RL = configured(
    checks=dict.fromkeys(("--model", "-m"), refuse_chat_folder),
    rest_from=("adapters", "optimizers"),
    named={"--adapter": TUNINGS, "-a": TUNINGS, "--method": ("valign.training.tasks.reinforce.run:METHODS",)},
    rest="the adapter's own, such as rank=8",
    training="valign.training.tasks.reinforce.config:ReinforceConfig",
    rewards=RewardOptions,
    table=TableOptions,
    multiplier="valign.objectives.rewards.safe_rlhf:Multiplier",
    ppo="valign.training.tasks.reinforce.ppo_task:PPOConfig",
    safety="valign.objectives.rewards.alphaalign:VerifiableSafety",
    loss="valign.objectives.rewards.dr_irl:ShadowReward",
    shadow="valign.training.tasks.reinforce.shadow:ShadowConfig",
    scalar="valign.training.tasks.reinforce.scalar_task:ScalarConfig",
    typed={"multiplier": ("limit",), "ppo": (), "safety": (), "loss": (), "shadow": ("rounds",), "scalar": ("scalar_steps",)},
)
EXAMPLE = (
    "example: valign train rl --method alphaalign --model FOLDER --data prompts.jsonl --reward RM-FOLDER --out runs/aligned   "
    "a limit on harm: valign train rl --method safe-rlhf --model FOLDER --data prompts.jsonl --preferences pairs.jsonl "
    "--limit -0.5 --out runs/safe   "
    "on the chat world: valign train rl --method dr-irl --model chat/base --data chat --reward chat --answer-tokens 48 "
    "--learning-rate 5e-5 --adapter full --out runs/dr-irl"
)


def reinforce_command(
    ctx: Context,
    method: Annotated[str, Option(help="alphaalign, dr-irl, safe-rlhf, grpo-lagrangian (without critics), or plain grpo")],
    model: ChatFolder,
    data: Annotated[str, Option("--data", "-d", help="table of prompts with labels (harmful, category, demonstration), or chat")],
    folder: RunFolder,
    adapter: Adapter = "lora",
    targets: Targets = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Reinforce a chat model: verifiable safety and normalized helpfulness (AlphaAlign), shadow rewards by category (DR-IRL), or
    helpfulness under a limit on expected harm (Safe RLHF). The same command resumes."""
    from valign.checks import check_choice
    from valign.models.language.loading import load_chat
    from valign.objectives.rewards.alphaalign import TEMPLATE, VerifiableSafety
    from valign.objectives.rewards.dr_irl import ShadowReward
    from valign.objectives.rewards.safe_rlhf import Multiplier
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.reinforce.config import ReinforceConfig
    from valign.training.tasks.reinforce.ppo_task import PPOConfig
    from valign.training.tasks.reinforce.run import METHODS, MethodOptions, reinforce
    from valign.training.tasks.reinforce.scalar_task import ScalarConfig
    from valign.training.tasks.reinforce.shadow import ShadowConfig

    check_choice("--method", method, METHODS)
    config, given = record(ctx, ReinforceConfig), record(ctx, RewardOptions)
    _refuse_of_others(ctx, method, data)
    tuning = parse_tuning(adapter, rest_of(ctx))
    world = _environment(given, config.seed) if WORLD in (data, given.reward.split("-")[0], given.cost, given.preferences) else None
    template = given.template.read_text(encoding="utf-8") if given.template else TEMPLATE
    if data == WORLD and given.template is None:
        from valign.worlds.chat.reinforcement import TEMPLATE as template
    options = MethodOptions(
        safety=record(ctx, VerifiableSafety),
        template=template,
        loss=record(ctx, ShadowReward),
        shadow=record(ctx, ShadowConfig),
        scaled=given.scaled,
        tau=given.tau,
        scalar=record(ctx, ScalarConfig),
        multiplier=record(ctx, Multiplier),
        ppo=record(ctx, PPOConfig),
    )
    loaded = load_chat(chat_folder(model), device=device, dtype="float32")
    prompts = _prompts(ctx, data, given, world, folder, method)
    sources = _sources(ctx, given, world, loaded, method)
    result = reinforce(loaded, prompts, folder, method, tuning, config, options, sources, targets=tuple(targets))
    out.print_json(data=asdict(result))


def _refuse_of_others(ctx: Context, method: str, data: str) -> None:
    """Refuse options that only other methods read, or other prompts."""
    from valign.objectives.rewards.alphaalign import VerifiableSafety
    from valign.objectives.rewards.dr_irl import ShadowReward
    from valign.objectives.rewards.safe_rlhf import Multiplier
    from valign.training.tasks.reinforce.ppo_task import PPOConfig
    from valign.training.tasks.reinforce.run import MethodOptions
    from valign.training.tasks.reinforce.scalar_task import ScalarConfig
    from valign.training.tasks.reinforce.shadow import ShadowConfig

    kinds = {
        "safety": VerifiableSafety,
        "loss": ShadowReward,
        "shadow": ShadowConfig,
        "scalar": ScalarConfig,
        "multiplier": Multiplier,
        "ppo": PPOConfig,
    }
    read = MethodOptions().recipe(method)
    names = [name for name in ("template", "scaled", "tau") if name not in read]
    names += [] if "multiplier" in read else ["cost", "preferences", "preference_count"]
    names += [] if method == "dr-irl" else ["chat", "chat_model", "key_env"]
    names += [] if method == "safe-rlhf" else ["ptx_data"]
    if method == "grpo-lagrangian":  # the Lagrangian of PPO without its critics
        names += [item.name for item in fields(PPOConfig) if item.name != "fixed_multiplier"]
    refuse_given(ctx, f"with --method {method}", *names, parts=[kind for name, kind in kinds.items() if name not in read])
    if data == WORLD:
        refuse_given(ctx, "on the chat world's own prompts", "chat", "chat_model", "key_env")


DPO = configured(
    checks=dict.fromkeys(("--model", "-m"), refuse_chat_folder),
    rest_from=("adapters", "optimizers"),
    named={"--adapter": TUNINGS, "-a": TUNINGS},
    rest="the adapter's own, such as rank=8",
    training="valign.training.tasks.reinforce.config:ReinforceConfig",
    table=TableOptions,
)
DPO_EXAMPLE = "example: valign train dpo --model FOLDER --data pairs.jsonl --kl 0.1 --learning-rate 5e-7 --out runs/dpo"


def dpo_command(
    ctx: Context,
    model: ChatFolder,
    data: Annotated[Path, Option("--data", "-d", help="table of prompt, chosen and rejected")],
    folder: RunFolder,
    adapter: Adapter = "lora",
    targets: Targets = [],  # noqa: B006
    device: Device = "auto",
) -> None:
    """Direct preference optimization of a chat model on pairs of answers; --kl is its beta, --prompts-per-step its pairs.
    The same command resumes."""
    from valign.data.chats import read_chat_pairs
    from valign.models.language.loading import load_chat
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.reinforce.config import ReinforceConfig
    from valign.training.tasks.reinforce.run import prefer

    refuse_given(ctx, "on pairs of answers, for none is sampled", *NOT_OF_DPO)
    config, tuning = record(ctx, ReinforceConfig), parse_tuning(adapter, rest_of(ctx))
    pairs = read_chat_pairs(data, record(ctx, TableOptions).reading())
    loaded = load_chat(chat_folder(model), device=device, dtype="float32")
    out.print_json(data=asdict(prefer(loaded, pairs, folder, tuning, config, targets=tuple(targets))))


@dataclass(frozen=True, kw_only=True)
class ConfigOptions:
    """What the configs name."""

    policy: str = option("default", help="policy whose categories configs may allow: default or a YAML file")
    world_prompts: int = option(400, help="of the chat world's judged prompts", low=8, rare=True)


COSALIGN = configured(
    checks=dict.fromkeys(("--model", "-m"), refuse_chat_folder),
    cosalign="valign.recipes.cosalign:CosalignConfig",
    training="valign.training.tasks.reinforce.config:ReinforceConfig",
    error="valign.objectives.preference.cosa:ConfigError",
    configs=ConfigOptions,
    table=TableOptions,
    typed={"error": ()},
)
COSALIGN_EXAMPLE = (
    "example: valign train cosalign --model FOLDER --data judged.jsonl --kl 0.1 --out runs/configs   "
    "on the chat world: valign train cosalign --model chat/aligned --data chat --sft-steps 40 --sft-learning-rate 1e-4 --kl 0.1 "
    "--steps 40 --prompts-per-step 32 --learning-rate 5e-5 --out runs/configs"
)


def cosalign_command(
    ctx: Context,
    model: ChatFolder,
    data: Annotated[str, Option("--data", "-d", help="table of prompts with risks and judged answers, or chat")],
    folder: RunFolder,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Teach a chat model to follow safety configs in its system prompt (CoSAlign): SFT on preferred answers, then DPO.

    --kl is DPO's beta, --prompts-per-step its pairs. The same command resumes."""
    from valign.data.chats.config_prompts import config_text
    from valign.data.chats.judged_answers import read_judged_prompts
    from valign.objectives.preference.cosa import ConfigError
    from valign.policy import load_policy
    from valign.recipes.cosalign import CosalignConfig, config_pairs, recipe, train_cosalign
    from valign.training.engine.tuning import parse_tuning
    from valign.training.tasks.reinforce.config import ReinforceConfig

    refuse_given(ctx, "on pairs of answers, for none is sampled", *NOT_OF_DPO)
    config, dpo, given = record(ctx, CosalignConfig), record(ctx, ReinforceConfig), record(ctx, ConfigOptions)
    if data == WORLD:
        refuse_given(ctx, "on the chat world's own prompts", "policy", parts=(TableOptions,))
        from valign.worlds.chat.config_following import judged_prompts, write_config
        from valign.worlds.chat.configs import TAUGHT

        prompts, write = judged_prompts(given.world_prompts, dpo.seed), write_config
        categories: tuple[str, ...] = TAUGHT
    else:
        refuse_given(ctx, "beside prompts of your own", "world_prompts")
        known = {category.id: f"{category.title}, {category.description}" for category in load_policy(given.policy).categories}
        prompts, categories = read_judged_prompts(Path(data), record(ctx, TableOptions).reading()), tuple(known)
        write = lambda allowed, draws: config_text(allowed, known, draws)  # noqa: E731
    made = config_pairs(prompts, categories, write, error=record(ctx, ConfigError), configs=config.configs, seed=dpo.seed)
    result = train_cosalign(chat_folder(model), made, folder, parse_tuning("full"), config, dpo, device=device)
    out.print_json(data=recipe(made, result))


def chat_folder(name: str) -> Path:
    """A bundled model of the chat world by ``chat/STAGE``, otherwise a folder."""
    world, _, stage = name.partition("/")
    if world == WORLD and not Path(name).exists():
        from valign.worlds.chat import model_folder

        return model_folder(stage or "aligned")
    return Path(name)


def _environment(given: RewardOptions, seed: int) -> Any:
    from valign.worlds.chat.reinforcement import ChatEnvironment

    return ChatEnvironment(given.prompt_count, seed)


def _prompts(ctx: Context, data: str, given: RewardOptions, world: Any, folder: Path, method: str) -> "list[RewardPrompt]":
    """The prompts; with a chat model, demonstrations that are missing are drafted once, into ``demonstrations.json``."""
    from valign.data.chats.reward_prompts import read_reward_prompts
    from valign.training.tasks.reinforce.shadow import drafted_into

    if data == WORLD:
        return list(world.prompts)
    prompts = read_reward_prompts(Path(data), record(ctx, TableOptions).reading())
    if given.chat is None or method != "dr-irl":
        return prompts
    from valign.cli.common import resolve_chat

    writer = resolve_chat(given.chat, model=given.chat_model, key_env=given.key_env)
    return drafted_into(folder / "demonstrations.json", prompts, lambda text: writer.complete([{"role": "user", "content": text}]))


def _sources(ctx: Context, given: RewardOptions, world: Any, loaded: "LoadedChat", method: str) -> "RewardSources":
    from valign.data.chats import read_chats
    from valign.data.chats.dual_preferences import read_dual_preferences
    from valign.models.files.tensor_fingerprint import fingerprint_tensors
    from valign.models.language.scalar import load_scalar
    from valign.objectives.rewards import REWARDS
    from valign.training.tasks.reinforce.run import RewardSources

    exact: dict[str, dict[str, Callable[..., Any]]] = {"reward": {}, "cost": {}}
    if world is not None:
        exact = {"reward": {WORLD: world.helpfulness, f"{WORLD}-right": world.rightness}, "cost": {WORLD: world.cost}}
    named: dict[str, dict[str, Any]] = {"reward": exact["reward"], "cost": exact["cost"]}
    found: dict[str, Any] = {"names": {}}
    for what, place in (("reward", given.reward), ("cost", given.cost)):
        if not place:
            continue
        if place in named[what]:
            found[what], found["names"][what] = named[what][place], place
        elif what == "reward" and place in REWARDS:
            found[what], found["names"][what] = REWARDS[place], place
        elif (Path(place) / "config.json").exists() or "/" in place:
            model = load_scalar(place, loaded, what=f"--{what}")
            found[f"{what}_model"], found["names"][what] = model, fingerprint_tensors(model.model.state_dict())
        else:
            known = [*named[what], *(REWARDS if what == "reward" else ()), "or a folder of a model with a scalar head"]
            raise UserError(f"--{what} must be one of {', '.join(known)}; got {place!r}.{close_to(place, known)}")
    reading = record(ctx, TableOptions).reading()
    if given.preferences:
        drawn = given.preferences == WORLD
        found["preferences"] = (
            world.preferences(given.preference_count, 0)
            if drawn
            else read_dual_preferences(Path(given.preferences), reading.beside("preferences"))
        )
    if given.ptx_data is not None:
        found["ptx"] = read_chats(given.ptx_data, reading.beside("ptx-data"))
    if method == "dr-irl":
        found["encoder"] = _encoder()
    return RewardSources(**found)


def _encoder() -> Any:
    import torch

    from valign.models.encoders.minilm import MiniLM

    encoder = MiniLM()
    return lambda texts: torch.from_numpy(encoder.encode(list(texts)))
