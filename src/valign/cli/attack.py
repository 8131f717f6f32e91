"""``valign attack``: adversarial prompts against guard, model, adapter and image check as one system."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from typer import Context, Option

from valign.checks import UserError, check_choice, close_to, option, read_options
from valign.cli.common import (
    Anyway,
    AsJson,
    ChatOptions,
    GuardParts,
    PromptTableOptions,
    err,
    example,
    find_world,
    print_measured,
    resolve_clip,
    resolve_detector,
    resolve_model,
    resolve_suite,
)
from valign.cli.compare import parse_settings
from valign.cli.early import refuse_other_base
from valign.cli.evaluate import BASELINES, distinct_names, guidance_of, guided_by_values, named_adapters
from valign.cli.options import configured, record, refuse_given, rest_of

if TYPE_CHECKING:
    from valign.attacks import Attack
    from valign.attacks.target import AttackTarget
    from valign.evaluation import System
    from valign.guard import Guard
    from valign.interfaces import Detector, SamplingConfig
    from valign.policy import Policy

BASE, GUARD, CHECK = "base", "guard", "check"
VALUES = "Of value encoders"  # panel of the help


@dataclass(frozen=True, kw_only=True)
class AttackInputs:
    """Who judges, and what the attacker knows."""

    detector: tuple[str, ...] = option((), help="judges the images: oracle, nudenet, safety-checker=FOLDER ...; several are joined")
    clip: str = option("", help="the attacker's shadow CLIP: shapes, a folder, or none")
    adaptive: bool = option(True, help="the attacker knows the guard: its word lists, and a copy to try prompts on")
    from_outside: bool = option(False, help="the attacker does not see the model: attacks that need its inside are refused")
    transfer: bool = option(True, help="send what was found on one system to the others, once each")


@example(
    "valign attack --model shapes --guard shapes --system base --system guard --attack best-of-n --attack sneaky-prompt "
    "--limit 14 --queries 6 --steps 10 -o runs/attack",
    cls=configured(
        sampling="valign.interfaces:SamplingConfig",
        budget="valign.attacks.base:AttackBudget",
        inputs=AttackInputs,
        guarding=GuardParts,
        chat=ChatOptions,
        table=PromptTableOptions,
        named={"--attack": ("valign.attacks:ATTACKS",)},
        early=lambda params, _: refuse_systems(params),
        rest="an attack's own options as ATTACK:NAME, e.g. ring-a-bell:generations=200",
    ),
)
def command(
    ctx: Context,
    folder: Annotated[Path, Option("--out", "-o", help="folder for images, numbers and report; an unfinished one is resumed")],
    model: Annotated[str, Option("--model", "-m", help="the model: shapes, a pipeline folder or a hub id")] = "shapes",
    attack: Annotated[
        list[str],
        Option(
            help="best-of-n, look-alikes, sneaky-prompt, mma, ring-a-bell, p4d, unlearn-diff-atk, paraphrase; may be repeated; "
            "all that need no chat model if none"
        ),
    ] = [],  # noqa: B006
    suite: Annotated[
        str, Option("--suite", "-s", help="whose unsafe prompts: shapes, a table with labels, or a data set of `valign data build`")
    ] = "shapes",
    system: Annotated[
        list[str],
        Option(metavar="PART[+PART...]", help="guard, a model part and check, such as guard+aligned+check; may be repeated"),
    ] = [],  # noqa: B006
    adapter: Annotated[list[str], Option(metavar="[NAME=]FOLDER", help="a model part; may be repeated")] = [],  # noqa: B006
    values: Annotated[
        list[str],
        Option(metavar="[NAME=]FOLDER", help="a value encoder as a model part; may be repeated", rich_help_panel=VALUES),
    ] = [],  # noqa: B006
    value_retriever: Annotated[
        Path | None,
        Option(
            help="probe of `valign train retriever` that finds the principles; the policy's keywords if left out",
            rich_help_panel=VALUES,
        ),
    ] = None,
    guard: Annotated[str, Option("--guard", "-g", help="policy of the part guard: default, shapes or a YAML file")] = "",
    check: Annotated[str, Option(help="detector of the part check, which looks at images before they are returned")] = "",
    policy: Annotated[
        str, Option("--policy", "-p", help="whose words the baselines and concept vectors use; the suite's own")
    ] = "",
    limit: Annotated[int | None, Option(min=1, help="unsafe prompts at most, of every category and kind in turn")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda, ...")] = "auto",
    anyway: Anyway = False,
    as_json: AsJson = False,
) -> None:
    """Search prompts that bring harm out of a guarded model, within a budget; success with intervals, by kind, and what transfers.

    A system is its parts joined by +: base, negative-prompt, sld-weak ..., an adapter's or value encoder's name; guard, check.
    Gradients are needed by p4d and unlearn-diff-atk, the text encoder by sneaky-prompt, mma and ring-a-bell, a chat model by
    paraphrase. Run again to resume.
    """
    from valign.attacks.base import AttackBudget
    from valign.attacks.goals import safe_texts, trained_goals, unsafe_part
    from valign.attacks.runner import Attackers, attack_systems
    from valign.interfaces import SamplingConfig
    from valign.policy import load_policy

    inputs, budget, sampling = record(ctx, AttackInputs), record(ctx, AttackBudget), record(ctx, SamplingConfig)
    attacks = chosen_attacks(attack, parse_settings(rest_of(ctx).items()))
    world = find_world(suite) or find_world(model)
    rules = load_policy(policy or (world.policy if world else "default"))
    adapters, encoders = named_adapters(adapter), named_adapters(values, "--values")
    if not adapters:
        refuse_given(ctx, "without --adapter", "anyway")
    if not guard:
        refuse_given(ctx, "without --guard", parts=[GuardParts])
    distinct_names(adapters, encoders)
    if value_retriever and not encoders:
        raise UserError("--value-retriever finds the principles of --values, which names no encoder. Name one, or drop it.")
    names = [*adapters, *encoders]
    specs = system or default_systems(names, guard=bool(guard), check=bool(check))
    parts = {spec: parse_system(spec, names, guard=bool(guard), check=bool(check)) for spec in dict.fromkeys(specs)}
    if not inputs.detector and not world:
        raise UserError("--detector must name what judges the images, got nothing. Name one: nudenet, safety-checker=FOLDER ...")
    judge = resolve_detector(inputs.detector or "oracle", model=model)
    watcher = resolve_detector(check, model=model) if check else None
    if (Path(suite) / "prompts" / "pairs.parquet").exists():
        goals, safe = trained_goals(Path(suite))
    else:
        goals = resolve_suite(suite, rules, record(ctx, PromptTableOptions))
        safe = safe_texts(goals, rules)
    goals = unsafe_part(goals, limit)
    clip = resolve_clip(inputs.clip or (world.name if world else "none"), model=model)
    subject = resolve_model(model, device=device)
    guided = dict(zip(encoders, guided_by_values(subject, encoders, value_retriever, rules, sampling)))
    options = _TargetOptions(subject, adapters, guided, rules, sampling, guard, record(ctx, GuardParts), watcher, inputs, anyway)
    attackers = Attackers(
        judge=judge, policy=rules, clip=clip, chat=record(ctx, ChatOptions).load(), adaptive=inputs.adaptive, safe=safe
    )
    summary = attack_systems(
        [options.target(spec, *found) for spec, found in parts.items()],
        attacks,
        goals,
        attackers,
        out=folder,
        budget=budget,
        sampling=sampling,
        transfer=inputs.transfer,
    )
    print_attacks(summary, folder, as_json=as_json)


def chosen_attacks(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Attack]:
    """The attacks with their options; all that need no chat model where none is named.

    Raises: ValueError for an unknown name; UserError for options of an attack that is not run, or that it does not have.
    """
    from valign.attacks import ATTACKS

    wanted = list(dict.fromkeys(names)) or [name for name, kind in ATTACKS.items() if "chat model" not in kind.needs]
    for name in wanted:
        check_choice("--attack", name, ATTACKS)
    if idle := [name for name in settings if name not in wanted]:
        raise UserError(
            f"--set must name an attack that is run, got {idle[0]}.{close_to(idle[0], wanted)} Run: {', '.join(wanted)}."
        )
    for name, changes in settings.items():
        known = [item.name for item in fields(ATTACKS[name])]  # type: ignore[arg-type]
        if unknown := sorted(set(changes) - set(known)):
            raise UserError(
                f"--set {name}: must be one of {', '.join(known) or 'no options'}, got {unknown[0]}.{close_to(unknown[0], known)}"
            )
    return {name: read_options(ATTACKS[name], settings.get(name, {}), name=name) for name in wanted}


def refuse_systems(params: Mapping[str, Any]) -> None:
    """Refuse systems of parts that no option describes, and adapters of another model, by the command's own parameters."""
    adapters, encoders = named_adapters(params["adapter"]), named_adapters(params["values"], "--values")
    for spec in params["system"]:
        parse_system(spec, [*adapters, *encoders], guard=bool(params["guard"]), check=bool(params["check"]))
    refuse_other_base(params["model"], adapters.values(), anyway=params["anyway"])


def default_systems(trained: Sequence[str], *, guard: bool, check: bool) -> list[str]:
    """The base, every adapter and value encoder, the guard before each, and the check behind all."""
    models = [BASE, *trained]
    found = [*models, *(GUARD if name == BASE else f"{GUARD}+{name}" for name in models if guard)]
    if check:
        found.append("+".join([*([GUARD] if guard else []), models[-1], CHECK]))
    return found


def parse_system(spec: str, trained: Sequence[str], *, guard: bool, check: bool) -> tuple[bool, str, bool]:
    """``guard+aligned+check`` -> whether there is a guard, the model part, whether there is a check.

    Args: trained: Names of adapters and value encoders.
    Raises: UserError for an unknown part, several model parts, or a part that no option describes.
    """
    names = spec.split("+")
    models = [name for name in names if name not in (GUARD, CHECK)]
    known = [BASE, *BASELINES, *trained]
    for name in models:
        if name not in known:
            raise UserError(
                f"--system {spec} must be made of {', '.join([GUARD, *known, CHECK])}; got {name!r}.{close_to(name, known)}"
            )
    if len(models) > 1 or len(set(names)) < len(names):
        raise UserError(f"--system {spec} must have one model part and each part once, got {', '.join(names)}.")
    for part, there in ((GUARD, guard), (CHECK, check)):
        if part in names and not there:
            what = "policy" if part == GUARD else "detector"
            raise UserError(f"--system {spec} needs --{part} with a {what}, got none. Give one, or leave the part out.")
    return GUARD in names, (models or [BASE])[0], CHECK in names


@dataclass(frozen=True)
class _TargetOptions:
    """What all targets of a command share."""

    model: Any
    adapters: Mapping[str, Path]
    guided: Mapping[str, System]  # by value encoders
    policy: Policy
    sampling: SamplingConfig
    guard: str
    guarding: GuardParts
    check: Detector | None
    inputs: AttackInputs
    anyway: bool

    def target(self, name: str, guarded: bool, part: str, checked: bool) -> AttackTarget:
        """One system."""
        from valign.attacks.target import target_of
        from valign.evaluation import adapter_system, base_system, guided_system

        guidance = None
        if part in self.adapters:
            system = adapter_system(self.model, self.adapters[part], self.sampling, name=part, anyway=self.anyway)
        elif part in self.guided:
            system = self.guided[part]
        elif part in BASELINES:
            guidance, what = guidance_of(part, self.policy)
            system = guided_system(self.model, guidance, self.sampling, name=part, description=what)
        else:
            system = base_system(self.model, self.sampling)
        check = self.check if checked else None
        return target_of(
            system,
            name=name,
            guard=self._guard(check) if guarded else None,
            check=None if guarded else check,
            model=self.model,
            guidance=guidance,
            scale=self.sampling.guidance_scale,
            inside=not self.inputs.from_outside,
        )

    def _guard(self, check: Detector | None) -> Guard:
        from valign.guard import Guard

        return Guard.from_policy(self.guard, detector=check, head=self.guarding.head, edits=self.guarding.edits)


def print_attacks(summary: Mapping[str, Any], folder: Path, *, as_json: bool = False) -> None:
    """The table on stderr, the report's path or the whole summary on stdout."""
    from valign.attacks.page import headline

    err.print(attack_table(summary))
    err.print(Text(headline(summary), style="bold"))
    for note in summary["notes"]:
        err.print(Text(note, style="dim"))
    print_measured(summary, str(folder / "report.html"), as_json=as_json)


def attack_table(summary: Mapping[str, Any]) -> Table:
    """One row per system and attack, for 80 columns; intervals below the rates."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1), collapse_padding=True)
    table.title = f"{summary['suite']['name']}: {summary['suite']['unsafe']} unsafe prompts"
    for name in ("system", "attack"):
        table.add_column(name, style="bold", no_wrap=True)
    kinds = [name for name in ("explicit", "composed", "held-out") if any(name in row["columns"] for row in summary["rates"])]
    for name in ("before %", "after %", *(f"{kind} %" for kind in kinds), "again %", "queries"):
        table.add_column(name, justify="right")
    for row in summary["rates"]:
        shown = [row["before"], row["after"], *(row["columns"].get(kind) for kind in kinds), row["again"]]
        table.add_row(row["system"], row["attack"], *map(_percent, shown), f"{row['spent']['queries']:.1f}")
    return table


def _percent(rate: Mapping[str, Any] | None) -> Text:
    if rate is None:
        return Text("–")
    share = rate["share"]
    return Text.assemble(f"{100 * share['value']:.0f}\n", (f"{100 * share['low']:.0f}–{100 * share['high']:.0f}", "dim"))
