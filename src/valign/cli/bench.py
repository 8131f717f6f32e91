"""``valign bench``: the standing comparisons whose tables stand in the documentation."""

from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from valign.checks import check_choice
from valign.cli.common import resolve_clip, resolve_detector, resolve_model

app = Typer(no_args_is_help=True, help="Standing comparisons on the shapes world; the documentation's tables come from them.")


@app.callback()
def bench() -> None:
    """Standing comparisons on the shapes world; the documentation's tables come from them."""


@app.command(epilog="example: valign bench alignguard -o runs/bench")
def alignguard(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")] = Path("runs/bench"),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "full",
    seed: Annotated[int, Option(help="of every draw in the run")] = 0,
) -> None:
    """Seven experts, Co-Merge and the other merges, one joint LoRA, negative prompt and Safe Latent Diffusion."""
    from valign.cli.evaluate import print_summary
    from valign.policy import load_policy
    from valign.recipes.bench_alignguard import bench_alignguard
    from valign.recipes.shapes_budgets import BUDGETS

    check_choice("budget", budget, BUDGETS)
    model, oracle, clip = resolve_model("shapes"), resolve_detector("oracle"), resolve_clip("shapes")
    summary = bench_alignguard(model, load_policy("shapes"), oracle, clip, folder, budget=budget, seed=seed)  # type: ignore[arg-type]
    print_summary(summary, folder / "evaluation")


@app.command(epilog="example: valign bench methods -o runs/methods --budget quick --seeds 3")
def methods(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path("runs/methods"),
    budget: Annotated[str, Option(help="small (tries the path, proves nothing), quick or full")] = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 3,
) -> None:
    """Free baselines, UCE, ESD, plain DPO, AlignGuard, LiVO and the guard, over several seeds, in one report."""
    from valign.cli.evaluate import print_summary
    from valign.policy import load_policy
    from valign.recipes.bench_methods import bench_methods
    from valign.recipes.methods_trained import methods_config
    from valign.recipes.shapes_budgets import BUDGETS

    check_choice("budget", budget, BUDGETS)
    model, oracle, clip = resolve_model("shapes"), resolve_detector("oracle"), resolve_clip("shapes")
    configs = [methods_config(budget, seed=seed) for seed in range(seeds)]  # type: ignore[arg-type]
    summary = bench_methods(model, load_policy("shapes"), oracle, clip, folder, configs)  # type: ignore[arg-type]
    print_summary(summary, folder / "evaluation")
