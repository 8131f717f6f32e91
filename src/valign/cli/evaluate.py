"""``valign evaluate``: a base model against adapters and guidance baselines on one suite, with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option

from valign.checks import UserError, option
from valign.cli.common import (
    Anyway,
    AsJson,
    EvaluatorOptions,
    PromptTableOptions,
    check_adapters,
    err,
    example,
    find_world,
    origins_of,
    out,
    resolve_clip,
    resolve_detector,
    resolve_fidelity,
    resolve_model,
    resolve_suite,
)
from valign.cli.early import refuse_other_base
from valign.cli.fitting import fit_sampling
from valign.cli.options import configured, record, refuse_given
from valign.memory import PAIRS, SAMPLING, TRAINING, MemoryConfig

if TYPE_CHECKING:
    from PIL.Image import Image

    from valign.data.prompts.tables import TableReading
    from valign.evaluation import Suite, System
    from valign.interfaces import Guidance, SamplingConfig
    from valign.models.diffusion.base import DiffusionModel
    from valign.policy import Policy
    from valign.worlds import World

Cell = Callable[[Mapping[str, Any]], "str | Text"]  # of a system's summary
BASELINES = ("negative-prompt", "sld-weak", "sld-medium", "sld-strong", "sld-max")


@dataclass(frozen=True, kw_only=True)
class EvaluationInputs:
    """What else goes in: images that another tool made, and what was trained on."""

    judge_images: tuple[str, ...] = option(
        (),
        help="[NAME=]FOLDER of images that another tool made, with a manifest of prompt, file and category, instead of a model's; "
        "the first is the base",
    )
    skip_unreadable: bool = option(False, help="count broken images of --judge-images as not measured instead of stopping")
    stand_in: bool = option(False, help="the harms of --judge-images are neutral drawings: show them unveiled")
    trained_on: tuple[Path, ...] = option((), help="data set or prompt file that must not overlap with the suite")


@example(
    "valign evaluate --model shapes --adapter aligned=runs/quickstart/merged/adapter --baseline sld-medium -o runs/eval",
    cls=configured(
        pipeline=True,
        named={"--baseline": BASELINES},
        early=lambda params, _: refuse_other_base(
            params["model"], named_adapters(params["adapter"]).values(), anyway=params["anyway"]
        ),
        sampling="valign.interfaces:SamplingConfig",
        evaluators=EvaluatorOptions,
        report="valign.evaluation.report.report:ReportOptions",
        table=PromptTableOptions,
        inputs=EvaluationInputs,
        memory="valign.memory:MemoryConfig",
        typed={"memory": SAMPLING},
    ),
)
def command(
    ctx: Context,
    folder: Annotated[Path, Option("--out", "-o", help="folder for images, numbers and report; an unfinished one is resumed")],
    model: Annotated[
        str,
        Option("--model", "-m", help="the base: shapes, a pipeline folder or a hub id; of --judge-images the one that made them"),
    ] = "",
    suite: Annotated[str, Option("--suite", "-s", help="test prompts: shapes, or a table of prompts with labels")] = "shapes",
    adapter: Annotated[list[str], Option(metavar="[NAME=]FOLDER", help="adapter to compare; may be repeated")] = [],  # noqa: B006
    values: Annotated[
        list[str], Option(metavar="[NAME=]FOLDER", help="value encoder to compare, for prompts with a principle; may be repeated")
    ] = [],  # noqa: B006
    value_retriever: Annotated[
        Path | None, Option(help="probe of `valign train retriever` that finds the principles; the policy's keywords if left out")
    ] = None,
    baseline: Annotated[list[str], Option(help=f"{', '.join(BASELINES)}; may be repeated")] = [],  # noqa: B006
    policy: Annotated[str, Option("--policy", "-p", help="policy whose words the baselines use; the suite's own, or default")] = "",
    reference: Annotated[Path | None, Option(help="folder of images that FID compares with")] = None,
    limit: Annotated[int | None, Option(min=1, help="prompts at most, of every category and kind in turn")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Measure harm, fidelity and drift of a model with and without adapters, at equal prompts and seeds. Run again to resume."""
    from valign.evaluation import Evaluators, ReportOptions, counted_categories, evaluate
    from valign.interfaces import SamplingConfig
    from valign.policy import load_policy

    inputs, memory = record(ctx, EvaluationInputs), record(ctx, MemoryConfig)
    memory.refuse_unused(TRAINING, PAIRS, why="on evaluate, which trains nothing")
    if inputs.judge_images:
        _refuse_with_images(ctx)
        summary = _judge_images(ctx, inputs, model, policy, folder, limit)
        print_summary(summary, folder, as_json=as_json)
        return
    if not model:
        raise UserError("--model must name the base, got nothing: shapes, a pipeline folder or a hub id. Or name --judge-images.")
    if given := [name for name, value in (("skip-unreadable", inputs.skip_unreadable), ("stand-in", inputs.stand_in)) if value]:
        raise UserError(f"--{given[0]} has no effect without --judge-images. Leave it out, or name the images.")
    adapters, world = named_adapters(adapter), find_world(suite)
    if not adapters:
        refuse_given(ctx, "without --adapter", "anyway")
    encoders = named_adapters(values, "--values")
    distinct_names(adapters, encoders)
    if value_retriever and not encoders:
        raise UserError("--value-retriever finds the principles of --values, which names no encoder. Name one, or drop it.")
    _check_baselines(baseline)
    if policy and world and not (baseline or encoders):
        raise UserError("--policy has no effect without --baseline or --values, which use its words. Leave it out, or name one.")
    looks, sampling = record(ctx, EvaluatorOptions), record(ctx, SamplingConfig)
    if not looks.detector and not world:
        raise UserError(
            "--detector must name what judges the images, got nothing. Name one: nudenet, "
            "safety-checker=FOLDER ... (`valign detector list`)."
        )

    rules, table = load_policy(policy or (world.policy if world else "default")), record(ctx, PromptTableOptions)
    tests = resolve_suite(suite, rules, table)
    _refuse_trained(tests, inputs.trained_on, table.reading().beside("trained-on"))
    judge = resolve_detector(looks.detector or suite, model=model)
    reader = resolve_fidelity(looks.fidelity or (suite if world else "none"), model=model)
    encoder = resolve_clip(looks.clip or (suite if world else "none"), model=model)
    references = _reference(reference, world)
    tests = tests.take(limit)
    counted_categories(tests, judge)
    compared = 1 + len(adapters) + len(encoders) + len(baseline)
    check_adapters(model, adapters.values(), anyway=anyway)
    memory = fit_sampling(model, memory, device, folder, compared * len(tests.prompts), sampling)
    base = resolve_model(model, device=device, memory=memory)
    guided = guided_by_values(base, encoders, value_retriever, rules, sampling)
    summary = evaluate(
        [*_systems(base, adapters, baseline, rules, sampling, anyway), *guided],
        tests,
        Evaluators(judge, fidelity=reader, clip=encoder, reference=references),
        out=folder,
        sampling=sampling,
        report=record(ctx, ReportOptions),
    )
    print_summary(summary, folder, as_json=as_json)


def _judge_images(ctx: Context, inputs: EvaluationInputs, model: str, policy: str, out: Path, limit: int | None) -> dict[str, Any]:
    """Measure images that were made elsewhere."""
    from valign.evaluation import Evaluators, ReportOptions, counted_categories, evaluate
    from valign.evaluation.images.made_elsewhere import OWN_COLUMNS, read_made_elsewhere, refuse_unreadable, same_prompts
    from valign.policy import load_policy

    looks, table, world = record(ctx, EvaluatorOptions), record(ctx, PromptTableOptions), find_world(model)
    if not looks.detector:
        raise UserError("--detector must name what judges the images, got nothing. See `valign detector list`.")
    rules = load_policy(policy or (world.policy if world else "default"))
    maker = model or "the model of these images (say which by --model)"
    judge = resolve_detector(looks.detector, model=maker)
    reader, encoder = resolve_fidelity(looks.fidelity or "none", model=maker), resolve_clip(looks.clip or "none", model=maker)
    reading = table.reading(also=OWN_COLUMNS)
    options: dict[str, Any] = {"known": rules.category_ids(), "reading": reading, "stand_in": inputs.stand_in}
    folders = _named_folders(inputs.judge_images, "--judge-images")
    made = {name: read_made_elsewhere(folder, **options) for name, folder in folders.items()}
    first, *others = made.values()
    same_prompts(first, others)
    if not inputs.skip_unreadable:
        refuse_unreadable(made.values())
    _refuse_trained(first.suite, inputs.trained_on, reading.beside("trained-on"))
    tests = first.suite.take(limit)
    counted_categories(tests, judge)
    unnamed = [f"{one.unnamed} images in {one.folder} are not in its manifest and were not looked at." for one in made.values()]
    return evaluate(
        [one.system(name, origins=origins_of(maker)) for name, one in made.items()],
        tests,
        Evaluators(judge, fidelity=reader, clip=encoder),
        out=out,
        sampling=None,
        report=record(ctx, ReportOptions),
        notes=[note for note, one in zip(unnamed, made.values()) if one.unnamed],
    )


def _refuse_with_images(ctx: Context) -> None:
    """Refuse options that do nothing where the images are given."""
    from valign.interfaces import SamplingConfig

    idle = ("suite", "adapter", "values", "value_retriever", "baseline", "reference", "device", "anyway", "format")
    refuse_given(ctx, "on images that were made elsewhere", *idle, parts=(SamplingConfig, MemoryConfig))


def _named_folders(given: Sequence[str], option: str) -> dict[str, Path]:
    """``NAME=FOLDER``, or a folder that gives its own name."""
    found: dict[str, Path] = {}
    for text in given:
        name, _, place = text.rpartition("=")
        name = name or Path(place).resolve().name
        if name in found:
            raise UserError(f"{option} must have names of their own, got {name} twice. Give NAME=FOLDER.")
        found[name] = Path(place)
    return found


def print_summary(summary: Mapping[str, Any], folder: Path, *, as_json: bool = False) -> None:
    """The comparison as a table on stderr, the report's path on stdout; or on stdout all of it as JSON."""
    if as_json:
        out.print_json(data=summary)
        return
    err.print(summary_table(summary))
    found = summary["conclusions"]
    err.print(Text(found["headline"], style="bold"))
    said = dict.fromkeys(one["text"] for one in found["systems"])  # of a detector that found nothing, all say the same
    for text in [text for text in said if text not in found["headline"]] if len(found["systems"]) > 1 else ():
        err.print(Text(text))
    for one in summary["agreement"]:
        err.print(Text(_agreement_line(one)))
    for note in summary["notes"]:
        err.print(Text(note, style="dim"))
    out.print(str(folder / "report.html"), soft_wrap=True)


def _agreement_line(one: Mapping[str, Any]) -> str:
    """How far two of the joined detectors agree."""
    pair = f"{one['first']} and {one['second']}"
    if not one["categories"]:
        return f"{pair} measure no category in common, so their agreement is unknown."
    differ = f"disagree on {one['only_first'] + one['only_second']} of {one['images']} images"
    if one["kappa"] is None:
        return f"{pair} {differ}; Cohen's kappa is not defined."
    kappa = one["kappa"]
    return f"{pair} {differ}: Cohen's kappa {kappa['value']:.2f} [{kappa['low']:.2f}, {kappa['high']:.2f}]."


def summary_table(summary: Mapping[str, Any]) -> Table:
    """One row per system, for 80 columns; below a rate its interval and, where it differs, the rate corrected for the detector.

    Where the suite says what an aligned image shows, that stands in the place of drift and CLIPScore, and held-out benign prompts
    in that of the time. Beside composed prompts there is no room for details kept and FID. The report has all.
    """
    from valign.evaluation.images.inappropriate import APART

    systems, suite = summary["systems"], summary["suite"]
    columns = [name for name in ("all", *APART) if any(_rate(system, name) for system in systems)]
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=0)
    apart = suite["unsafe"] - suite.get("counted", suite["unsafe"])  # summaries of earlier versions do not say
    unsafe = f"{suite['unsafe'] - apart} unsafe" + (f" ({apart} of other categories apart)" if apart else "")
    table.title = f"{suite['name']}: {unsafe} and {suite['benign']} benign prompts"
    table.caption = _detector_line(summary["detector"])
    table.add_column("system", style="bold", overflow="fold")  # the only column that gives way
    for name in columns:
        table.add_column("harm %\n" + name.replace("-", "-\n"), justify="right", no_wrap=True)
    measures = _measures(systems, narrow="composed" in columns)
    for name in measures:
        table.add_column(name, justify="right", no_wrap=True)
    for system in systems:
        harm = [_percent(_rate(system, name), unknown="not\nmeasured") for name in columns]
        if system.get("listed") and "held-out" in columns:
            harm[columns.index("held-out")].append("\nlisted", "dim")
        table.add_row(Text(system["name"]), *harm, *(cell(system) for cell in measures.values()))
    return table


def _measures(systems: Sequence[Mapping[str, Any]], *, narrow: bool = False) -> dict[str, Cell]:
    """What stands behind the rates of harm: heading -> cell of a system."""
    unsafe: dict[str, Cell] = {}
    if any(system.get("counterpart") for system in systems):  # summaries of earlier versions have none
        unsafe["counter-\npart %"] = lambda system: _percent(system["counterpart"])
    if any(system.get("kept") for system in systems) and not narrow:
        unsafe["details\nkept %"] = lambda system: _percent(system["kept"].get("everything asked"))
    right: dict[str, Cell] = {"benign\nright %": lambda system: _percent(system["fidelity"].get("everything asked"))}
    if any("held-out" in system.get("benign_right", {}) for system in systems):
        right["held-\nout\nright %"] = lambda system: _percent(system["benign_right"]["held-out"])
    drift: dict[str, Cell] = {"\ndrift": lambda system: _number(_mean(system["drift"]), 4)}
    distance: dict[str, Cell] = {} if narrow else {"\nFID": lambda system: _number(_distance(system["frechet"]), 2)}
    clip: dict[str, Cell] = {
        "CLIP\nscore": lambda system: _number(system["clip_score"] and system["clip_score"]["mean"]["value"], 1)
    }
    seconds: dict[str, Cell] = {"s per\nimage": lambda system: _number(system["seconds_per_image"], 2)}
    return unsafe | right | ({} if unsafe else drift) | distance | ({} if unsafe else clip) | ({} if len(right) > 1 else seconds)


def _mean(found: Mapping[str, Any] | None) -> float | None:
    return None if found is None else found["mean"]["value"]


def _distance(fid: Mapping[str, Any] | None) -> float | None:
    return None if fid is None else fid["to_base"] if fid["to_reference"] is None else fid["to_reference"]


def _rate(system: Mapping[str, Any], column: str) -> dict[str, Any] | None:
    return next((one["rate"] for one in system["ip"] if (one["category"], one["column"]) == ("", column)), None)


def _percent(rate: Mapping[str, Any] | None, *, unknown: str = "–") -> Text:
    if rate is None:
        return Text(unknown)
    share, corrected = rate["share"], rate["corrected"]
    text = Text.assemble(f"{100 * share['value']:.1f}\n", (f"{100 * share['low']:.0f}–{100 * share['high']:.0f}", "dim"))
    if corrected is not None and abs(corrected["value"] - share["value"]) >= 5e-4:
        text.append(f"\n→ {100 * corrected['value']:.1f}\n({100 * corrected['low']:.0f}–{100 * corrected['high']:.0f})", "dim")
    return text


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _detector_line(card: Mapping[str, Any]) -> str:
    if card["sensitivity"] is None or card["specificity"] is None:
        return f"95 % intervals. Detector {card['name']}: its own error was never measured."
    error = f"95 % intervals. Detector {card['name']} "
    if card["sensitivity"] + card["specificity"] <= 1:
        return f"{error}is no better than chance on its own test images; nothing is corrected."
    missed, false = 100 * (1 - card["sensitivity"]), 100 * (1 - card["specificity"])
    return f"{error}misses {missed:.2f} % and falsely flags {false:.2f} %; → corrected for both."


def named_adapters(given: Iterable[str], option: str = "--adapter") -> dict[str, Path]:
    """``NAME=FOLDER``, or a folder that gives its own name (its parent's, where it is called "adapter" or "values")."""
    found: dict[str, Path] = {}
    for text in given:
        name, _, place = text.rpartition("=")
        folder = Path(place)
        name = name or (folder.resolve().parent.name if folder.name in ("adapter", "values", "") else folder.name)
        if not folder.exists():
            raise UserError(f"{option} must name a folder, {folder} does not exist. Give NAME=FOLDER.")
        if name in found or name == "base":
            raise UserError(f"{option} must have names of their own, got {name} twice. Give NAME=FOLDER.")
        found[name] = folder
    return found


def distinct_names(adapters: Iterable[str], encoders: Iterable[str]) -> None:
    """Raises: UserError for a name that an adapter and a value encoder share."""
    if both := sorted(set(adapters) & set(encoders)):
        raise UserError(f"--values must have names of their own, got {both[0]} twice. Give NAME=FOLDER.")


def _check_baselines(given: Iterable[str]) -> None:
    unknown = [name for name in given if name not in BASELINES]
    if unknown:
        raise UserError(f"--baseline must be one of {', '.join(BASELINES)}; got {unknown[0]!r}.")


def _systems(
    model: DiffusionModel,
    adapters: Mapping[str, Path],
    baselines: Iterable[str],
    policy: Policy,
    sampling: SamplingConfig,
    anyway: bool,
) -> list[System]:
    from valign.evaluation import adapter_system, base_system, guided_system

    systems = [base_system(model, sampling)]
    for name in dict.fromkeys(baselines):
        guidance, what = guidance_of(name, policy)
        systems.append(guided_system(model, guidance, sampling, name=name, description=what))
    return [*systems, *(adapter_system(model, folder, sampling, name=name, anyway=anyway) for name, folder in adapters.items())]


def guidance_of(name: str, policy: Policy) -> tuple[Guidance, str]:
    """One of `BASELINES` in the policy's words, and what it is."""
    from valign.models.diffusion.guidance.negative import NegativePrompt
    from valign.models.diffusion.guidance.sld import SafeLatentDiffusion

    if name == "negative-prompt":
        return NegativePrompt(policy.negative_prompt), "the policy's negative prompt"
    preset = SafeLatentDiffusion.preset(name.removeprefix("sld-"), text=policy.safety_text)
    return preset, "Safe Latent Diffusion, the policy's safety text"


def guided_by_values(
    model: Any, encoders: Mapping[str, Path], probe: Path | None, policy: Policy, sampling: SamplingConfig
) -> list[System]:
    """A system per value encoder. Args: probe: Of `valign train retriever`; None finds principles by the policy's keywords."""
    if not encoders:
        return []
    from valign.cli.generate import principle_finder
    from valign.evaluation import value_system
    from valign.models.diffusion.value_encoder import load_value_encoder
    from valign.models.diffusion.value_pipeline import ValueGuidedPipeline
    from valign.models.heads.text_probe import load_probe

    retriever = principle_finder(policy, None if probe is None else load_probe(probe, model))
    pipelines = {
        name: ValueGuidedPipeline(model, load_value_encoder(folder, model), retriever) for name, folder in encoders.items()
    }
    return [value_system(pipeline, sampling, name=name) for name, pipeline in pipelines.items()]


def _refuse_trained(suite: Suite, sources: Iterable[Path], reading: TableReading) -> None:
    from valign.data.prompts.pairs import load_pairs
    from valign.data.prompts.records import prompt_texts
    from valign.evaluation import refuse_overlap

    for source in sources:
        pairs = source / "prompts" / "pairs.parquet" if source.is_dir() else source
        if pairs.name == "pairs.parquet":
            texts = [text for pair in load_pairs(pairs) for text in (pair.unsafe, pair.safe)]
        else:
            texts = prompt_texts(source, reading=reading)
        refuse_overlap(suite, texts)


def _reference(folder: Path | None, world: World | None) -> list[Image] | None:
    """Images of ``folder`` by name; the world's own renders of its benign prompts where no folder is given."""
    from valign.images import SUFFIXES, image_files, open_image

    if folder is None:
        return world.reference_images() if world else None
    files = image_files(folder) if folder.is_dir() else []
    if len(files) < 2:
        raise UserError(f"--reference must be a folder of at least 2 images, {folder} holds {len(files)} of {', '.join(SUFFIXES)}.")
    return [open_image(path) for path in files]
