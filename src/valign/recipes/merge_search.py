"""Choose how strongly experts enter a merge: every candidate of the merge's grid is measured on tuning prompts.

The rule: among the candidates that get as many benign prompts right as the base model, less `SLACK`, the one that leaves the least
harm; of equals the one that shows more counterparts, then the weakest. If none keeps the benign prompts, the one that keeps most.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair
from valign.evaluation import Evaluators, ReportOptions, System, adapter_system, base_system, evaluate
from valign.evaluation.images.fidelity import EVERY
from valign.evaluation.report.report import cell
from valign.evaluation.suite import KINDS, EvalPrompt, Suite
from valign.files import read_json, write_json
from valign.interfaces import SamplingConfig
from valign.merging import MERGES
from valign.merging.denoising import by_hash
from valign.models.diffusion.base import DiffusionModel

SLACK = 0.005  # share of benign prompts that a merge may lose
Candidate = Mapping[str, float]  # ``weight`` of every expert, and options of the merge
WEIGHT = "weight"


def search_merge(
    model: DiffusionModel,
    merge: str,
    make: Callable[[Candidate, Path], Path],
    tuning: Suite,
    evaluators: Evaluators,
    sampling: SamplingConfig,
    out: Path,
    *,
    grid: Sequence[Candidate] = (),
    slack: float = SLACK,
) -> dict[str, float]:
    """Merge and measure every candidate in ``out``, or go on; returns the one that the rule chooses.

    Args:
        merge: A name in `MERGES`, whose own grid is taken if none is given.
        make: Merges with a candidate's weight and options into a folder; returns the adapter's.
        tuning: Unsafe and benign prompts; none may be a test prompt.
    Writes ``out/evaluation`` with report and plots, and ``out/choice.json``.
    Raises: UserError for a merge without a grid, or tuning prompts of one kind only.
    """
    candidates = {_name(merge, candidate): dict(candidate) for candidate in grid or MERGES[merge].grid}
    if not candidates:
        raise UserError(f"{merge} has no grid to search. Set the strength of the merge.")
    if not tuning.categories() or all(not prompt.benign for prompt in tuning.prompts):
        raise UserError(f"Suite {tuning.name} must hold unsafe and benign prompts to choose a merge by. Add the other kind.")
    adapters = {name: make(candidate, out / "candidates" / name) for name, candidate in candidates.items()}
    systems: list[System] = [base_system(model, sampling)]
    for name, folder in adapters.items():
        described = ", ".join(f"{key} {value:g}" for key, value in candidates[name].items())
        systems.append(adapter_system(model, folder, sampling, name=name, description=described))
    report = ReportOptions(title=f"How strongly the experts enter {merge}: tuning prompts")
    summary = evaluate(systems, tuning, evaluators, out=out / "evaluation", sampling=sampling, report=report)
    chosen = candidates[choose(summary["systems"], slack=slack)]
    record, path = {"merge": merge, "chosen": chosen, "slack": slack}, out / "choice.json"
    if not path.exists() or read_json(path) != record:
        write_json(path, record)
    return chosen


def choose(systems: Sequence[Mapping[str, Any]], *, slack: float = SLACK) -> str:
    """Name of the system that the rule chooses, from summaries of which the first is the base's, the weaker before the stronger."""
    base, *others = systems
    kept = [system for system in others if _benign(system) >= _benign(base) - slack]
    if not kept:
        most = max(_benign(system) for system in others)
        kept = [system for system in others if _benign(system) == most]
    return str(min(kept, key=lambda system: (_harm(system), -_counterpart(system)))["name"])


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
        EvalPrompt(f"{pair.id}", pair.unsafe, pair.categories[0], pair.kind if pair.kind in KINDS else KINDS[0], pair.concept)
        for pair in pairs
        if pair.categories
    ]
    harmless = [EvalPrompt(f"benign-{i:05d}", text) for i, text in enumerate(by_hash(benign, seed))]
    return shortened(Suite("tuning", (*unsafe, *harmless)), limit)


def _name(merge: str, candidate: Candidate) -> str:
    return "-".join([merge, *(f"{key.replace('_', '-')}-{value:g}" for key, value in candidate.items())])


def _harm(system: Mapping[str, Any]) -> float:
    rate = cell(system, "", "all")
    if rate is None:
        raise ValueError(f"{system['name']} must be measured on unsafe prompts to choose a merge by, got none.")
    return float(rate["share"]["value"])


def _benign(system: Mapping[str, Any]) -> float:
    """Share of benign prompts right; CLIPScore over 100 where nobody can tell; 0 for all where there is neither."""
    if EVERY in system["fidelity"]:
        return float(system["fidelity"][EVERY]["share"]["value"])
    return float(system["clip_score"]["mean"]["value"]) / 100 if system["clip_score"] else 0.0


def _counterpart(system: Mapping[str, Any]) -> float:
    return float(system["counterpart"]["share"]["value"]) if system["counterpart"] else 0.0
