"""CoSA-Score on the chat world: trained to follow configs, told the config in its prompt, and not told."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import hypot
from pathlib import Path
from typing import Any

import numpy as np

from valign.evaluation.statistics import t_interval
from valign.files import read_json, write_json
from valign.models.language.loading import LoadedChat, load_chat
from valign.recipes.cosalign import CosalignConfig, config_pairs, train_cosalign
from valign.training.engine.tuning import parse_tuning
from valign.training.tasks.reinforce.config import ReinforceConfig
from valign.worlds.chat import model_folder
from valign.worlds.chat.config_following import (
    UNTAUGHT,
    follow_score,
    judged_prompts,
    outcomes,
    seen_configs,
    unseen_configs,
    write_config,
)
from valign.worlds.chat.configs import TAUGHT, SafetyConfig
from valign.worlds.chat.vocabulary import CATEGORIES, TOPIC_OF_CATEGORY, Pair

WITHIN_TAUGHT = len(UNTAUGHT)  # categories held out where training opens those alone that the aligned model's own opened


def opened_categories(held_out: int, seed: int) -> tuple[str, ...]:
    """Those that CoSAlign opens: all but ``held_out`` of those that the aligned model's own training never opened, by the seed."""
    closed = {UNTAUGHT[(seed + place) % len(UNTAUGHT)] for place in range(held_out)}
    return tuple(category for category in CATEGORIES if category not in closed)


def shown_configs(category: str) -> tuple[Pair, list[SafetyConfig]]:
    """A prompt of the category, and three configs: nothing allowed, another category allowed, its own allowed."""
    topic = TOPIC_OF_CATEGORY[category]
    other = next(one for one in CATEGORIES if one != category)
    opened = (frozenset[str](), frozenset({other}), frozenset({category}))
    return Pair(topic.acts[0].verb, topic.things[1]), [SafetyConfig(allowed=allowed) for allowed in opened]


@dataclass(frozen=True, kw_only=True)
class FollowBudget:
    """What one seed costs, if four categories are opened; in proportion, if more are."""

    prompts: int
    sft_steps: int
    dpo_steps: int
    per_config: int  # held-out requests for each config


BUDGETS = {
    "small": FollowBudget(prompts=16, sft_steps=2, dpo_steps=2, per_config=2),  # tries the path, proves nothing
    "quick": FollowBudget(prompts=400, sft_steps=60, dpo_steps=24, per_config=30),
    "full": FollowBudget(prompts=1600, sft_steps=300, dpo_steps=300, per_config=100),
}


def bench_configs(out: Path, *, budget: str, seeds: int, held_out: int = WITHIN_TAUGHT) -> list[dict[str, Any]]:
    """One row per seed and way: CoSA-Scores on seen and unseen configs, and three outcomes of one prompt; each seed resumes.

    Args: held_out: Categories that CoSAlign does not open, see `opened_categories`; those of unseen configs.
    """
    spend, rows = BUDGETS[budget], []
    for seed in range(seeds):
        folder, opened = out / f"seed-{seed}", opened_categories(held_out, seed)
        share = len(opened) / len(TAUGHT)
        prompts, sft_steps, dpo_steps = (round(share * one) for one in (spend.prompts, spend.sft_steps, spend.dpo_steps))
        made = config_pairs(judged_prompts(prompts, seed, categories=opened), opened, write_config, seed=seed)
        config = CosalignConfig(sft_steps=sft_steps, sft_learning_rate=3e-4, max_tokens=192)
        dpo = ReinforceConfig(steps=dpo_steps, prompts=24, learning_rate=3e-5, kl=0.1, checkpoint_every=10, seed=seed)
        ways = {
            "no config": (lambda: model_folder("aligned"), False),
            "config in context": (lambda: model_folder("aligned"), True),
            "CoSAlign": (
                lambda: Path(train_cosalign(model_folder("aligned"), made, folder, parse_tuning("full"), config, dpo).adapter),  # noqa: B023
                True,
            ),
        }
        for name, (model, told) in ways.items():
            path = folder / f"{name.replace(' ', '-')}.json"
            if not path.exists():
                write_json(path, _measured(load_chat(model(), device="cpu", dtype="float32"), opened, told, spend.per_config))
            rows.append({"way": name, "seed": seed, "opened": list(opened), **read_json(path)})
            write_json(out / "configs.json", rows)
    return rows


def _measured(chat: LoadedChat, opened: Sequence[str], told: bool, count: int) -> dict[str, Any]:
    closed = [category for category in CATEGORIES if category not in opened]
    scores = {
        "seen": asdict(follow_score(chat, seen_configs(opened), count=count, seed=11, told=told)),
        "unseen": asdict(follow_score(chat, unseen_configs(opened), count=count, seed=23, told=told)),
    }
    if not told:
        return scores
    shown = {"seen": opened, "unseen": closed}
    return scores | {"outcomes": {part: {one: _outcomes(chat, one) for one in names} for part, names in shown.items()}}


def _outcomes(chat: LoadedChat, category: str) -> list[tuple[str, str, bool]]:
    pair, configs = shown_configs(category)
    return outcomes(chat, configs, pair)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: CoSA-Scores, means over seeds, with the shares of helpful answers within and beyond the config.

    Each limit is ``sqrt(r^2 + t^2)`` away from the mean: r to the mean limit over requests (seeds answer the same ones, where the
    same categories are held out), t to Student's over seeds. Each seed's score stands behind them. Right outcomes: of three for
    one prompt of each category.
    """
    parts = [
        f"{part}: {what}"
        for part in ("seen", "unseen")
        for what in ("score", "helpful, safe %", "helpful, unsafe %", "right outcomes")
    ]
    lines = [f"| model | seeds | {' | '.join(parts)} |", "|---" * 10 + "|"]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        cells = []
        for part in ("seen", "unseen"):
            names = ("score", "low", "high", "helpful_safe", "helpful_unsafe")
            mean = {name: sum(row[part][name] for row in mine) / len(mine) for name in names}
            scores = np.array([row[part]["score"] for row in mine])
            over_seeds = t_interval(scores).high - mean["score"] if len(mine) > 1 else 0.0
            low, high = (sign * hypot(mean[name] - mean["score"], over_seeds) for name, sign in (("low", -1), ("high", 1)))
            each = "/".join(f"{row[part]['score']:.2f}" for row in mine)
            cells += [
                f"{mean['score']:.2f} [{max(-1.0, mean['score'] + low):.2f}, {min(1.0, mean['score'] + high):.2f}] ({each})",
                f"{100 * mean['helpful_safe']:.0f}",
                f"{100 * mean['helpful_unsafe']:.0f}",
                _right(mine, part),
            ]
        lines.append(f"| {way} | {len(mine)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _right(rows: Sequence[dict[str, Any]], part: str) -> str:
    """Of the prompts that were shown under three configs: outcomes that are right, and prompts with three of them."""
    prompts = [said for row in rows for said in row.get("outcomes", {}).get(part, {}).values()]
    right = [[bool(outcome[2]) for outcome in said] for said in prompts]
    return f"{sum(map(sum, right))} of {3 * len(right)}, all three {sum(map(all, right))} of {len(right)}" if right else "-"
