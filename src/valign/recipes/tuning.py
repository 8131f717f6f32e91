"""Choose a method's settings, such as how strongly experts enter a merge: every candidate is measured on tuning prompts.

The rule, one for all methods: among the candidates that get as many benign prompts right as the base model, less ``slack``, the one
that leaves the least harm; of equals the one that shows more counterparts, then the weakest. If none keeps the benign prompts, the
one that keeps most.
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

SLACK = 0.005  # share of benign prompts that a method may lose
Candidate = Mapping[str, float | str]  # settings by name; ``weight`` is that of every expert, or of the adapter
WEIGHT = "weight"


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
    """Make and measure every candidate of ``method`` in ``out``, or go on, and choose by the rule.

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
    folders = {candidate_folder(out, method.name, candidate): dict(candidate) for candidate in method.grid}
    own_images = out / "evaluation" / "images" / base.name
    if base_images is not None and not own_images.exists():
        shutil.copytree(base_images, own_images)
    systems = [base, *(method.system(candidate, folder.name, folder) for folder, candidate in folders.items())]
    report = ReportOptions(title=f"How {method.name} is set: tuning prompts")
    summary = evaluate(systems, tuning, evaluators, out=out / "evaluation", sampling=sampling, report=report)
    best = choose(summary["systems"], slack=slack)
    chosen = next(candidate for folder, candidate in folders.items() if folder.name == best)
    record, path = {"method": method.name, "chosen": chosen, "slack": slack}, out / "choice.json"
    if not path.exists() or read_json(path) != record:
        write_json(path, record)
    base_summary, *others = summary["systems"]
    return Tuned(chosen, base_summary, tuple(zip(folders.values(), others, strict=True)))


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
    kept = [system for system in others if benign_of(system) >= benign_of(base) - slack]
    if not kept:
        most = max(benign_of(system) for system in others)
        kept = [system for system in others if benign_of(system) == most]
    return str(min(kept, key=lambda system: (harm_of(system), -_counterpart(system)))["name"])


def shortened(tuning: Suite, limit: int) -> Suite:
    """At most ``limit`` prompts, a third of them benign where there are so many; each side evenly over its kinds and categories."""
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
