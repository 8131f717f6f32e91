"""Fit the probe that finds LiVO's principles, measure it on prompts that it has not seen, write it with its card."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from time import perf_counter
from typing import Any

from valign.checks import UserError
from valign.data.prompts.labelled import pair_rows, without_repeats
from valign.data.prompts.pairs import LabelledPrompt, PromptPair
from valign.evaluation.guards.rates import Scored, category_rates, source_rates
from valign.files import hash_value
from valign.guard.head.probe import ProbeStage
from valign.models.diffusion.base import DiffusionModel
from valign.models.diffusion.prompt_states import prompt_states, text_fingerprint
from valign.models.heads.text_probe import TextProbe, load_probe, save_probe
from valign.policy import Policy
from valign.runs import Run
from valign.training.tasks.guard_head.calibration import calibrate
from valign.training.tasks.text_probe import TextProbeConfig, fit_text_probe

TEST_FOLD = 0  # of `LabelledPrompt.fold`, a tenth of the pairs: what the card's figures are measured on
THRESHOLD_FOLD = 1  # kept out for the threshold as well, where a rate of false alarms sets it


def train_retriever(
    model: DiffusionModel,
    pairs: Sequence[PromptPair],
    benign: Sequence[str],
    policy: Policy,
    out: Path,
    config: TextProbeConfig | None = None,
) -> TextProbe:
    """Fit a probe on the prompts of ``pairs`` and ``benign`` into ``out``; a finished one of the same prompts is read.

    The probe that is written is fitted on all prompts. Its card's figures, and a threshold by ``false_alarms``, come from one that
    was fitted without the prompts they are taken from; what could not be measured is None there.

    Args:
        pairs: Those of held-out concepts are left out. A prompt that is unsafe in one pair and safe in another is, too.
        benign: Harmless prompts beside the pairs' safe ones; may be empty.
    Raises: UserError without a prompt of either label, for a category that the policy lacks, if the policy has no principle of any
        category, or if ``out`` was made from something else.
    """
    config = config or TextProbeConfig()
    rows = without_repeats(pair_rows(pairs, benign))
    categories = [policy.category(name).id for name in sorted({name for row in rows for name in row.categories})]
    if not categories or all(row.label for row in rows):
        unsafe = sum(row.label for row in rows)
        raise UserError(
            f"train_retriever must get unsafe and harmless prompts, got {unsafe} and {len(rows) - unsafe}. Give it prompt pairs."
        )
    if not any(one.category in categories for one in policy.principles):
        raise UserError(
            f"policy {policy.id} must have a principle of a category of the data, {', '.join(categories)}; got none. "
            "Give its principles a category."
        )
    ordered = tuple(name for name in policy.category_ids() if name in categories)
    run = Run.open(
        out,
        step="retriever",
        recipe=asdict(config) | {"categories": ordered},
        inputs={
            "text encoders": text_fingerprint(model),
            "policy": policy.fingerprint(),
            "prompts": hash_value([[row.prompt, row.categories] for row in rows]),
        },
    )
    if run.done:
        return load_probe(out, model)
    started = perf_counter()
    probe = _fitted(model, rows, ordered, config)
    save_probe(out, probe)
    run.finish(seconds=perf_counter() - started)
    return probe


def _fitted(
    model: DiffusionModel, rows: Sequence[LabelledPrompt], categories: tuple[str, ...], config: TextProbeConfig
) -> TextProbe:
    states = prompt_states(model, [row.prompt for row in rows])

    def fit(chosen: Sequence[int], threshold: float) -> TextProbe:
        found = fit_text_probe(states[list(chosen)], [rows[i].categories for i in chosen], categories, fit=config.fit)
        return TextProbe(model, categories, found.weight, found.bias, threshold)

    unseen = (TEST_FOLD,) if config.false_alarms is None else (TEST_FOLD, THRESHOLD_FOLD)
    known = [number for number, row in enumerate(rows) if row.fold not in unseen]
    labels = {name for number in known for name in rows[number].categories or ("",)}
    partial = fit(known, config.threshold) if len(labels) == 1 + len(categories) else None
    threshold, how = config.threshold, "given"
    if config.false_alarms is not None:
        threshold, how = _threshold(partial, rows, config.false_alarms)
    notes = {
        "threshold_set": how,
        "fit": config.fit,
        "prompts": _counts(rows, categories),
        "measured": None if partial is None else _measured(replace(partial, threshold=threshold), rows),
    }
    return replace(fit(range(len(rows)), threshold), notes=notes)


def _threshold(probe: TextProbe | None, rows: Sequence[LabelledPrompt], rate: float) -> tuple[float, str]:
    """The lowest threshold that keeps the rate on harmless prompts that the probe has not seen, and how it was set, in words."""
    prompts = [row.prompt for row in rows if row.fold == THRESHOLD_FOLD and not row.label]
    if probe is None or not prompts:
        raise UserError(
            f"false_alarms {rate:g} needs harmless prompts to keep out of the fit, got {len(rows)} prompts in all. "
            "Give more, or a threshold."
        )
    harm = 1 - probe.probabilities(prompts)[:, :1]
    limit = float(calibrate({"harmless prompts": harm}, target_fpr=rate)[0])
    return min(limit, 1.0), f"at most {rate:g} of {len(prompts)} harmless prompts that the fit had not seen"


def _measured(probe: TextProbe, rows: Sequence[LabelledPrompt]) -> dict[str, Any] | None:
    """Rates on the prompts that the probe has not seen; None if there are none."""
    tested = [row for row in rows if row.fold == TEST_FOLD]
    if not tested:
        return None
    verdicts = ProbeStage(probe).check_many([row.prompt for row in tested])
    scored = [
        Scored(row, one.fired, one.ranking, one.stage if one.fired else "", one.category) for row, one in zip(tested, verdicts)
    ]
    return {"sources": [asdict(one) for one in source_rates(scored)], "categories": category_rates(scored)}


def _counts(rows: Sequence[LabelledPrompt], categories: Sequence[str]) -> dict[str, int]:
    """Unsafe prompts by category, and harmless ones; a prompt of several categories counts in each."""
    unsafe = {name: sum(name in row.categories for row in rows) for name in categories}
    return {**unsafe, "harmless": sum(not row.label for row in rows)}
