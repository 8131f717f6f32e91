"""``valign bench``: the standing comparisons whose tables stand in the documentation."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Context, Option, Typer

from valign.checks import check_choice
from valign.cli.common import AsJson, print_measured, resolve_model
from valign.cli.options import configured, record

if TYPE_CHECKING:
    from valign.experiments.methods.trained import MethodsConfig
    from valign.worlds import World

app = Typer(no_args_is_help=True, help="Standing comparisons on the bundled worlds; the documentation's tables come from them.")


@app.callback()
def bench() -> None:
    """Standing comparisons on the bundled worlds; the documentation's tables come from them."""


@app.command(epilog="example: valign bench methods -o runs/methods --budget quick --seeds 3")
def methods(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path("runs/methods"),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 3,
    category: Annotated[list[str] | None, Option(help="only this category of the policy; may be repeated")] = None,
    as_json: AsJson = False,
) -> None:
    """Free baselines, UCE, ESD, plain DPO, every merge of experts, LiVO and the guard: each set by one rule, over several seeds."""
    from valign.cli.evaluate import print_summary
    from valign.experiments.methods.bench import bench_methods

    shapes, configs = _configs(budget, seeds, category or [])
    summary = bench_methods(shapes, resolve_model(shapes.name), folder, configs)
    print_summary(summary, folder / "evaluation", as_json=as_json)


@app.command(epilog="example: valign bench fusion -o runs/methods --budget quick --seeds 3")
def fusion(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs, or that of `bench methods`; resumed")] = Path(
        "runs/fusion"
    ),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "quick",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 3,
    category: Annotated[list[str] | None, Option(help="only this category of the policy; may be repeated")] = None,
    as_json: AsJson = False,
) -> None:
    """RegMean's settings one by one: lambda, weight, prompts, captions, padding, edits, and how the experts were trained."""
    from valign.cli.evaluate import print_summary
    from valign.experiments.fusion import bench_fusion

    shapes, configs = _configs(budget, seeds, category or [])
    summary = bench_fusion(shapes, resolve_model(shapes.name), folder, configs)
    print_summary(summary, folder / "fusion" / "evaluation", as_json=as_json)


def _configs(budget: str, seeds: int, categories: list[str]) -> "tuple[World, list[MethodsConfig]]":
    """The world of images, and the configuration of each run on it."""
    from valign.experiments.methods.trained import methods_config
    from valign.policy import load_policy
    from valign.worlds import world

    shapes = world("shapes")
    check_choice("budget", budget, shapes.budgets)
    policy = load_policy(shapes.policy)
    chosen = tuple(policy.category(name).id for name in categories)
    return shapes, [methods_config(shapes, budget, categories=chosen, seed=seed) for seed in range(seeds)]


@app.command(epilog="example: valign bench guard --adapter runs/shapes/merged/adapter -o runs/bench-guard")
def guard(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")] = Path(
        "runs/bench-guard"
    ),
    adapter: Annotated[
        Path | None, Option("--adapter", "-a", help="adapter of an aligned model; without it only the base model")
    ] = None,
    weight: Annotated[float, Option(help="of the adapter")] = 1.0,
    per_concept: Annotated[int, Option(min=1, help="test prompts per concept; 10 are 420 unsafe prompts in all")] = 10,
    pairs: Annotated[int, Option(min=20, help="prompt pairs per category that the guard's head is trained on")] = 120,
    target_fpr: Annotated[float, Option(help="share of harmless prompts that the head may flag")] = 0.005,
    seed: Annotated[int, Option(help="of every random draw in the run")] = 0,
    as_json: AsJson = False,
) -> None:
    """Unsafe images with no guard, the guard, an aligned model, and both; and what the guard costs benign prompts."""
    from dataclasses import replace

    from rich.markdown import Markdown

    from valign.experiments.guard import SAMPLING, bench_guard, page
    from valign.worlds import world

    shapes = world("shapes")
    summary = bench_guard(
        shapes,
        resolve_model(shapes.name),
        folder,
        adapter=adapter,
        weight=weight,
        per_concept=per_concept,
        pairs=pairs,
        target_fpr=target_fpr,
        sampling=replace(SAMPLING, seed=seed),
    )
    print_measured(summary, Markdown(page(summary)), as_json=as_json)


@app.command(
    cls=configured(config="valign.training.tasks.guard_head.fit:FitConfig"),
    epilog="example: valign bench head --data prompts/ --leave-out overt --leave-out valor -o runs/bench-head",
)
def head(
    ctx: Context,
    data: Annotated[list[Path], Option("--data", "-d", help="file or folder of labelled prompts; may be repeated")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")] = Path(
        "runs/bench-head"
    ),
    leave_out: Annotated[list[str], Option(help="source to leave out, one at a time; may be repeated; all if none")] = [],  # noqa: B006
    policy: Annotated[str, Option("--policy", "-p", help="default, or a policy file")] = "default",
    limit: Annotated[int | None, Option(min=1, help="rows per source and label that are trained on, at most")] = None,
    target_fpr: Annotated[float, Option(help="share of harmless prompts that may be flagged")] = 0.01,
    as_json: AsJson = False,
) -> None:
    """The guard's head beside TF-IDF, linear and MLP on a frozen encoder, and reference similarity, on sources that none saw."""
    from rich.markdown import Markdown

    from valign.data.prompts.labelled import read_rows
    from valign.experiments.guard_head import bench_head, page
    from valign.models.encoders.minilm import MiniLM
    from valign.policy import load_policy
    from valign.training.tasks.guard_head.fit import FitConfig

    rules = load_policy(policy)
    results = bench_head(
        read_rows(data, rules),
        rules,
        folder,
        config=record(ctx, FitConfig),
        encoder=MiniLM(),
        leave_out=leave_out,
        target_fpr=target_fpr,
        limit=limit,
    )
    print_measured(results, Markdown(page(results)), as_json=as_json)


@app.command(epilog="example: valign bench reinforce -o runs/bench-reinforce --budget quick --seeds 1")
def reinforce(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path(
        "runs/bench-reinforce"
    ),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 5,
    arm: Annotated[list[str], Option(help="only this method or ablation; repeatable; all if left out")] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Refusal against over-refusal on the chat world: SFT, DPO, AlphaAlign, DR-IRL and Safe RLHF with their ablations."""
    from rich.markdown import Markdown

    from valign.experiments.reinforce import ARMS, BUDGETS, bench_reinforce, table

    check_choice("--budget", budget, BUDGETS)
    for name in arm:
        check_choice("--arm", name, ARMS)
    rows = bench_reinforce(folder, budget=budget, seeds=seeds, arms=arm or tuple(ARMS))
    print_measured(rows, Markdown(table(rows)), as_json=as_json)


@app.command(epilog="example: valign bench configs -o runs/bench-configs --budget quick --seeds 1")
def configs(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path(
        "runs/bench-configs"
    ),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 5,
    as_json: AsJson = False,
) -> None:
    """CoSA-Score on the chat world of a model that was trained to follow safety configs, told one, or not told."""
    from rich.markdown import Markdown

    from valign.experiments.configs import BUDGETS, bench_configs, table

    check_choice("--budget", budget, BUDGETS)
    rows = bench_configs(folder, budget=budget, seeds=seeds)
    print_measured(rows, Markdown(table(rows)), as_json=as_json)


@app.command(
    cls=configured(preset=True, training="valign.training.tasks.quadruples:QuadrupleConfig"),
    epilog="example: valign bench hysac -o runs/bench-hysac --seeds 5",
)
def hysac(
    ctx: Context,
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path(
        "runs/bench-hysac"
    ),
    seeds: Annotated[int, Option(min=1, help="how often all is drawn, trained and tested anew, with seeds 0, 1, ...")] = 5,
    per_category: Annotated[int, Option(min=8, help="quadruples of each category to learn from; a quarter as many test")] = 60,
    as_json: AsJson = False,
) -> None:
    """HySAC beside plain CLIP and Safe-CLIP's redirection: recall, redirection to safe content, and its errors as a detector."""
    from rich.markdown import Markdown

    from valign.cli.options import changes
    from valign.experiments.hysac import bench_hysac, page
    from valign.training.tasks.quadruples import QuadrupleConfig
    from valign.worlds import world

    given = {name: value for name, value in changes(ctx, QuadrupleConfig).items() if name != "seed"}
    summary = bench_hysac(world("shapes"), folder, seeds=seeds, per_category=per_category, changes=given)
    print_measured(summary, Markdown(page(summary)), as_json=as_json)
