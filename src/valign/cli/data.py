"""``valign data``: build preference data, and look at prompt files and finished sets."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.table import Table
from typer import Argument, Context, Option, Typer

from valign.checks import UserError, option
from valign.cli.common import (
    AsJson,
    PromptTableOptions,
    err,
    out,
    print_measured,
    resolve_detector,
    resolve_grammar,
    resolve_model,
    there,
)
from valign.cli.early import refuse_categories
from valign.cli.options import changes, configured, record

if TYPE_CHECKING:
    from valign.data.prompts.sources import Source
    from valign.data.prompts.tables import TableReading
    from valign.policy import Policy

app = Typer(no_args_is_help=True, help="Prompt pairs, image pairs and cached latents for preference training.")

Retain = Annotated[Path | None, Option("--retain", help="file of benign prompts on which training should leave the model as it is")]
GENERATING = {"pairing", "strength", "steps", "guidance_scale"}  # options that only generated images depend on
PolicyName = Annotated[str, Option("--policy", "-p", help="a bundled policy (default, shapes) or a YAML file")]


@dataclass(frozen=True, kw_only=True)
class SourceOptions(PromptTableOptions):
    """Where prompt pairs come from."""

    source: str | None = option(None, help="found out from the other options if left out", choices=("grammar", "chat", "file"))
    prompts: Path | None = option(
        None, help="file of prompt pairs, or of unsafe prompts whose safe counterparts the chat model writes"
    )
    from_attacks: tuple[Path, ...] = option(
        (), help="run of `valign attack`: what it found becomes pairs, beside those of --source or --prompts where one is named"
    )
    drop_missing: bool = option(
        False, help="leave out pairs whose safe counterpart is missing instead of stopping", needs={"prompts": ()}
    )
    endpoint: str | None = option(None, help="address of an OpenAI-compatible chat endpoint, e.g. http://localhost:8000/v1")
    chat_model: str | None = option(None, help="name of the chat model at the endpoint", needs={"endpoint": ()})
    api_key_env: str | None = option(
        None, help="environment variable that holds the endpoint's key, if it needs one", needs={"endpoint": ()}
    )
    per_concept: int | None = option(None, help="pairs to ask the chat model for, per concept", low=1, needs={"endpoint": ()})

    def open(self, policy: "Policy") -> "Source":
        """The source. Raises: UserError if an option is missing that its kind needs."""
        if not self.from_attacks:
            return self._open(policy)
        from valign.data.prompts.sources import AttackSource

        named = self.source or self.prompts or self.endpoint
        return AttackSource(self.from_attacks, self._open(policy) if named else None)

    def _open(self, policy: "Policy") -> "Source":
        from valign.data.prompts.records import named_columns
        from valign.data.prompts.sources import ChatSource, FileSource, GrammarSource

        given = self.reading()
        reading: dict[str, Any] = {"fmt": self.format, "columns": named_columns(given.columns), "fill": given.fill}
        kind = self.source or ("chat" if self.endpoint else "file" if self.prompts else "grammar")
        if kind == "grammar":
            return GrammarSource(resolve_grammar(policy))
        if kind == "file":
            if self.prompts is None:
                raise UserError("--source file needs --prompts FILE. Name the file of prompt pairs.")
            return FileSource(self.prompts, **reading, missing_twin="drop" if self.drop_missing else "refuse")
        if not self.endpoint or not self.chat_model:
            raise UserError("--source chat needs --endpoint URL and --chat-model NAME. Any OpenAI-compatible server will do.")
        from valign.models.language.chat import OpenAIChat

        client = OpenAIChat(base_url=self.endpoint, model=self.chat_model, api_key_env=self.api_key_env)
        return ChatSource(client, self.chat_model, self.prompts, **reading, per_concept=self.per_concept)


@app.command(
    cls=configured(
        pipeline=True,
        early=lambda params, given: refuse_categories(params["policy"], given.get("--category", ())),
        data="valign.data.build:DataConfig",
        source=SourceOptions,
    ),
    epilog="example: valign data build --model shapes --policy shapes -o runs/data --pairs 40 --steps 20",
)
def build(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to align: shapes, a pipeline folder or a hub id")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the data set; an unfinished one is resumed")],
    policy: PolicyName = "default",
    retain: Retain = None,
    detector: Annotated[
        str | None,
        Option("--detector", "--filter-detector", help="oracle, nudenet, safety-checker=FOLDER, or a detector's name or folder"),
    ] = None,
    images: Annotated[
        Path | None, Option(help="folder of ready images of these pairs (CoProV2 names) instead of generating")
    ] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Build a data set: prompt pairs, their images, and the latents that training reads. Run it again to resume."""
    from valign.data.build import DataConfig, build_data
    from valign.files import read_json
    from valign.policy import load_policy

    rules = load_policy(policy)
    if images and (idle := sorted(set(changes(ctx, DataConfig)) & GENERATING)):
        raise UserError(f"--{idle[0].replace('_', '-')} has no effect with --images: no image is generated. Leave one of them out.")
    source = record(ctx, SourceOptions)
    retained = {"retain": read_retained(retain, rules, source.reading())} if retain else {}
    config, origin = record(ctx, DataConfig, **retained), source.open(rules)
    judge = resolve_detector(detector, model=model) if detector else None
    cache = build_data(resolve_model(model, device=device), rules, origin, folder, config, detector=judge, images=images)
    made = read_json(folder / "images" / "run.json")["results"]["per_category"]
    asked = config.categories or rules.category_ids()
    _print_counts({name: made.get(name, {"pairs": 0, "kept": 0}) for name in asked})
    err.print(f"contact sheet: {folder / 'images' / 'contact_sheet.png'}", style="dim", soft_wrap=True)
    out.print(f"{folder}: {len(cache)} pairs ready for training", soft_wrap=True)


@app.command(
    "build-values",
    cls=configured(pipeline=True, data="valign.data.images.value_sets:ValueDataConfig"),
    epilog="example: valign data build-values --model shapes --policy shapes -o runs/values --steps 20 --no-flip "
    "--filter judge --detector oracle --clip oracle",
)
def build_values_(
    ctx: Context,
    model: Annotated[str, Option("--model", "-m", help="the model to guide: shapes, a pipeline folder or a hub id")],
    folder: Annotated[Path, Option("--out", "-o", help="folder of the data set; an unfinished one is resumed")],
    policy: PolicyName = "default",
    pairs: Annotated[
        Path | None, Option(help="data set of `valign data build`: its prompt pairs are the scenes of their categories' principles")
    ] = None,
    detector: Annotated[
        str | None, Option(help="judges harm: oracle, nudenet, safety-checker=FOLDER, or a detector's name or folder")
    ] = None,
    clip: Annotated[str | None, Option(help="judges the rest: a folder of a CLIP model, shapes or oracle")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
) -> None:
    """Generate images that keep and break the policy's principles, for `valign train livo`. Run it again to resume."""
    from valign.cli.common import resolve_contrast
    from valign.data.images.value_sets import ValueDataConfig, build_values
    from valign.data.prompts.pairs import load_pairs
    from valign.files import read_json
    from valign.policy import load_policy

    rules = load_policy(policy)
    config = record(ctx, ValueDataConfig)
    judges: dict[str, Any] = {
        "detector": resolve_detector(detector, model=model) if detector else None,
        "contrast": resolve_contrast(clip, model=model),
    }
    scenes = load_pairs(pairs / "prompts" / "pairs.parquet") if pairs else []
    cache = build_values(resolve_model(model, device=device), rules, folder, config, pairs=scenes, **judges)
    found = read_json(folder / "images" / "run.json")["results"]["per_principle"]
    reasons = sorted({name for counts in found.values() for name in counts} - {"scenes", "aligned", "violating"})
    table = Table("principle", box=None, header_style="bold")
    for heading in ("scenes", "aligned", "violating", *reasons):
        table.add_column(heading, justify="right")
    for name, counts in found.items():
        table.add_row(name, *(str(counts.get(column, 0)) for column in ("scenes", "aligned", "violating", *reasons)))
    out.print(table)
    out.print(f"{folder}: {len(cache)} images ready for training", soft_wrap=True)


@app.command(cls=configured(table=PromptTableOptions), epilog="example: valign data read coprov2.csv --against i2p.csv")
def read(
    ctx: Context,
    file: Annotated[Path, Argument(help="csv, tsv, json, jsonl (also .gz), parquet or txt")],
    against: Annotated[Path | None, Option(help="another file; counts how many of its prompts are in FILE too")] = None,
    policy: PolicyName = "default",
    drop_missing: Annotated[
        bool, Option("--drop-missing", help="count pairs whose safe counterpart is missing instead of stopping")
    ] = False,
) -> None:
    """Count what a prompt file holds, by category and kind. Prompts are never printed."""
    from valign.data.prompts.overlap import measure_overlap
    from valign.data.prompts.pairs import count_categories
    from valign.data.prompts.readers import PairFile, scan_pairs, scan_prompts
    from valign.data.prompts.records import prompt_texts
    from valign.policy import load_policy

    given = record(ctx, PromptTableOptions)
    fmt, reading = given.format, given.reading()
    options: dict[str, Any] = {"reading": reading, "known": load_policy(policy).category_ids()}
    prompts = scan_prompts(file, fmt, **options)
    linked = any(row.pair for row in prompts.rows)
    pairs = scan_pairs(file, fmt, missing_twin="drop" if drop_missing else "refuse", **options) if linked else PairFile([])
    table = Table("category", "kind", box=None, header_style="bold")
    for heading in ("unsafe", "safe", "pairs"):
        table.add_column(heading, justify="right")
    per_category = count_categories(pairs.pairs)
    cells = sorted({(name, row.kind) for row in prompts.rows for name in row.categories or ("",)})
    for name, kind in cells:
        rows = [row for row in prompts.rows if row.kind == kind and (name in row.categories or (not name and not row.categories))]
        unsafe = sum(row.label for row in rows)
        first = (name, kind) == next(cell for cell in cells if cell[0] == name)
        table.add_row(
            name or "(none)", kind or "-", str(unsafe), str(len(rows) - unsafe), str(per_category.get(name, 0)) if first else ""
        )
    out.print(table)
    unsafe = sum(row.label for row in prompts.rows)
    out.print(
        f"{len(prompts.rows)} prompts ({unsafe} unsafe, {len(prompts.rows) - unsafe} safe), {len(pairs.pairs)} distinct pairs"
    )
    several = sum(len(pair.categories) > 1 for pair in pairs.pairs)
    if several:
        out.print(f"{several} pairs belong to several categories and count in each")
    for reason, count in {**prompts.dropped, **pairs.dropped}.items():
        out.print(f"not used: {count} {reason.replace('_', ' ')}")
    if against:
        seen = measure_overlap(prompt_texts(against, reading=reading.beside("against")), prompts.rows)
        out.print(f"{seen.rows} of {seen.test} prompts ({seen.share:.1%}) stand in {against.name} too", soft_wrap=True)


@app.command(cls=configured(table=PromptTableOptions), epilog="example: valign data overlap train.csv test.csv -o test-clean.jsonl")
def overlap(
    ctx: Context,
    train: Annotated[Path, Argument(help="file of training prompts")],
    test: Annotated[Path, Argument(help="file of test prompts")],
    target: Annotated[
        Path | None, Option("--out", "-o", help="write the test rows that are not training prompts, as jsonl")
    ] = None,
    policy: PolicyName = "default",
    as_json: AsJson = False,
) -> None:
    """Count test prompts that are in the training file too, case and spaces aside; with --out, write the others."""
    import json
    from dataclasses import asdict, replace

    from valign.data.prompts.overlap import without_overlap
    from valign.data.prompts.readers import scan_prompts
    from valign.data.prompts.records import prompt_texts
    from valign.files import write_text
    from valign.policy import load_policy

    given, known = record(ctx, PromptTableOptions), load_policy(policy).category_ids()
    reading = replace(given.reading(), strict=False)  # either file may have the named column
    tested = scan_prompts(test, given.format, reading=reading, known=known)
    kept, found = without_overlap(prompt_texts(train, reading=reading.beside()), tested.rows)
    told = f"{found.rows} of {found.test} test rows ({found.share:.1%}; {found.distinct} distinct prompts) stand in {train.name}"
    print_measured({**asdict(found), "share": found.share}, told, as_json=as_json)
    if target:
        write_text(target, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in kept))
        (err if as_json else out).print(f"{target}: {len(kept)} rows", soft_wrap=True)


@app.command(epilog="example: valign data sheet runs/data -o pairs.png --per-category 8")
def sheet(
    folder: Annotated[Path, Argument(help="a data set made by `valign data build`", callback=there())],
    target: Annotated[Path | None, Option("--out", "-o", help="PNG to write; FOLDER/images/contact_sheet.png if left out")] = None,
    per_category: Annotated[int, Option(min=1, help="pairs shown of each category")] = 4,
    columns: Annotated[int, Option(min=1, help="pairs side by side")] = 4,
    image: Annotated[int, Option("--image", "--picture", min=32, help="side of one image, pixels")] = 128,
    show_prompts: Annotated[
        bool, Option("--show-prompts/--hide-prompts", help="real unsafe prompts hold slurs: hidden by default")
    ] = False,
    policy: PolicyName = "default",
) -> None:
    """Write a contact sheet of the image pairs, unsafe beside safe."""
    from valign.data.images.contact_sheet import SheetLayout, write_contact_sheet
    from valign.data.images.rows import load_image_rows
    from valign.data.prompts.pairs import load_pairs
    from valign.policy import load_policy

    images = folder / "images"
    path = target or images / "contact_sheet.png"
    layout = SheetLayout(image=image, columns=columns, per_category=per_category, show_prompts=show_prompts)
    titles = {category.id: category.title for category in load_policy(policy).categories}
    pairs = load_pairs(folder / "prompts" / "pairs.parquet")
    write_contact_sheet(pairs, load_image_rows(images), images, path, titles=titles, layout=layout)
    out.print(str(path), soft_wrap=True)


def read_retained(path: Path | None, policy: "Policy", reading: "TableReading | None" = None) -> tuple[str, ...]:
    """The distinct benign prompts of a file: the rows that it labels 0, or all if it has no labels; () for None.

    Args: reading: Of a table beside the command's own.
    """
    from dataclasses import replace

    from valign.data.prompts.readers import scan_prompts
    from valign.data.prompts.tables import AS_IT_IS

    if path is None:
        return ()
    as_safe = replace((reading or AS_IT_IS).beside("retain"), fill={"label": 0})
    rows = scan_prompts(path, reading=as_safe, known=policy.category_ids()).rows
    found = tuple(dict.fromkeys(row.prompt for row in rows if row.label == 0))
    if not found:
        raise UserError(f"{path} must hold benign prompts (label 0, or no labels), got none. Give another file.")
    return found


def _print_counts(counts: dict[str, dict[str, int]]) -> None:
    reasons = sorted({name for found in counts.values() for name in found} - {"pairs", "kept"})
    table = Table("category", box=None, header_style="bold")
    for heading in ("pairs", "kept", *reasons):
        table.add_column(heading, justify="right")
    for name, found in counts.items():
        table.add_row(name, *(str(found.get(column, 0)) for column in ("pairs", "kept", *reasons)))
    out.print(table)
