"""``valign train``: train adapters and value encoders on preference data, and fit the retriever of value principles."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from typer import Context, Option, Typer

from valign.checks import UserError
from valign.cli.common import AsJson, TableOptions, err, find_world, one_of, out, print_measured, resolve_model
from valign.cli.fitting import EstimateOnly, diffusion_folder, diffusion_run, fit, processes
from valign.cli.options import changes, configured, record
from valign.cli.prompt import OPTIMIZER, OPTIMIZER_EXAMPLE, train_command
from valign.cli.reinforce import (
    COSALIGN,
    COSALIGN_EXAMPLE,
    DPO,
    DPO_EXAMPLE,
    EXAMPLE,
    RL,
    cosalign_command,
    dpo_command,
    reinforce_command,
)
from valign.memory import MemoryConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from valign.data.images.quadruples import Quadruples
    from valign.data.prompts.tables import TableReading
    from valign.models.diffusion.base import DiffusionModel
    from valign.models.heads.text_probe import TextProbe
    from valign.recipes.alignguard import AlignGuardRecipe
    from valign.recipes.footprints import DiffusionPhases, Phase
    from valign.training import TrainResult
    from valign.worlds import World

Json = Annotated[bool, Option("--json", help="the results as JSON on stdout")]
PRESETS = ("auto", "stable-diffusion", "sdxl", "shapes")

app = Typer(
    no_args_is_help=True,
    help="Train LoRA experts, a value encoder, its retriever, a chat model, or a CLIP that knows unsafe content; "
    "an interrupted run resumes.",
)


@app.command(
    cls=configured(
        pipeline=True,
        preset=True,
        training="valign.training.tasks.preference.config:PreferenceConfig",
        objective="valign.objectives:DiffusionDPO",
        memory="valign.memory:MemoryConfig",
        look_ahead="valign.objectives.robust.look_ahead:LookAhead",
    ),
    epilog="example: valign train alignguard --model shapes --data runs/data --category violence --out runs/violence   "
    "safety that survives fine-tuning: valign train alignguard --model shapes --data runs/data --joint --resilient "
    "--out runs/resilient   "
    "all categories: valign train alignguard --model shapes --data runs/data --all --out runs/experts   "
    "several processes: accelerate launch --num_processes 2 -m valign train alignguard ...",
)
def alignguard(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to align: shapes, a pipeline folder or a hub id")],
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build`, made with the same model")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; with --all, one folder per category in it")],
    category: Annotated[str, Option(help="train the expert of this category")] = "",
    all_: Annotated[bool, Option("--all", help="train one expert for each category that has data")] = False,
    joint: Annotated[bool, Option("--joint", help="train one adapter on all pairs (a baseline)")] = False,
    resilient: Annotated[
        bool, Option("--resilient", help="look ahead on simulated benign fine-tuning, so that safety survives it (ResAlign)")
    ] = False,
    preset: Annotated[
        str, Option(help=f"{', '.join(PRESETS)}; auto is by the model's family and size", callback=one_of("--preset", *PRESETS))
    ] = "auto",
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    estimate: EstimateOnly = False,
    as_json: Json = False,
) -> None:
    """Train AlignGuard's safety experts: one LoRA per harm category, by Diffusion-DPO. The same command resumes."""
    from valign.data.images.latents import open_latents
    from valign.objectives import DiffusionDPO
    from valign.objectives.robust.look_ahead import LookAhead
    from valign.policy import normalize_category
    from valign.recipes.alignguard import JOINT, AlignGuardRecipe, train_expert, train_experts
    from valign.trackers import check_trackers
    from valign.training import PreferenceConfig
    from valign.training.engine.processes import local_device

    if bool(category) + all_ + joint != 1:
        raise UserError("train alignguard needs one of --category NAME, --all or --joint. Choose one.")
    given, memory = changes(ctx, PreferenceConfig, DiffusionDPO), record(ctx, MemoryConfig)
    AlignGuardRecipe().changed(**given | memory.chosen())  # a mistake shows before the model is loaded
    ahead = record(ctx, LookAhead) if resilient else None
    if ahead is None and (idle := changes(ctx, LookAhead)):
        raise UserError(f"{', '.join(idle)} must go with --resilient, got it without. Add --resilient, or leave them out.")
    check_trackers(given.get("trackers", ()))
    place, experts = diffusion_folder(model), _experts(data) if all_ else 1

    def phases(known: "DiffusionPhases") -> "Iterator[Phase]":
        recipe = _preset(preset, known.sketch.shapes).changed(**given | known.memory.chosen())
        yield known.training(recipe.training, experts)

    rows = given.get("pairs_per_step", PreferenceConfig.pairs_per_step) // processes() or 1
    plan = lambda: diffusion_run(place, memory, device, phases, rows=rows, pairs=True)  # noqa: E731
    memory = fit(plan, place, memory, device, folder, only=estimate)
    given |= memory.chosen()
    subject = resolve_model(model, device=local_device(device), memory=memory)
    cache = open_latents(data, base=subject.fingerprint())
    recipe = replace(_preset(preset, subject).changed(**given), look_ahead=ahead)
    chosen = normalize_category(category) if category else None
    if recipe.training.sample_every and not recipe.training.sample_prompts:
        recipe = recipe.changed(sample_prompts=_prompts(data, chosen))
    if all_:
        results = train_experts(subject, cache, folder, recipe)
    else:
        results = {chosen or JOINT: train_expert(subject, cache, chosen, folder, recipe)}
    _print(results, as_json=as_json)


@app.command(
    cls=configured(
        pipeline=True,
        preset=True,
        training="valign.training.tasks.preference.config:PreferenceConfig",
        livo="valign.objectives:LiVO",
        dpo="valign.objectives:DiffusionDPO",
        recipe="valign.recipes.livo:LivoRecipe",
        memory="valign.memory:MemoryConfig",
        typed={"dpo": ()},
    ),
    epilog="example: valign train livo --model shapes --data runs/values --out runs/livo   "
    "to compare: valign train livo --model shapes --data runs/values --objective diffusion-dpo --out runs/livo-dpo",
)
def livo(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to guide: shapes, a pipeline folder or a hub id")],
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build-values`, made with the same model")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run; the value encoder is OUT/values")],
    objective: Annotated[
        str,
        Option(
            help="livo, or diffusion-dpo on the same value encoder",
            callback=one_of("--objective", "diffusion-dpo", "livo"),
        ),
    ] = "livo",
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: Json = False,
) -> None:
    """Train LiVO's value encoder: one token beside a frozen model, for all principles of the data. The same command resumes."""
    from valign.data.images.value_sets import open_values
    from valign.objectives import DiffusionDPO, LiVO
    from valign.recipes.livo import LivoRecipe, train_livo
    from valign.trackers import check_trackers
    from valign.training import PreferenceConfig
    from valign.training.engine.processes import local_device

    given = changes(ctx, DiffusionDPO, LiVO, PreferenceConfig, LivoRecipe, MemoryConfig)
    LivoRecipe().with_objective(objective).changed(**given)  # a mistake shows before the model is loaded
    check_trackers(given.get("trackers", ()))
    subject = resolve_model(model, device=local_device(device), memory=record(ctx, MemoryConfig))
    cache = open_values(data, base=subject.fingerprint())
    recipe = LivoRecipe.for_model(subject).with_objective(objective).changed(**given)
    if recipe.training.sample_every and not recipe.training.sample_prompts:
        recipe = recipe.changed(sample_prompts=tuple(dict.fromkeys(cache.prompts))[:4])
    _print({"livo": train_livo(subject, cache, folder, recipe)}, as_json=as_json)


@app.command(
    cls=configured(pipeline=True, probe="valign.training.tasks.text_probe:TextProbeConfig", table=TableOptions),
    epilog="example: valign train retriever --model shapes --data runs/data --policy shapes --out runs/retriever",
)
def retriever(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to read with: shapes, a pipeline folder or a hub id")],
    data: Annotated[Path, Option("--data", "-d", help="data set of `valign data build`; its prompts alone are read")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the probe and its card")],
    policy: Annotated[str, Option("--policy", "-p", help="policy with the principles: default, shapes or a YAML file")] = "default",
    benign: Annotated[
        Path | None, Option(help="file of further harmless prompts, beside the safe and the retained ones of the data")
    ] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Fit LiVO's retriever: a linear probe on the model's own text encoders, from the prompts of a data set, in seconds."""
    from valign.cli.data import read_retained
    from valign.data.images.latents import retained_prompts
    from valign.data.prompts.pairs import load_pairs
    from valign.policy import load_policy
    from valign.recipes.retriever import train_retriever
    from valign.training.tasks.text_probe import TextProbeConfig

    rules, config = load_policy(policy), record(ctx, TextProbeConfig)
    pairs = load_pairs(data / "prompts" / "pairs.parquet")
    harmless = [*retained_prompts(data), *read_retained(benign, rules, record(ctx, TableOptions).reading())]
    probe = train_retriever(resolve_model(model, device=device), pairs, harmless, rules, folder, config)
    _print_probe(probe)
    print_measured({"probe": str(folder), "threshold": probe.threshold, **probe.notes}, str(folder), as_json=as_json)


app.command("rl", cls=RL, epilog=EXAMPLE)(reinforce_command)
app.command("dpo", cls=DPO, epilog=DPO_EXAMPLE)(dpo_command)
app.command("cosalign", cls=COSALIGN, epilog=COSALIGN_EXAMPLE)(cosalign_command)
app.command("prompt-optimizer", cls=OPTIMIZER, epilog=OPTIMIZER_EXAMPLE)(train_command)


@app.command(
    cls=configured(
        preset=True,
        training="valign.training.tasks.quadruples:QuadrupleConfig",
        objective="valign.objectives.hyperbolic.safety_entailment:SafetyEntailment",
        bounds="valign.recipes.hysac:BoundOptions",
        table=TableOptions,
    ),
    epilog="example: valign train hysac --clip shapes --data shapes --policy shapes --out detectors/hysac   "
    "your own: valign train hysac --clip models/clip-vit-large-patch14 --data runs/data --out detectors/hysac",
)
def hysac(
    ctx: Context,
    clip: Annotated[str, Option(help="CLIP to train: a transformers folder, or shapes for the bundled miniature")],
    data: Annotated[str, Option("--data", "-d", help="quadruples: a data set of `valign data build`, a table's folder, or shapes")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the run, which is then a detector's")],
    test: Annotated[str, Option(help="quadruples to measure the error on; a sixth of --data if left out")] = "",
    policy: Annotated[str, Option("--policy", "-p", help="policy with the categories: default, shapes or a YAML file")] = "default",
    per_category: Annotated[int, Option(min=2, help="quadruples of each category, where a world's name stands for the data")] = 60,
    copy: Annotated[bool, Option("--copy", help="copy the CLIP into the folder instead of naming its place")] = False,
) -> None:
    """Train HySAC: a CLIP whose distance from a root says how unsafe a prompt or an image is. The same command resumes."""
    from valign.cli.detector_tables import report_error
    from valign.models.encoders.clip import ClipEncoder
    from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment
    from valign.recipes.hysac import BoundOptions, HysacRecipe, train_hysac
    from valign.training.tasks.quadruples import QuadrupleConfig

    given = changes(ctx, QuadrupleConfig, SafetyEntailment, BoundOptions)
    HysacRecipe().changed(**given)  # a mistake shows before the model is loaded
    seed = int(given.get("seed") or 0)
    reading = record(ctx, TableOptions).reading()
    learnt, world = read_quadruples_of(data, policy, reading, per_category, seed, test=False)
    if test:
        tested, _ = read_quadruples_of(test, policy, reading, per_category, seed, test=False)
    elif world:
        tested = world.quadruples(per_category=max(2, per_category // 3), seed=seed, test=True)
    else:
        learnt, tested = learnt.split(1 / 6, seed=seed)
    bundled = find_world(clip)
    encoder = bundled.clip() if bundled else ClipEncoder(clip)
    recipe = HysacRecipe.for_clip(encoder).changed(**given)
    train_hysac(encoder, learnt, tested, folder, recipe, copy=copy or bundled is not None, domain=world.origins if world else ())
    report_error(folder)
    out.print(str(folder), markup=False, soft_wrap=True)


def read_quadruples_of(
    data: str, policy: str, reading: "TableReading", per_category: int, seed: int, *, test: bool
) -> "tuple[Quadruples, World | None]":
    """The quadruples of a world or a folder, and the world if it is one."""
    from valign.data.images.quadruples import read_quadruples
    from valign.policy import load_policy

    world = find_world(data)
    if world:
        return world.quadruples(per_category=per_category, seed=seed, test=test), world
    return read_quadruples(Path(data), known=load_policy(policy).category_ids(), reading=reading), None


def _print_probe(probe: "TextProbe") -> None:
    """Found, named right and false alarms of prompts that were kept out of the fit; a dash for what could not be measured."""
    measured = probe.notes["measured"] or {"sources": [], "categories": {}}
    table = Table("category", "prompts", "kept out", "found %", "named right %", box=None, header_style="bold")
    for name in probe.categories:
        found = measured["categories"].get(name, {"prompts": 0, "recall": None, "named_right": None})
        shares = ("-" if rate is None else f"{100 * rate['value']:.1f}" for rate in (found["recall"], found["named_right"]))
        table.add_row(name, str(probe.notes["prompts"][name]), str(found["prompts"]), *shares)
    err.print(table)
    alarms = next((one for one in measured["sources"] if one["source"] == "all" and one["false_alarms"]), None)
    told = f"{100 * alarms['false_alarms']['value']:.1f} % of {alarms['safe']} kept out" if alarms else "not measured"
    err.print(f"harmless prompts: {probe.notes['prompts']['harmless']}; false alarms: {told}", highlight=False)
    err.print(f"threshold {probe.threshold:.3g}, {probe.notes['threshold_set']}", highlight=False)


def _preset(name: str, model: "DiffusionModel") -> "AlignGuardRecipe":
    from valign.recipes.alignguard import AlignGuardRecipe

    if name == "auto":
        return AlignGuardRecipe.for_model(model)
    presets: dict[str, Callable[[], AlignGuardRecipe]] = {
        "stable-diffusion": AlignGuardRecipe,
        "sdxl": AlignGuardRecipe.sdxl,
        "shapes": AlignGuardRecipe.shapes,
    }
    return presets[name]()


def _experts(data: Path) -> int:
    """How many categories the data set has; 1 for what is not there, which opening it will say."""
    import pyarrow.parquet as pq

    path = data / "latents" / "index.parquet"
    return len({name for has in pq.read_table(path)["categories"].to_pylist() for name in has}) if path.exists() else 1


def _prompts(data: Path, category: str | None) -> tuple[str, ...]:
    """The first four unsafe prompts of the category."""
    from valign.data.prompts.pairs import load_pairs

    pairs = load_pairs(data / "prompts" / "pairs.parquet")
    return tuple(pair.unsafe for pair in pairs if category is None or category in pair.categories)[:4]


def _print(results: "dict[str, TrainResult]", *, as_json: bool = False) -> None:
    from accelerate import PartialState

    if not PartialState().is_main_process:
        return
    if as_json:
        out.print_json(data={name: {**asdict(result), "adapter": str(result.adapter)} for name, result in results.items()})
        return
    table = Table("expert", "best step", "of", "stopped by", "val. loss", "drift", box=None, header_style="bold")
    for name, result in results.items():
        numbers = [f"{result.metrics[key]:.3g}" if key in result.metrics else "-" for key in ("val_loss", "drift")]
        table.add_row(name, str(result.best_step), str(result.steps), result.stopped or "-", *numbers)
    err.print(table)
    for result in results.values():
        out.print(str(result.adapter), soft_wrap=True)
