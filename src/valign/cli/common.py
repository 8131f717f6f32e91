"""What commands share: a name on the command line -> a model, suite, detector or reader. Heavy imports wait until called."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from typer import Option

from valign.checks import UserError, check_choice, option
from valign.cli.quick import known_names
from valign.progress import plain_console

if TYPE_CHECKING:
    from rich.console import RenderableType

    from valign.data.prompts.tables import TableReading
    from valign.detectors import Detector, OracleDetector
    from valign.models.diffusion.base import DiffusionModel
    from valign.models.language.chat import ChatModel
    from valign.policy import Policy
    from valign.worlds import World

PANEL = "How much is said"  # of the help
AsJson = Annotated[bool, Option("--json", help="everything that was measured, as JSON on stdout", rich_help_panel=PANEL)]
Function = TypeVar("Function", bound=Callable[..., Any])

BUDGETS = ("small", "quick", "full")  # of benches on worlds


def one_of(flag: str, *names: str) -> Callable[[Any], Any]:
    """A callback of typer that refuses other values before the command imports a library; an empty one passes.

    Args: names: Or tables of them, as ``"module:TABLE"``, which are read from the source.
    """

    def check(value: Any) -> Any:
        for one in (value,) if isinstance(value, str) else value:
            if one:
                check_choice(flag, one, known_names(names))
        return value

    return check


def there(*names: str, named: bool = False) -> Callable[[Any], Any]:
    """A callback of typer that refuses what is read and does not exist, before the command imports a library.

    Args:
        names: What else an argument may be: words of the command, besides worlds and addresses.
        named: Whether a name may stand before the path: NAME=PATH.
    """

    def check(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else (value,):
            if one is not None:
                refuse_absent(str(one).partition("=")[2] or one if named and not Path(str(one)).exists() else one, names)
        return value

    return check


def checked(check: Callable[[str, str], None], flag: str) -> Callable[[Any], Any]:
    """A callback of typer that refuses what ``check`` refuses under this name, before the command imports a library."""

    def each(value: Any) -> Any:
        for one in value if isinstance(value, list | tuple) else (value,):
            if one:
                check(flag, str(one))
        return value

    return each


Budget = Annotated[str, Option(help="small (tries the path, proves nothing), quick or full", callback=one_of("--budget", *BUDGETS))]
out = plain_console(stderr=False)  # results, on stdout
err = plain_console(stderr=True)  # progress and remarks, on stderr


def example(text: str, *, cls: type[Any] | None = None) -> Callable[[Function], Function]:
    """Give a single command (a function, not a `Typer` group) the example shown under its help, and its class, if it has one."""

    def mark(function: Function) -> Function:
        function.options = {"epilog": f"example: {text}", "cls": cls}  # type: ignore[attr-defined]
        return function

    return mark


def print_measured(measured: Any, otherwise: RenderableType, *, as_json: bool) -> None:
    """The one result on stdout: all that was measured as JSON, or ``otherwise``, such as the path of a report."""
    if as_json:
        out.print_json(data=measured)
    else:
        out.print(otherwise, soft_wrap=isinstance(otherwise, str))


def setting(text: str) -> tuple[str, Any]:
    """``name=value``; the value is read as YAML, so 1.0e-4 is a number, true a truth value and null leaves the preset's."""
    import yaml

    name, separator, value = text.partition("=")
    if not separator or not name:
        raise UserError(f"--set must be NAME=VALUE, got {text!r}. Example: --set rank=8")
    return name, yaml.safe_load(value)


def numbers_by_name(option: str, texts: Sequence[str]) -> dict[str, float]:
    """``NAME=NUMBER`` -> number by name. Raises: UserError for another form."""
    numbers: dict[str, float] = {}
    for text in texts:
        name, _, value = text.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise UserError(f"{option} must be NAME=NUMBER, got {text!r}. For example {option} hate=0.5.") from None
    return numbers


Anyway = Annotated[bool, Option("--anyway", help="also load an adapter whose record names another base model or prediction type")]


def values_by_name(option: str, texts: Sequence[str]) -> dict[str, str]:
    """``NAME=VALUE`` -> value by name. Raises: UserError for another form."""
    pairs = [text.partition("=") for text in texts]
    bad = [text for text, (name, sign, _) in zip(texts, pairs, strict=True) if not name or not sign]
    if bad:
        raise UserError(f"{option} must be NAME=VALUE, got {bad[0]!r}.")
    return {name: value for name, _, value in pairs}


def refuse_absent(place: str | Path, names: Collection[str] = ()) -> None:
    """Refuse a path to read that is not there, before anything is imported that takes seconds.

    Args: names: What else the argument may be: words of the command, besides worlds and addresses.
    Raises: UserError that names it.
    """
    from valign.cli.quick import bundled

    if "://" not in str(place) and str(place) not in (*bundled(), *names) and not Path(place).expanduser().exists():
        raise UserError(f"{place} does not exist. Check the path.")


def find_world(name: str) -> World | None:
    """The world of this name, or None if it is the name of something else."""
    from valign.worlds import WORLDS

    return WORLDS.get(name)


def find_oracle(name: str) -> OracleDetector | None:
    """As `valign.worlds.find_oracle`, imported when it is called."""
    from valign import worlds

    return worlds.find_oracle(name)


def resolve_model(name: str, **options: Any) -> DiffusionModel:
    """A world's bundled model by its name, such as ``shapes``; otherwise a pipeline folder or a hub id."""
    from valign.models.diffusion.loading import load_model

    world = find_world(name)
    return load_model(world.model_folder() if world else name, **options)


def check_adapters(model: str, adapters: Iterable[Path], *, anyway: bool) -> None:
    """Refuse adapters of another model before any weight is loaded. Of a model that is not here yet, loading says it.

    Args:
        model: As `resolve_model` takes it.
        anyway: Only warn.
    """
    from valign.models.diffusion.adapter_base import check_base
    from valign.models.files.adapter_files import open_adapter
    from valign.models.files.hub import local_folder

    world, files = find_world(model), [open_adapter(adapter) for adapter in adapters]
    folder = world.model_folder() if world else local_folder(model)
    if folder is not None and (folder / "model_index.json").is_file():
        for file in files:
            check_base(folder, file, anyway=anyway)


def resolve_suite(name: str, policy: Policy, table: PromptTableOptions | None = None, *, beside: TableReading | None = None) -> Any:
    """A world's test suite by its name, such as ``shapes``; otherwise a file of prompts with labels, or of a suite.

    Args: table, beside: How it is read as the command's own table, or beside that.
    """
    from valign.data.prompts.tables import AS_IT_IS
    from valign.evaluation.suite_files import read_suite

    world = find_world(name)
    if world:
        return world.suite()
    reading = table.reading() if table else beside or AS_IT_IS
    return read_suite(name, table.format if table else None, reading=reading, known=policy.category_ids())


def resolve_detector(names: str | Sequence[str], *, model: str | None = None) -> Detector:
    """A detector by name or folder, as `valign.detectors.build` takes it, or several as one; ``oracle`` or ``shapes`` is a world's.

    Args: model: As `resolve_model` takes it, whose images are judged; only its files are looked at. None: the caller checks.
    Raises: UserError for an unknown detector, and for one that cannot judge images of this model.
    """
    from valign.detectors import build
    from valign.detectors.base import check_domain

    detector = build(names, oracle=find_oracle)
    if model is not None:
        check_domain(detector.card, origins_of(model), model)
    return detector


def origins_of(model: str) -> tuple[str, ...]:
    """Of a world's bundled model, a folder, or a hub model that is in the cache; empty for what is not here."""
    from valign.models.files.hub import local_folder
    from valign.models.files.origin import model_origins

    world = find_world(model)
    folder = world.model_folder() if world else local_folder(model)
    return model_origins(folder) if folder else ()


def _check_world(option: str, world: World, model: str) -> None:
    """Refuse a world's own instrument for another's images."""
    if not set(world.origins) & set(origins_of(model)):
        raise UserError(
            f"{option} must not be of the world {world.name} for {model}, which is not one of its models: its numbers would mean "
            "nothing. Leave it out, or name another."
        )


@dataclass(frozen=True, kw_only=True)
class TableOptions:
    """How the columns of the command's tables are read."""

    column: tuple[str, ...] = option(
        (), help="NAME=THEIRS: the file's own name of a column, as prompt=caption; another table's: OPTION.NAME=THEIRS"
    )
    fill: tuple[str, ...] = option((), help="NAME=VALUE: what the file lacks or leaves blank, e.g. label=1 or category=hate")

    def reading(self) -> TableReading:
        """Raises: UserError for another form than NAME=VALUE."""
        from valign.data.prompts.tables import TableReading

        columns, of_others = dict[str, str](), dict[str, dict[str, str]]()
        for name, theirs in values_by_name("--column", self.column).items():
            table, separator, inner = name.partition(".")
            (of_others.setdefault(table, {}) if separator else columns)[inner or name] = theirs
        return TableReading(columns=columns, fill=values_by_name("--fill", self.fill), of_others=of_others)


@dataclass(frozen=True, kw_only=True)
class PromptTableOptions(TableOptions):
    """How the command's tables of prompts are read."""

    format: str | None = option(None, help="layout of the prompt file, e.g. plain, coprov2 or i2p; told by its columns if left out")

    def reading(self, also: Collection[str] = ()) -> TableReading:
        """Raises: UserError also for a column that neither prompts have nor ``also``, the columns of a second table."""
        from valign.data.prompts.records import named_columns

        found = super().reading()
        for columns in (found.columns, *found.of_others.values()):
            named_columns({name: theirs for name, theirs in columns.items() if name not in also})
        return found


@dataclass(frozen=True, kw_only=True)
class EvaluatorOptions:
    """What looks at the images, by name; empty leaves it to the command."""

    detector: tuple[str, ...] = option(
        (),
        help="detector that judges the images: oracle, nudenet, safety-checker=FOLDER, a detector's name or folder, a judge's "
        "FOLDER@ADDRESS; several are joined, and how far they agree is reported",
    )
    fidelity: str = option("", help="what tells whether benign images are right: oracle or none")
    clip: str = option("", help="CLIP for CLIPScore and drift: shapes, a folder, or none")


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """A chat model that judges and rewrites, as a command names it."""

    chat: str | None = option(
        None, help="OpenAI-compatible endpoint, or a folder with a local chat model, that judges and rewrites"
    )
    chat_model: str = option("default", help="model that the endpoint serves", needs={"chat": ()})
    key_env: str | None = option(None, help="environment variable with the endpoint's key", needs={"chat": ()})

    def load(self) -> ChatModel | None:
        """The chat model; None where none was named."""
        return resolve_chat(self.chat, model=self.chat_model, key_env=self.key_env) if self.chat else None


@dataclass(frozen=True, kw_only=True)
class GuardParts:
    """The guard's own trained parts."""

    head: Path | None = option(None, help="the guard's head, made by `valign guard fit`; the shipped one if left out")
    edits: Path | None = option(
        None, help="the guard's editing model, made by `valign guard fit-rewriter`; the shipped one if left out"
    )


def resolve_chat(place: str, *, model: str, key_env: str | None = None, temperature: float = 0.0) -> ChatModel:
    """A chat model that judges or answers: an endpoint's address, behind a circuit breaker, or a folder with a local model."""
    if not place.startswith(("http://", "https://")):
        from valign.models.language.local import LocalChat

        return LocalChat(place, temperature=temperature)
    from valign.models.language.breaker import CircuitBreaker
    from valign.models.language.chat import OpenAIChat

    return CircuitBreaker(OpenAIChat(base_url=place, model=model, api_key_env=key_env, temperature=temperature, retries=1))


def resolve_fidelity(name: str | None, *, model: str) -> Any:
    """A reader that tells whether an image of ``model`` shows what was asked: ``oracle`` or ``shapes``; None for ``none``."""
    if name in (None, "", "none"):
        return None
    if oracle := find_oracle(str(name)):
        from valign.detectors.base import check_domain

        check_domain(oracle.card, origins_of(model), model)
        return oracle
    raise UserError(f"fidelity must be oracle or none; got {name!r}. Only the shapes world has an exact reader.")


def resolve_clip(name: str | None, *, model: str | None = None) -> Any:
    """A world's own CLIP by its name, such as ``shapes``, for its models; otherwise a folder of a CLIP model; None for ``none``."""
    if name in (None, "", "none"):
        return None
    from valign.models.encoders.clip import ClipEncoder

    world = find_world(str(name))
    if world and model is not None:
        _check_world("--clip", world, model)
    return world.clip() if world else ClipEncoder(Path(str(name)))


def resolve_contrast(name: str | None, *, model: str) -> Any:
    """A model that tells which of two texts fits an image: ``oracle`` is the first world's, else a CLIP as in `resolve_clip`."""
    if name != "oracle":
        return resolve_clip(name, model=model)
    from valign.worlds import WORLDS

    world = next(iter(WORLDS.values()))
    _check_world("--clip", world, model)
    return world.contrast(world.oracle())


def resolve_grammar(policy: Policy) -> Any:
    """The grammar that makes prompt pairs for the policy of a world: ``.pairs(category, count, seed)``."""
    from valign.worlds import WORLDS

    for world in WORLDS.values():
        if world.policy in (policy.id, policy.extends):
            return world.grammar()
    raise UserError(
        f"policy {policy.id} has no grammar that makes prompt pairs."
        " Give a chat endpoint or a file of prompts; `valign data build --help` shows how."
    )
