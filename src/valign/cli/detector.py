"""``valign detector``: what judges images: list, show, fit, import and test detectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from rich.text import Text
from typer import Argument, Context, Option, Typer

from valign.checks import UserError
from valign.cli.common import checked, err, find_world, numbers_by_name, one_of, out, resolve_detector, there
from valign.cli.detector_search import SEARCH_EXAMPLE, search_command
from valign.cli.detector_tables import error_table, error_text, facts, measures, plain, report, rows_of, with_intervals
from valign.cli.early import refuse_detector
from valign.cli.options import changes, configured, record

if TYPE_CHECKING:
    from valign.data.images.labelled import LabelledImages

app = Typer(
    no_args_is_help=True,
    help="What judges images: list detectors, fit your own, import a classifier or a vision-language judge, measure their error.",
)


def _named(told: str) -> Any:
    """The argument that names a detector. Args: told: Its help."""
    return Argument(metavar="NAME", help=told, callback=checked(refuse_detector, "NAME"))


Json = Annotated[bool, Option("--json", help="as JSON")]
PolicyName = Annotated[str, Option("--policy", "-p", help="policy whose categories are judged: a bundled one or a YAML file")]
Names = Annotated[list[str], Option("--map", metavar="NAME=CATEGORY", help="category that a name stands for; may be repeated")]
Harmless = Annotated[str, Option(help="sub-folder of the harmless images")]
Output = Annotated[Path, Option("--out", "-o", help="new folder for the detector; it is named after it")]
Labelled = Annotated[
    str, Argument(metavar="IMAGES", help="folder with a sub-folder per category, or a world's name: shapes", callback=there())
]
PerCategory = Annotated[int, Option(min=6, help="renders of each category, where a world's name stands for the images")]


@app.command("list", epilog="example: valign detector list")
def list_(json: Json = False) -> None:
    """List the kinds of detectors, and those on the shelf: the folder `detectors`, or what VALIGN_DETECTORS names."""
    from valign.detectors import DETECTORS, on_shelf, shelf
    from valign.detectors.record import read_record
    from valign.worlds import WORLDS

    own = {place.name: read_record(place) for place in on_shelf()}
    if json:
        found = {"kinds": list(DETECTORS), "worlds": list(WORLDS), "shelf": str(shelf())}
        out.print_json(data=found | {"detectors": {name: facts(one.card, one) for name, one in own.items()}})
        return
    table = Table("detector", "kind", "measures", "its error", box=None, header_style="dim")
    for name in WORLDS:
        card = WORLDS[name].oracle().card
        table.add_row(Text(f"oracle ({name})"), "world-oracle", measures(card), error_text(card))
    for name, one in own.items():
        table.add_row(Text(name), one.kind, measures(one.card), error_text(one.card))
    out.print(table)
    out.print(Text(f"Kinds: {', '.join(DETECTORS)}. Detectors called by name lie in {shelf()}.", style="dim"))


@app.command("show", epilog="example: valign detector show detectors/mine --json")
def show(
    name: Annotated[str, _named("a detector, by name or folder")],
    json: Json = False,
) -> None:
    """Show what a detector judges and how often it errs. A judge's endpoint is not asked."""
    from valign.detectors import find_folder
    from valign.detectors.record import read_record

    place = find_folder(name) or (Path(name) if Path(name).is_dir() else None)
    kept = read_record(place) if place else None
    card = kept.card if kept else resolve_detector(name, model=None).card
    if json:
        out.print_json(data=facts(card, kept))
        return
    table = Table(show_header=False, box=None)
    table.add_row(Text("measures", style="dim"), Text(measures(card)))
    for key, value in facts(card, kept).items():
        if not isinstance(value, dict):
            table.add_row(Text(key, style="dim"), Text(plain(value)))
    for key, value in (kept.options if kept else {}).items():
        table.add_row(Text(key, style="dim"), Text(plain(value)))
    out.print(table)
    if kept and kept.measured:
        out.print(error_table(rows_of(kept.measured), f"on {kept.measured['images']}"))
        if prompts := kept.measured.get("prompts"):
            out.print(error_table(rows_of({"categories": prompts}), "prompts"))


@app.command(
    "fit",
    cls=configured(fit="valign.detectors.fitting:FitOptions"),
    epilog="example: valign detector fit labelled/ --clip models/clip-vit-large-patch14 -o detectors/mine",
)
def fit(
    ctx: Context,
    images: Labelled,
    clip: Annotated[str, Option(help="CLIP whose embeddings are read: a folder, or shapes for the bundled miniature")],
    folder: Output,
    policy: PolicyName = "",
    named: Names = [],  # noqa: B006
    harmless: Harmless = "harmless",
    copy: Annotated[bool, Option("--copy", help="copy the CLIP model into the folder instead of naming its place")] = False,
    per_category: PerCategory = 60,
    json: Json = False,
) -> None:
    """Fit a probe on CLIP embeddings to labelled images: half to learn from, a quarter to calibrate on, the rest to test on."""
    from valign.detectors.fitting import FitOptions, fit_detector
    from valign.detectors.record import read_record
    from valign.models.encoders.clip import ClipEncoder

    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --out, or delete it first.")
    if clip in ("", "none"):
        raise UserError("--clip must name a CLIP model's folder, or shapes for the bundled miniature, got none.")
    labelled, world = _labelled(images, policy, named, harmless, per_category)
    bundled = find_world(clip)
    encoder = bundled.clip() if bundled else ClipEncoder(clip)
    fit_detector(
        labelled,
        encoder,
        folder,
        place=encoder.folder,
        copy=copy or bundled is not None,
        domain=world.oracle().card.domain if world else (),
        origin=f"renders of the world {world.name}" if world else images,
        options=record(ctx, FitOptions),
    )
    kept = read_record(folder)
    report(kept.card, kept, json=json)
    if not json:
        out.print(str(folder), soft_wrap=True)


@app.command(
    "import",
    cls=configured(judge="valign.detectors.vision_judge:JudgeOptions"),
    epilog="example: valign detector import models/nsfw --map nsfw=sexual --threshold 0.5 -o detectors/nsfw",
)
def import_(
    ctx: Context,
    source: Annotated[
        str,
        Argument(
            metavar="SOURCE",
            help="folder of a transformers image classifier, or `judge` for a vision-language model",
            callback=there("judge"),
        ),
    ],
    folder: Output,
    policy: PolicyName = "default",
    named: Annotated[
        list[str], Option("--map", metavar="CLASS=CATEGORY", help="a classifier's class and its category; may be repeated")
    ] = [],  # noqa: B006
    threshold: Annotated[
        list[str], Option(metavar="[CATEGORY=]NUMBER", help="score from which an image is harmful; may be repeated")
    ] = [],  # noqa: B006
    map_file: Annotated[Path | None, Option(help="YAML file with `map` and `thresholds` instead")] = None,
    category: Annotated[list[str], Option(help="categories that a judge is asked about; all if none; may be repeated")] = [],  # noqa: B006
    copy: Annotated[bool, Option("--copy", help="copy the classifier into the folder instead of naming its place")] = False,
    json: Json = False,
) -> None:
    """Make a detector of a classifier that you have, or of a vision-language model behind an OpenAI-compatible endpoint.

    A judge's folder holds its questions. Where images are sent is said each time it is used: --detector FOLDER@ADDRESS.
    """
    from valign.detectors.importing import import_classifier, import_judge
    from valign.detectors.vision_judge import JudgeOptions
    from valign.policy import load_policy

    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --out, or delete it first.")
    rules = load_policy(policy)
    if source.startswith(("http://", "https://")):
        raise UserError(
            f"SOURCE must be a classifier's folder or the word judge, got {source!r}. A judge's address is named when it is used: "
            f"--detector {folder}@{source}"
        )
    if source == "judge":
        _refuse({"--map": named, "--threshold": threshold, "--map-file": map_file, "--copy": copy}, "a judge")
        kept = import_judge(folder, rules, category, record(ctx, JudgeOptions))
    else:
        asked = {f"--{name.replace('_', '-')}": value for name, value in changes(ctx, JudgeOptions).items()}
        _refuse({"--category": category, **asked}, "a classifier")
        classes, thresholds = _classes(named, threshold, map_file)
        kept = import_classifier(Path(source), folder, rules, classes, thresholds, copy=copy)
    report(kept.card, kept, json=json)
    if not json:
        out.print(str(folder), soft_wrap=True)


@app.command("evaluate", epilog="example: valign detector evaluate detectors/mine labelled/ --save")
def evaluate(
    name: Annotated[str, _named("a detector, by name or folder; a judge with @ADDRESS behind it")],
    images: Labelled,
    policy: PolicyName = "",
    named: Names = [],  # noqa: B006
    harmless: Harmless = "harmless",
    per_category: PerCategory = 60,
    seed: Annotated[int, Option(min=0, help="of a world's renders; another than the detector was fitted with")] = 1,
    save: Annotated[
        bool, Option("--save", help="write the error into the detector's folder; later rates are corrected for it")
    ] = False,
    json: Json = False,
) -> None:
    """Measure a detector's sensitivity and specificity on labelled images, with 95 % intervals."""
    from valign.detectors import find_folder
    from valign.detectors.base import chance_notes, check_domain
    from valign.detectors.errors import measure_detector
    from valign.detectors.record import read_record, with_errors, write_record
    from valign.interfaces import KeepsAnswers

    place = find_folder(name.partition("@")[0])
    if save and place is None:
        raise UserError(f"--save needs a detector's folder to write to, {name} has none. Fit or import one, or leave --save out.")
    labelled, world = _labelled(images, policy, named, harmless, per_category, seed)
    detector = resolve_detector(name, model=None)
    check_domain(detector.card, [f"world:{world.name}"] if world else [], f"the folder {images}")
    if place and labelled.fingerprint() == read_record(place).made.get("images_sha256"):
        raise UserError(f"{images} must not be the images that {name} was fitted to, got those. Give others, or show its record.")
    error = measure_detector(detector, labelled.examples)
    card = error.on(detector.card)
    measured = error.record(images=images, sha256=labelled.fingerprint())
    if save and place:
        write_record(place, with_errors(read_record(place), measured, card))
    remarks = [*chance_notes(card, list(card.by_category)), *(detector.remarks() if isinstance(detector, KeepsAnswers) else [])]
    if json:
        out.print_json(data={"detector": name, "images": images, "errors": with_intervals(error.rows), "remarks": remarks})
        return
    out.print(error_table(error.rows, f"{name} on {images}"))
    missing = ", ".join(error.not_measured)
    missed = [f"Not measured, for the detector does not cover it: {missing}."] if missing else []
    for note in [*missed, *remarks, *([f"Written to {place}."] if save else [])]:
        err.print(Text(note, style="dim"))


@app.command(
    "adapt",
    cls=configured(config="valign.training.tasks.condition_robust:AdaptConfig"),
    epilog="example: valign detector adapt oracle --images shapes --test shapes --condition night -o detectors/night",
)
def adapt(
    ctx: Context,
    name: Annotated[str, _named("oracle, a folder of `valign detector fit` or of `valign train hysac`")],
    folder: Output,
    test: Annotated[
        str,
        Option(help="labelled images that the error is measured on, as for evaluate, or a world's name: shapes", callback=there()),
    ],
    images: Annotated[
        str, Option(help="folder of clean images without labels, or a world's name; conditions are made of them", callback=there())
    ] = "",
    pairs: Annotated[
        Path | None, Option(help="folder with clean/ and adverse/ instead: images of equal names show one content")
    ] = None,
    condition: Annotated[
        list[str],
        Option(
            help="jpeg, blur, night, style, upscaling or noise; may be repeated; all if none",
            callback=one_of("--condition", "valign.data.images.conditions:CONDITIONS"),
        ),
    ] = [],  # noqa: B006
    policy: PolicyName = "",
    named: Names = [],  # noqa: B006
    harmless: Harmless = "harmless",
    per_category: PerCategory = 40,
    runs: Annotated[Path | None, Option(help="folder of the training, which resumes; OUT.run if left out")] = None,
    json: Json = False,
) -> None:
    """Adapt a detector to bad conditions without labels, and measure it under each, before and after."""
    from valign.data.images.conditions import CONDITIONS, ImagePair, pairs_of, read_pairs
    from valign.images import image_files
    from valign.recipes.condition_robust import adapt_detector
    from valign.training.tasks.condition_robust import AdaptConfig

    if folder.exists():
        raise UserError(f"{folder} exists. Choose another --out, or delete it first.")
    if bool(images) == (pairs is not None):
        raise UserError("valign detector adapt needs --images IMAGES or --pairs FOLDER, one of the two.")
    config = record(ctx, AdaptConfig)
    found: list[ImagePair]
    if pairs is not None:
        found = read_pairs(pairs)
    elif world := find_world(images):
        found = pairs_of([(one.name, one.source) for one in world.labelled(per_category=per_category, seed=2 + config.seed)])
    elif Path(images).is_dir():
        found = pairs_of([(file.name, file) for file in image_files(Path(images))])
    else:
        raise UserError(f"--images must be a folder of images or a world's name, got {images!r}. Check the path.")
    labelled, _ = _labelled(test, policy, named, harmless, per_category, seed=1_000 + config.seed)
    rows = adapt_detector(
        resolve_detector(name, model=None),
        found,
        labelled,
        folder,
        runs=runs or folder.with_name(f"{folder.name}.run"),
        conditions=condition or list(CONDITIONS),
        config=config,
        origin=images or str(pairs),
    )
    if json:
        out.print_json(data={name: {when: with_intervals([row])[0] for when, row in both.items()} for name, both in rows.items()})
        return
    for when in ("before", "after"):
        err.print(error_table([replace(both[when], category=name) for name, both in rows.items()], when))
    out.print(str(folder), soft_wrap=True)


app.command("search", epilog=SEARCH_EXAMPLE)(search_command)


def _labelled(
    images: str, policy: str, named: Sequence[str], harmless: str, per_category: int, seed: int = 0
) -> tuple[LabelledImages, Any]:
    """The images, and the world that rendered them, or None."""
    from valign.data.images.labelled import gather, read_labelled
    from valign.policy import load_policy

    world = find_world(images)
    if world:
        _refuse({"--map": named, "--policy": policy}, f"renders of the world {images}")
        return gather(world.labelled(per_category=per_category, seed=seed), f"world {images}"), world
    known = load_policy(policy or "default").category_ids()
    return read_labelled(Path(images), known=known, named=_texts_by_name("--map", named), harmless=harmless), None


def _classes(named: Sequence[str], threshold: Sequence[str], file: Path | None) -> tuple[dict[str, str], dict[str, float]]:
    """Class -> category, and category -> threshold, "" for all categories."""
    from valign.cli.options import read_config

    classes, thresholds = (
        _texts_by_name("--map", named),
        numbers_by_name("--threshold", [text if "=" in text else f"={text}" for text in threshold]),
    )
    if file is None:
        return classes, thresholds
    if named or threshold:
        raise UserError("--map-file holds the map and the thresholds: leave --map and --threshold out.")
    held = read_config(file)
    if unknown := sorted(set(held) - {"map", "thresholds"}):
        raise UserError(f"{file} must hold map and thresholds, got {unknown[0]}.")
    limits = held.get("thresholds", {})
    limits = limits if isinstance(limits, dict) else {"": limits}
    pairs = held.get("map") or {}
    if not isinstance(pairs, dict):
        raise UserError(f"{file}: map must be CLASS: CATEGORY lines, got {type(pairs).__name__}.")
    return {str(key): str(value) for key, value in pairs.items()}, numbers_by_name(
        f"{file}: thresholds", [f"{key}={value}" for key, value in limits.items()]
    )


def _texts_by_name(option: str, texts: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or not name or not value:
            raise UserError(f"{option} must be NAME=CATEGORY, got {text!r}. For example {option} nsfw=sexual")
        found[name] = value
    return found


def _refuse(options: Mapping[str, Any], who: str) -> None:
    """Raise UserError for an option that was given and does nothing."""
    if given := [name for name, value in options.items() if value]:
        raise UserError(f"{given[0]} has no effect on {who}. Leave it out.")
