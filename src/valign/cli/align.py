"""``valign align`` and ``valign quickstart``: the whole chain from policy to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Context, Option

from valign.checks import UserError, refuse_idle
from valign.cli.common import (
    BUDGETS,
    AsJson,
    EvaluatorOptions,
    err,
    example,
    one_of,
    origins_of,
    out,
    resolve_clip,
    resolve_detector,
    resolve_fidelity,
    resolve_model,
    resolve_suite,
)
from valign.cli.data import Retain, SourceOptions, read_retained
from valign.cli.early import refuse_categories
from valign.cli.fitting import EstimateOnly, diffusion_folder, diffusion_run, fit
from valign.cli.options import changes, configured, record
from valign.cli.quick import FROM_ELSEWHERE
from valign.memory import COMMON, MemoryConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from valign.policy import Policy
    from valign.recipes.footprints import DiffusionPhases, Phase
    from valign.worlds import World

SHARED = ("steps", "guidance_scale", "seed", "batch_size")
NO_DETECTOR = (
    "--detector must name what judges the images, got nothing. Name one: oracle, nudenet, safety-checker=FOLDER ... "
    "(`valign detector list`)."
)
PER_CONCEPT = 6  # of a world's tuning prompts; --search takes what it needs of them

Budget = Annotated[
    str,
    Option(
        help="small (a minute, proves nothing), quick (minutes) or full (7 experts: --category for each)",
        callback=one_of("--budget", *BUDGETS),
    ),
]


@example("valign quickstart -o runs/quickstart")
def quickstart(
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")] = Path(
        "runs/quickstart"
    ),
    categories: Annotated[
        list[str], Option("--categories", "--category", help="category to align; may be repeated; three if left out")
    ] = [],  # noqa: B006
    budget: Budget = "quick",
    seed: Annotated[int, Option(help="random seed of the run")] = 0,
    as_json: AsJson = False,
) -> None:
    """Align the bundled miniature model and see the proof: the whole chain in minutes, on a laptop's CPU."""
    from valign.policy import load_policy

    policy = load_policy("shapes")  # a wrong category is refused before the libraries are imported
    chosen = tuple(policy.category(name).id for name in categories)

    from valign.cli.evaluate import print_summary
    from valign.recipes.quickstart import quickstart as run
    from valign.worlds import world

    shapes = world("shapes")
    summary = run(shapes, resolve_model(shapes.name), folder, budget=budget, categories=chosen, seed=seed)
    print_summary(summary, folder / "evaluation", as_json=as_json)
    sheet = folder / "data" / "images" / "contact_sheet.png"
    err.print(f"the adapter: {folder / 'merged' / 'adapter'}   its training pairs: {sheet}", style="dim")


@example(
    "valign align --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompts pairs.csv --detector nudenet -o runs/sd15",
    cls=configured(
        pipeline=True,
        named={"--merge": ("joint", "valign.merging:MERGES")},
        early=lambda params, given: _refuse_early(params, given),
        chain="valign.recipes.align:AlignConfig",
        data="valign.data.build:DataConfig",
        train="valign.training.tasks.preference.config:PreferenceConfig",
        objective="valign.objectives:DiffusionDPO",
        evaluators=EvaluatorOptions,
        source=SourceOptions,
        memory="valign.memory:MemoryConfig",
        typed={
            "memory": COMMON,
            "data": ("categories", "pairs_per_category", "filter", "flip"),
            "train": ("steps", "learning_rate", "retain_weight"),
            "objective": (),
        },
    ),
)
def command(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to align: shapes, a pipeline folder or a hub id")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; an unfinished one is resumed")],
    policy: Annotated[str, Option("--policy", "-p", help="a bundled policy (default, shapes) or a YAML file")] = "default",
    suite: Annotated[str, Option(help="test prompts: shapes, or a JSON-lines file; from the policy's concepts if left out")] = "",
    limit: Annotated[int | None, Option(min=1, help="test prompts at most; no category that is trained is dropped")] = None,
    filter_detector: Annotated[
        str, Option(help="detector that keeps or drops training pairs (--filter detector); the evaluation's own if left out")
    ] = "",
    retain: Retain = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    estimate: EstimateOnly = False,
    as_json: AsJson = False,
) -> None:
    """Align a model to a policy and measure it: data, experts, merge, evaluation, report. Run it again to resume."""
    from valign.cli.evaluate import print_summary
    from valign.data.build import DataConfig
    from valign.evaluation import Evaluators, counted_categories
    from valign.evaluation.policy_suite import policy_suite
    from valign.objectives import DiffusionDPO
    from valign.policy import load_policy
    from valign.recipes.align import AlignConfig, align
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.recipes.quickstart import of_categories, world_tuning
    from valign.recipes.tuning import searched
    from valign.trackers import check_trackers
    from valign.training import PreferenceConfig

    memory = record(ctx, MemoryConfig)
    looks, chain = record(ctx, EvaluatorOptions), {"batch_size": 8, **changes(ctx, AlignConfig)}
    AlignConfig(**chain)  # a mistake shows before the model is loaded
    if not looks.detector:
        raise UserError(NO_DETECTOR)
    rules = load_policy(policy)
    tables = record(ctx, SourceOptions)
    source, reading = tables.open(rules), tables.reading()
    tested = resolve_suite(suite, rules, beside=reading.beside("suite")) if suite else policy_suite(rules)
    world = world_of(model, rules)
    judge, reader, encoder = (
        resolve_detector(looks.detector, model=model),
        resolve_fidelity(looks.fidelity or (world.name if world else ""), model=model),
        resolve_clip(looks.clip, model=model),
    )
    shared = {name: chain[name] for name in SHARED if name in chain}  # the chain's own numbers are those of the images, too
    given = shared | changes(ctx, DataConfig)
    if "categories" in given:
        given["categories"] = tuple(rules.category(name).id for name in given["categories"])
    keeper = None
    if filter_detector:
        if given.get("filter", "detector") != "detector":
            raise UserError(f"--filter-detector has no effect with --filter {given['filter']}. Drop one of the two.")
        keeper = resolve_detector(filter_detector, model=model)
        given["filter"] = "detector"
    wanted = given.get("categories") or rules.category_ids()
    tested = tested.take(limit, keep=wanted)
    counted_categories(tested, judge, wanted)
    own = world_tuning(world, tested, per_concept=PER_CONCEPT, seed=int(chain.get("seed", 0))) if world else None
    tuning = of_categories(own, wanted) if own else None
    data = DataConfig(**given | ({"retain": read_retained(retain, rules, reading)} if retain else {}))
    refuse_idle(data, changes(ctx, DataConfig))
    check_trackers(changes(ctx, PreferenceConfig).get("trackers", ()))
    trained = {"flip": data.flip, "seed": data.seed} | changes(ctx, PreferenceConfig, DiffusionDPO)

    def phases(known: DiffusionPhases) -> Iterator[Phase]:
        recipe = AlignGuardRecipe.for_model(known.sketch.shapes, **trained | known.memory.chosen())
        planned = AlignConfig(**chain, data=data, experts=recipe)
        candidates = 0 if planned.strength is not None else searched(planned.grid)
        yield from known.align(planned, categories=len(wanted), prompts=len(tested.prompts), candidates=candidates)

    place = diffusion_folder(model)
    rows = int(trained.get("pairs_per_step", PreferenceConfig.pairs_per_step))
    memory = fit(
        lambda: diffusion_run(place, memory, device, phases, rows=rows, pairs=True), place, memory, device, folder, only=estimate
    )
    subject = resolve_model(model, device=device, memory=memory)
    config = AlignConfig(**chain, data=data, experts=AlignGuardRecipe.for_model(subject, **trained | memory.chosen()))
    evaluators = Evaluators(judge, fidelity=reader, clip=encoder)
    summary = align(subject, rules, source, tested, evaluators, folder, config, pair_detector=keeper or judge, tuning=tuning)
    print_summary(summary, folder / "evaluation", as_json=as_json)
    if not as_json:
        out.print(str(folder / "merged" / "adapter"), soft_wrap=True)


def _refuse_early(params: Mapping[str, Any], given: Mapping[str, Sequence[str]]) -> None:
    """Refuse categories that the policy does not have, and a run that nobody judges."""
    refuse_categories(params["policy"], given.get("--category", ()))
    if not given.keys() & {"--detector", *FROM_ELSEWHERE}:
        raise UserError(NO_DETECTOR)


def world_of(model: str, policy: Policy) -> World | None:
    """The bundled world that the model belongs to and whose policy this is: it has tuning prompts and a reader of its own."""
    from valign.worlds import WORLDS

    origins = set(origins_of(model))
    mine = (world for world in WORLDS.values() if set(world.origins) & origins)
    return next((world for world in mine if world.policy in (policy.id, policy.extends)), None)
