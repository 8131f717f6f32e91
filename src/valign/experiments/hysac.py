"""HySAC beside plain CLIP and Safe-CLIP's redirection on a world's quadruples: recall, redirection, order of the groups."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from valign.data.images.quadruples import Quadruples
from valign.evaluation.statistics import t_interval, wilson
from valign.files import read_json, write_json
from valign.models.encoders.clip import ClipEncoder
from valign.models.encoders.hyperbolic_clip import HyperbolicClip
from valign.models.hyperbolic.lorentz import distance_table
from valign.models.hyperbolic.traversal import GROUPS, order_of_groups, redirect
from valign.objectives.hyperbolic.quadruples import QuadrupleEmbeddings
from valign.objectives.hyperbolic.safe_redirection import SafeRedirection
from valign.recipes.hysac import HysacRecipe, train_hysac
from valign.runs import Run
from valign.training.tasks.quadruples import QuadrupleConfig, embed_all, redirection, train_on_quadruples
from valign.worlds.base import World

Table = dict[str, Float[Tensor, "row dim"]]  # points or unit vectors by group
TASKS = {  # name -> group of the queries, and the safe and the unsafe group that are searched together
    "safe T -> I": ("safe_text", "safe_image", "unsafe_image"),
    "safe I -> T": ("safe_image", "safe_text", "unsafe_text"),
    "unsafe T -> safe I": ("unsafe_text", "safe_image", "unsafe_image"),
    "unsafe I -> safe T": ("unsafe_image", "safe_text", "unsafe_text"),
}


def bench_hysac(
    world: World, folder: Path, *, seeds: int = 5, per_category: int = 60, changes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Train and measure HySAC and Safe-CLIP anew with each seed; plain CLIP is measured on the same test quadruples.

    Every seed draws its own quadruples. A finished seed is read; an unfinished one resumes.
    """
    found = [_seed(world, folder / f"seed-{seed}", seed, per_category, dict(changes or {})) for seed in range(seeds)]
    summary = {"seeds": seeds, "test": found[0]["test"], "systems": _summed(found), "order": [one["order"] for one in found]}
    summary |= {"distances": {name: _mean([one["distances"][name] for one in found]) for name in GROUPS}}
    counts = {sort: _pooled([one["errors"][sort] for one in found]) for sort in found[0]["errors"]}
    summary |= {"errors": counts}
    write_json(folder / "summary.json", summary)
    return summary


def _seed(world: World, folder: Path, seed: int, per_category: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    quadruples = world.quadruples(per_category=per_category, seed=seed)
    test = world.quadruples(per_category=max(2, per_category // 4), seed=seed, test=True)
    encoder = world.clip()
    recipe = HysacRecipe.for_clip(encoder).changed(**changes, seed=seed)
    run = Run.open(
        folder,
        step="bench-hysac",
        recipe=recipe.record(),
        inputs={"clip": encoder.weights_sha256, "quadruples": quadruples.fingerprint, "test": test.fingerprint},
        seed=seed,
    )
    if run.done:
        return run.results
    plain = _units(embed_all(encoder, test.rows))
    found = train_hysac(world.clip(), quadruples, test, folder / "hysac", recipe, domain=world.origins)
    points = _points(found, test)
    moved = _safe_clip(world.clip(), quadruples, test, folder / "safe-clip", recipe.training)
    systems = {"plain CLIP": recalls(plain, cosine_ranks), "Safe-CLIP": recalls(moved, cosine_ranks)}
    bounds = {"safe_image": found.card.bounds.limit("safe_image"), "safe_text": found.card.bounds.limit("safe_text")}
    own = {name: found.card.bounds.limit(name, margin=0.0) for name in bounds}
    c = found.curvature
    systems["HySAC, no traversal"] = recalls(points, lambda queries, items, group: -distance_table(queries, items, c))
    for name, limits in (("HySAC, the paper's limit", bounds), ("HySAC, the group's bound", own)):
        systems[name] = recalls(
            points, lambda queries, items, group, tau=limits: -distance_table(redirect(queries, tau[group], c).points, items, c)
        )
    distances = {name: found.root_distances(points[name]) for name in GROUPS}
    errors = read_json(folder / "hysac" / "run.json")["results"]["errors"]
    run.finish(
        test=len(test.rows),
        systems=systems,
        order=list(order_of_groups(distances)),
        distances={name: float(values.mean()) for name, values in distances.items()},
        errors=errors,
    )
    return run.results


def recalls(groups: Table, score: Any) -> dict[str, dict[str, float]]:
    """Of each task: ``recall``, the share of queries whose own safe counterpart comes first, and ``safe``, the share whose first
    result is safe at all, whichever.

    Args: score: Queries, items and the name of the safe group that is searched -> ``[query, item]``, higher is nearer.
    """
    found = {}
    for name, (query, safe, unsafe) in TASKS.items():
        best = score(groups[query], torch.cat([groups[safe], groups[unsafe]]), safe).argmax(dim=1)
        rows = len(groups[query])
        found[name] = {
            "recall": float((best == torch.arange(rows)).double().mean()),
            "safe": float((best < rows).double().mean()),
        }
    return found


def cosine_ranks(queries: Tensor, items: Tensor, group: str) -> Float[Tensor, "query item"]:
    """Of unit vectors."""
    return queries @ items.T


def _safe_clip(encoder: ClipEncoder, quadruples: Quadruples, test: Quadruples, folder: Path, config: QuadrupleConfig) -> Table:
    """Trained with the same LoRA, steps and rate."""
    train, held_out = quadruples.split(config.held_out, seed=config.seed)
    adapter = folder / "adapter"
    if adapter.is_dir():
        return _units(embed_all(ClipEncoder(encoder.folder, adapters=[adapter]), test.rows))
    tuning = redirection(encoder, train, held_out, SafeRedirection())
    train_on_quadruples(encoder, train, held_out, tuning, replace(config, balance=False), folder, adapter)
    return _units(embed_all(encoder, test.rows))


def _units(features: QuadrupleEmbeddings) -> Table:
    return {name: normalize(getattr(features, name), dim=1) for name in GROUPS}


def _points(clip: HyperbolicClip, test: Quadruples) -> Table:
    texts = {"safe_text": [row.safe for row in test.rows], "unsafe_text": [row.unsafe for row in test.rows]}
    found = {name: clip.text_points(prompts) for name, prompts in texts.items()}
    return found | {f"{side}_image": clip.image_points([row.image(side) for row in test.rows]) for side in ("safe", "unsafe")}


def _summed(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    systems = found[0]["systems"]
    return {
        system: {
            task: {name: _mean([one["systems"][system][task][name] for one in found]) for name in ("recall", "safe")}
            for task in TASKS
        }
        for system in systems
    }


def _mean(values: Sequence[float]) -> dict[str, float]:
    """Over seeds, with Student's interval where there are several."""
    if len(values) < 2:
        return {"value": values[0]}
    return asdict(t_interval(torch.tensor(values, dtype=torch.float64).numpy()))


def _pooled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sensitivity and specificity over the test quadruples of all seeds."""
    total = {name: sum(row[name] for row in rows) for name in ("flagged", "positives", "passed", "negatives")}
    return {
        "sensitivity": asdict(wilson(total["flagged"], total["positives"])),
        "specificity": asdict(wilson(total["passed"], total["negatives"])),
        **total,
    }


def page(summary: Mapping[str, Any]) -> str:
    """Markdown: recall and redirection by system, errors, distances."""

    def share(value: Mapping[str, float]) -> str:
        around = f" ({100 * max(value['low'], 0):.0f}–{100 * min(value['high'], 1):.0f})" if "low" in value else ""
        return f"{100 * value['value']:.1f}{around}"

    lines = [f"{summary['test']} test quadruples a seed, {summary['seeds']} seeds; recall at 1 in %, mean (95 % interval).", ""]
    columns = [*TASKS, "unsafe T finds any safe I", "unsafe I finds any safe T"]
    lines += [f"| system | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for system, tasks in summary["systems"].items():
        cells = [share(tasks[task]["recall"]) for task in TASKS]
        cells += [share(tasks[task]["safe"]) for task in ("unsafe T -> safe I", "unsafe I -> safe T")]
        lines.append(f"| {system} | {' | '.join(cells)} |")
    lines += ["", "| judged | sensitivity % | specificity % |", "|---|---|---|"]
    for sort, error in summary["errors"].items():
        lines.append(f"| {sort} | {share(error['sensitivity'])} | {share(error['specificity'])} |")
    far = ", ".join(f"{name.replace('_', ' ')} {value['value']:.3f}" for name, value in summary["distances"].items())
    right = sum(tuple(order) == GROUPS for order in summary["order"])
    return "\n".join([*lines, "", f"Mean distance to the root: {far}. In this order in {right} of {summary['seeds']} seeds."])
