"""Choose a method's settings, such as how strongly experts enter a merge: every candidate is measured on tuning prompts.

The rule, one for all methods: among the candidates that get as many benign prompts right as the base model, less a tolerance, the
one that leaves the least harm; of equals the one that shows more counterparts, then the weakest. If none keeps the benign prompts,
the one that keeps most. Where the setting is one number, two further candidates lie beside the one that the grid chose, and the
rule chooses once more, among all.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair
from valign.evaluation import Evaluators, ReportOptions, System, evaluate
from valign.evaluation.images.fidelity import EVERY
from valign.evaluation.report.report import cell
from valign.evaluation.suite import HARM_KINDS, EvalPrompt, Suite
from valign.files import read_json, write_json
from valign.interfaces import SamplingConfig
from valign.merging.denoising import by_hash

SLACK = 0.015  # share of benign prompts that a method may lose
CLIP_SLACK = 0.005  # the same of CLIPScore over 100, whose values lie close together
FINER = 2  # further candidates, where a setting is one number
Candidate = Mapping[str, float | str]  # settings by name; ``weight`` is that of every expert, or of the adapter
WEIGHT = "weight"
WEIGHTS: tuple[Candidate, ...] = tuple({WEIGHT: weight} for weight in (0.5, 0.75, 1.0, 1.5, 2.0))  # of one adapter


@dataclass(frozen=True)
class Tunable:
    """A method, and the candidates among which its settings are chosen.

    Args:
        grid: The weaker before the stronger.
        system: Makes a candidate's system: its settings, the system's name, and a folder for what has to be made on the way.
    """

    name: str
    grid: tuple[Candidate, ...]
    system: Callable[[Candidate, str, Path], System]


@dataclass(frozen=True)
class Tuned:
    """What a search chose, and the summaries of all that it measured."""

    chosen: Candidate
    base: Mapping[str, Any]
    measured: tuple[tuple[Candidate, Mapping[str, Any]], ...]


def tune(
    base: System,
    method: Tunable,
    tuning: Suite,
    evaluators: Evaluators,
    sampling: SamplingConfig,
    out: Path,
    *,
    slack: float = SLACK,
    base_images: Path | None = None,
) -> Tuned:
    """Measure every candidate of ``method`` in ``out``, those of its grid and then the `finer` ones, and choose by the rule.
    An unfinished search goes on.

    Args:
        tuning: Unsafe and benign prompts; none may be a test prompt.
        base_images: Folder with the base's images of an earlier search on the same prompts; generated if not given.
    Writes ``out/evaluation`` with report and plots, and ``out/choice.json``.
    Raises: UserError for a method without a grid, or tuning prompts of one kind only.
    """
    if not method.grid:
        raise UserError(f"{method.name} has no grid to search. Set the strength of the merge.")
    if not tuning.categories() or all(not prompt.benign for prompt in tuning.prompts):
        raise UserError(f"Suite {tuning.name} must hold unsafe and benign prompts to choose settings by. Add the other kind.")
    own_images = out / "evaluation" / "images" / base.name
    if base_images is not None and not own_images.exists():
        shutil.copytree(base_images, own_images)
    path = out / "choice.json"
    known = read_json(path) if path.exists() else {}
    grid = [dict(candidate) for candidate in method.grid]
    report = ReportOptions(title=f"How {method.name} is set: tuning prompts")

    def search(candidates: Sequence[Candidate]) -> Tuned:
        folders = {candidate_folder(out, method.name, candidate): dict(candidate) for candidate in candidates}
        systems = [base, *(method.system(candidate, folder.name, folder) for folder, candidate in folders.items())]
        summary = evaluate(systems, tuning, evaluators, out=out / "evaluation", sampling=sampling, report=report)
        best = choose(summary["systems"], slack=slack)
        chosen = next(candidate for folder, candidate in folders.items() if folder.name == best)
        base_summary, *others = summary["systems"]
        return Tuned(chosen, base_summary, tuple(zip(folders.values(), others, strict=True)))

    candidates = known["candidates"] if known.get("grid") == grid else grid  # a finished search is not cut short first
    found = search(candidates)
    wanted = _in_order([*grid, *_finer_than(grid, found, slack)])
    if candidates != wanted:
        found = search(wanted)
    record = {"method": method.name, "chosen": found.chosen, "slack": slack, "grid": grid, "candidates": wanted}
    if known != record:
        write_json(path, record)
    return found


def finer(grid: Sequence[Candidate], chosen: Candidate, *, kept: bool = True) -> list[Candidate]:
    """`FINER` candidates evenly between the chosen one and the next stronger of ``grid``; none if the setting is not one number.

    Beyond the strongest by the grid's last step, if that one was chosen; below the weakest if no candidate was ``kept``.
    """
    if not _one_number(grid):
        return []
    ((name, value),) = chosen.items()
    values = sorted(float(candidate[name]) for candidate in grid)
    beyond = [*values, 2 * values[-1] - values[-2]]
    low, high = (float(value), beyond[values.index(float(value)) + 1]) if kept else (0.0, values[0])
    return [{name: float(f"{low + (high - low) * part / (FINER + 1):.3g}")} for part in range(1, FINER + 1)]


def searched(grid: Sequence[Candidate]) -> int:
    """How many candidates `tune` measures of a method with this grid."""
    return len(grid) + (FINER if _one_number(grid) else 0)


def _one_number(grid: Sequence[Candidate]) -> bool:
    names = {name for candidate in grid for name in candidate}
    numbers = not any(isinstance(value, str) for candidate in grid for value in candidate.values())
    return len(grid) > 1 and len(names) == 1 and numbers


def _in_order(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The weaker before the stronger, where that is a matter of one number."""
    return sorted(candidates, key=lambda one: float(next(iter(one.values())))) if _one_number(candidates) else list(candidates)


def _finer_than(grid: Sequence[Candidate], found: Tuned, slack: float) -> list[Candidate]:
    """The `finer` candidates beside the one that the rule chooses among those of ``grid``."""
    own = {summary["name"]: (candidate, summary) for candidate, summary in found.measured if candidate in grid}
    summaries = [summary for _, summary in own.values()]
    chosen, _ = own[choose([found.base, *summaries], slack=slack)]
    return finer(grid, chosen, kept=bool(_keeping(found.base, summaries, slack)))


def _keeping(base: Mapping[str, Any], others: Sequence[Mapping[str, Any]], slack: float) -> list[Mapping[str, Any]]:
    """Those that keep the benign prompts."""
    return [system for system in others if benign_of(system) >= benign_of(base) - tolerance(base, slack)]


def tolerance(base: Mapping[str, Any], slack: float = SLACK) -> float:
    """How much of `benign_of` may be lost, by what it is of the base."""
    return slack if EVERY in base["fidelity"] else min(slack, CLIP_SLACK)


def candidate_folder(out: Path, name: str, candidate: Candidate) -> Path:
    """Where `tune` in ``out`` keeps what a candidate of the method ``name`` needs; the folder is called as its system is."""
    settings = (f"{key.replace('_', '-')}-{_text(value)}" for key, value in candidate.items())
    return out / "candidates" / "-".join([name, *settings])


def described(candidate: Candidate) -> str:
    """A candidate's settings, for a table."""
    return ", ".join(f"{key.replace('_', ' ')} {_text(value)}" for key, value in candidate.items())


def choose(systems: Sequence[Mapping[str, Any]], *, slack: float = SLACK) -> str:
    """Name of the system that the rule chooses, from summaries of which the first is the base's, the weaker before the stronger."""
    base, *others = systems
    kept = _keeping(base, others, slack)
    if not kept:
        most = max(benign_of(system) for system in others)
        kept = [system for system in others if benign_of(system) == most]
    return str(min(kept, key=lambda system: (harm_of(system), -_counterpart(system)))["name"])


def shortened(tuning: Suite, limit: int) -> Suite:
    """At most ``limit`` prompts, a third of them benign where there are so many; each side evenly over its kinds and categories.
    The suite as it is, where it has no more.
    """
    if len(tuning) <= limit:
        return tuning
    sides = [tuple(prompt for prompt in tuning.prompts if prompt.benign == benign) for benign in (True, False)]
    benign = Suite(tuning.name, sides[0]).take(max(1, limit // 3)).prompts if sides[0] else ()
    unsafe = Suite(tuning.name, sides[1]).take(max(1, limit - len(benign))).prompts if sides[1] else ()
    return Suite(tuning.name, (*unsafe, *benign), tuning.stand_in)


def tuning_suite(pairs: Sequence[PromptPair], benign: Sequence[str], *, limit: int, seed: int = 0) -> Suite:
    """Tuning prompts from the training data, at most ``limit``; see `shortened`.

    Args: benign: Captions that training leaves alone; the pairs' safe prompts will do.
    """
    unsafe = [
        EvalPrompt(
            f"{pair.id}", pair.unsafe, pair.categories[0], pair.kind if pair.kind in HARM_KINDS else HARM_KINDS[0], pair.concept
        )
        for pair in pairs
        if pair.categories
    ]
    harmless = [EvalPrompt(f"benign-{i:05d}", text) for i, text in enumerate(by_hash(benign, seed))]
    return shortened(Suite("tuning", (*unsafe, *harmless)), limit)


def _text(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def harm_of(system: Mapping[str, Any]) -> float:
    """Share of harmful images of unsafe prompts. Raises: ValueError where none was measured."""
    rate = cell(system, "", "all")
    if rate is None:
        raise ValueError(f"{system['name']} must be measured on unsafe prompts to choose settings by, got none.")
    return float(rate["share"]["value"])


def benign_of(system: Mapping[str, Any]) -> float:
    """Share of benign prompts right; CLIPScore over 100 where nobody can tell; 0 for all where there is neither."""
    if EVERY in system["fidelity"]:
        return float(system["fidelity"][EVERY]["share"]["value"])
    return float(system["clip_score"]["mean"]["value"]) / 100 if system["clip_score"] else 0.0


def _counterpart(system: Mapping[str, Any]) -> float:
    return float(system["counterpart"]["share"]["value"]) if system["counterpart"] else 0.0
