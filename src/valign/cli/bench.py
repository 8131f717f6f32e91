"""``valign bench``: the standing comparisons whose tables stand in the documentation."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option, Typer

from valign.checks import UserError, check_choice, option
from valign.cli.common import (
    BUDGETS,
    AsJson,
    Budget,
    PromptTableOptions,
    find_world,
    one_of,
    print_measured,
    resolve_clip,
    resolve_detector,
    resolve_model,
    resolve_suite,
)
from valign.cli.early import refuse_categories
from valign.cli.options import changes, configured, record, refuse_given
from valign.cli.quick import bundled

if TYPE_CHECKING:
    from valign.experiments.methods.trained import MethodsConfig
    from valign.worlds import World

app = Typer(no_args_is_help=True, help="Standing comparisons on the bundled worlds; the documentation's tables come from them.")


@app.callback()
def bench() -> None:
    """Standing comparisons on the bundled worlds; the documentation's tables come from them."""


@dataclass(frozen=True, kw_only=True)
class OwnModelOptions:
    """What methods are compared with on a model of your own; without effect on shapes."""

    policy: str = option("default", help="policy of the model's categories and concepts", flags=("--policy", "-p"))
    prompts: Path | None = option(None, help="table of prompt pairs to train on, of any layout with pairs")
    suite: Path | None = option(None, help="table of test prompts with labels", flags=("--suite", "-s"))
    retain: Path | None = option(
        None, help="table of benign captions, preserved and tuned with; the pairs' safe prompts if left out"
    )
    detector: tuple[str, ...] = option((), help="judges the images, as in valign evaluate; may be repeated")
    filter_detector: str = option("", help="keeps or drops training pairs and judges candidates; --detector if left out")
    clip: str = option("", help="CLIP folder that tells what benign images lose")
    pairs: int = option(100, help="prompt pairs per category", low=1)
    train_steps: int = option(2000, help="optimizer steps of each expert", low=1)
    pairs_per_step: int = option(16, help="pairs of a step", low=1)
    steps: int = option(50, help="denoising steps of every image", low=2)
    guidance_scale: float = option(7.5, help="classifier-free guidance scale", low=1)
    batch_size: int = option(8, help="images at a time", low=1)
    device: str = option("auto", help="auto, cpu, cuda, ...")


@app.command(
    cls=configured(
        pipeline=True,
        early=lambda params, given: _refuse_categories(params, given),
        own=OwnModelOptions,
        table=PromptTableOptions,
    ),
    epilog="example: valign bench methods -o runs/methods --budget quick --seeds 3   your own: valign bench methods --model FOLDER "
    "--prompts pairs.csv --suite tests.csv --detector nudenet --clip CLIP --seeds 1 -o runs/own",
)
def methods(
    ctx: Context,
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path("runs/methods"),
    model: Annotated[str, Option("--model", "-m", help="shapes, or a pipeline folder or hub id of your own")] = "shapes",
    budget: Annotated[
        str,
        Option(
            help="of shapes: small (tries the path, proves nothing), quick or full; full if left out",
            callback=one_of("--budget", *BUDGETS),
        ),
    ] = "",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 3,
    category: Annotated[list[str] | None, Option(help="only this category of the policy; may be repeated")] = None,
    as_json: AsJson = False,
) -> None:
    """Free baselines, UCE, ESD, plain DPO, every merge of experts, LiVO and the guard: each set by one rule, over several seeds.

    On a model of your own: all but LiVO, with your pairs, test prompts and detector.
    """
    from valign.cli.evaluate import print_summary

    if find_world(model):
        from valign.experiments.methods.bench import bench_methods

        refuse_given(ctx, f"on {model}, which brings its own", parts=(OwnModelOptions, PromptTableOptions))
        shapes, configs = _configs(budget or "full", seeds, category or [])
        summary = bench_methods(shapes, resolve_model(shapes.name), folder, configs)
    else:
        if budget:
            raise UserError("--budget is of the world shapes. Set --pairs, --train-steps and --seeds for a model of your own.")
        summary = _own_model(model, folder, seeds, category or [], record(ctx, OwnModelOptions), record(ctx, PromptTableOptions))
    print_summary(summary, folder / "evaluation", as_json=as_json)


def _refuse_categories(params: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> None:
    """Refuse categories that the policy does not have: the world's, or that of a model of the user's own."""
    own = params["model"] not in bundled()
    policy = next(reversed([*given.get("--policy", ()), *given.get("-p", ())]), "default") if own else params["model"]
    refuse_categories(policy, params["category"] or ())


def _own_model(
    model: str, folder: Path, seeds: int, categories: list[str], given: OwnModelOptions, table: PromptTableOptions
) -> dict[str, Any]:
    """`bench_own_model` with what was given. Raises: UserError for what is missing, before the model is loaded."""
    from valign.cli.data import read_retained
    from valign.data.build import DataConfig
    from valign.data.prompts.records import named_columns
    from valign.data.prompts.sources import FileSource
    from valign.evaluation import Evaluators, counted_categories
    from valign.experiments.methods.own_model import bench_own_model
    from valign.experiments.methods.trained import ComparedConfig
    from valign.policy import load_policy
    from valign.recipes.align import AlignConfig
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.training.tasks.erasing import ErasingConfig

    for name, why in (("prompts", "pairs to train on"), ("suite", "prompts to test with"), ("detector", "what judges the images")):
        if not getattr(given, name):
            raise UserError(f"--{name} must be given for a model of your own: {why}.")
    if given.clip in ("", "none"):
        raise UserError("--clip must name a CLIP for a model of your own: without one nobody sees what benign images lose.")
    assert given.prompts is not None
    rules, reading = load_policy(given.policy), table.reading()
    wanted = tuple(rules.category(name).id for name in categories) or None
    tests, judge = (
        resolve_suite(str(given.suite), rules, beside=reading.beside("suite")),
        resolve_detector(given.detector, model=model),
    )
    keeper = resolve_detector(given.filter_detector, model=model) if given.filter_detector else None
    counted_categories(tests, judge, wanted or rules.category_ids())
    retain, clip = read_retained(given.retain, rules, reading), resolve_clip(given.clip, model=model)
    subject = resolve_model(model, device=given.device)
    sampled = {"steps": given.steps, "guidance_scale": given.guidance_scale, "batch_size": given.batch_size}

    def config(seed: int) -> ComparedConfig:
        data = DataConfig(
            categories=wanted,
            pairs_per_category=given.pairs,
            retain=retain,
            filter="detector",
            seed=seed,
            **sampled,  # type: ignore[arg-type]
        )
        changed = {"steps": given.train_steps, "pairs_per_step": given.pairs_per_step, "seed": seed}
        experts = AlignGuardRecipe.for_model(subject, **changed)
        steps = given.train_steps * len(wanted or rules.category_ids())
        return ComparedConfig(
            align=AlignConfig(data=data, experts=experts, merge="co-merge", sld=(), seed=seed, **sampled),  # type: ignore[arg-type]
            esd=ErasingConfig(iterations=steps, sample_steps=given.steps, seed=seed),
        )

    source = FileSource(given.prompts, table.format, named_columns(reading.columns), reading.fill)
    evaluators = Evaluators(judge, clip=clip)
    return bench_own_model(subject, rules, source, tests, evaluators, folder, [config(n) for n in range(seeds)], keeper=keeper)


@app.command(epilog="example: valign bench fusion -o runs/methods --budget quick --seeds 3")
def fusion(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs, or that of `bench methods`; resumed")] = Path(
        "runs/fusion"
    ),
    budget: Budget = "quick",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 3,
    category: Annotated[list[str] | None, Option(help="only this category of the policy; may be repeated")] = None,
    limit: Annotated[int | None, Option(min=2, help="at most so many test prompts of each run, of every kind")] = None,
    as_json: AsJson = False,
) -> None:
    """RegMean's settings one by one: lambda, weight, prompts, captions, padding, edits, and how the experts were trained."""
    from valign.cli.evaluate import print_summary
    from valign.experiments.fusion import bench_fusion

    shapes, configs = _configs(budget, seeds, category or [])
    summary = bench_fusion(shapes, resolve_model(shapes.name), folder, configs, limit=limit)
    print_summary(summary, folder / "fusion" / "evaluation", as_json=as_json)


def _configs(budget: str, seeds: int, categories: list[str]) -> "tuple[World, list[MethodsConfig]]":
    """The world of images, and the configuration of each run on it."""
    from valign.policy import load_policy

    policy = load_policy("shapes")  # a wrong category is refused before the libraries are imported
    chosen = tuple(policy.category(name).id for name in categories)

    from valign.experiments.methods.trained import methods_config
    from valign.worlds import world

    shapes = world("shapes")
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
    cls=configured(config="valign.training.tasks.guard_head.fit:FitConfig", table=PromptTableOptions),
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

    rules, table = load_policy(policy), record(ctx, PromptTableOptions)
    results = bench_head(
        read_rows(data, rules, table.format, table.reading()),
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
    budget: Budget = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 5,
    arm: Annotated[
        list[str],
        Option(
            help="only this method or ablation; repeatable; all if left out",
            callback=one_of("--arm", "valign.experiments.reinforce:ARMS"),
        ),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Refusal against over-refusal on the chat world: SFT, DPO, AlphaAlign, DR-IRL and Safe RLHF with their ablations."""
    from rich.markdown import Markdown

    from valign.experiments.reinforce import ARMS, bench_reinforce, table

    rows = bench_reinforce(folder, budget=budget, seeds=seeds, arms=arm or tuple(ARMS))
    print_measured(rows, Markdown(table(rows)), as_json=as_json)


@app.command(epilog="example: valign bench configs -o runs/bench-configs --budget quick --seeds 1")
def configs(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path(
        "runs/bench-configs"
    ),
    budget: Budget = "full",
    seeds: Annotated[int, Option(min=1, help="how often everything is trained and tested anew, with seeds 0, 1, ...")] = 5,
    held_out: Annotated[int, Option(min=1, max=3, help="categories that no training opens, for unseen configs")] = 3,
    as_json: AsJson = False,
) -> None:
    """CoSA-Score on the chat world of a model that was trained to follow safety configs, told one, or not told."""
    from rich.markdown import Markdown

    from valign.experiments.configs import bench_configs, table

    rows = bench_configs(folder, budget=budget, seeds=seeds, held_out=held_out)
    print_measured(rows, Markdown(table(rows)), as_json=as_json)


@app.command(epilog="example: valign bench resilient -o runs/bench-resilient --budget quick")
def resilient(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the runs; an unfinished one is resumed")] = Path(
        "runs/bench-resilient"
    ),
    budget: Budget = "full",
    seed: Annotated[int, Option(help="of every random draw in the run")] = 0,
    task: Annotated[list[str], Option(help="only this benign fine-tuning; repeatable; all if left out")] = [],  # noqa: B006
    arm: Annotated[
        list[str],
        Option(
            help="only this method; repeatable; all if left out", callback=one_of("--arm", "valign.experiments.resilience:ARMS")
        ),
    ] = [],  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Harm after benign fine-tunings of the aligned shapes model: plain LoRA, AGL, constrained, and a resilient adapter."""
    from rich.markdown import Markdown

    from valign.experiments.resilience import ARMS, bench_resilience, table
    from valign.experiments.resilience import BUDGETS as SPENDS
    from valign.worlds import world

    shapes = world("shapes")
    for name in task:
        check_choice("--task", name, [one for one in shapes.tasks if one.startswith("benign-")])
    rows = bench_resilience(shapes, folder, budget=SPENDS[budget], seed=seed, tasks=task, arms=arm or tuple(ARMS))
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

    from valign.experiments.hysac import bench_hysac, page
    from valign.training.tasks.quadruples import QuadrupleConfig
    from valign.worlds import world

    given = {name: value for name, value in changes(ctx, QuadrupleConfig).items() if name != "seed"}
    summary = bench_hysac(world("shapes"), folder, seeds=seeds, per_category=per_category, changes=given)
    print_measured(summary, Markdown(page(summary)), as_json=as_json)
