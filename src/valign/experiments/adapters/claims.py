"""What the papers claim, and whether the comparison's runs bear it out: held, not held, or not testable at this scale."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from valign.evaluation.adapters.table import Key, measured, paired
from valign.evaluation.statistics import t_interval

Verdict = Literal["held", "not held", "not testable"]
FEWEST = 3  # pairs of runs for a test
CLOSE = 0.02  # of a score: a method is as good as another if it is at most this much worse


@dataclass(frozen=True)
class ClaimResult:
    """A verdict and the number it rests on."""

    verdict: Verdict
    number: str


@dataclass(frozen=True)
class Claim:
    """One sentence of a paper, as something that runs can contradict."""

    method: str
    statement: str
    check: "Callable[[ResultTable], ClaimResult]"


@dataclass(frozen=True)
class JudgedClaim:
    """A claim with its verdict; JSON-able."""

    method: str
    statement: str
    verdict: Verdict
    number: str


@dataclass(frozen=True)
class ResultTable:
    """All finished runs and costs, by method."""

    runs: Mapping[str, Mapping[Key, Mapping[str, Any]]]
    costs: Mapping[str, Mapping[str, Any]]

    def mean(self, method: str, name: str) -> float:
        return float(np.mean([entry[name] for entry in self.runs[method].values()]))

    def has(self, *methods: str) -> bool:
        return all(self.runs.get(method) for method in methods)


def differs(method: str, other: str, name: str, *, sign: int = 1, margin: float = 0.0) -> Callable[[ResultTable], ClaimResult]:
    """Is ``sign * (method - other)`` above ``-margin``? Held, or not, if the whole 95 % interval of paired differences says so."""

    def check(table: ResultTable) -> ClaimResult:
        if not table.has(method, other):
            return ClaimResult("not testable", f"needs runs of {method} and {other}")
        differences = paired(table.runs[method], table.runs[other], name)
        if len(differences) < FEWEST:
            return ClaimResult("not testable", f"{len(differences)} pairs of runs, needs {FEWEST}")
        found = t_interval(differences)
        number = f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}], {len(differences)} pairs"
        low, high = (found.low, found.high) if sign > 0 else (-found.high, -found.low)
        return ClaimResult("held" if low > -margin else "not held" if high < -margin else "not testable", number)

    return check


def ratio(method: str, other: str, name: str, *, at_most: float) -> Callable[[ResultTable], ClaimResult]:
    """Is the mean of a count at most this share of another method's?"""

    def check(table: ResultTable) -> ClaimResult:
        if not table.has(method, other):
            return ClaimResult("not testable", f"needs runs of {method} and {other}")
        ours, theirs = table.mean(method, name), table.mean(other, name)
        if not theirs:
            return ClaimResult("not testable", f"{other} has none")
        number = f"{ours:,.0f} against {theirs:,.0f}, {ours / theirs:.3g} times"
        return ClaimResult("held" if ours <= at_most * theirs * (1 + 1e-9) else "not held", number)

    return check


def full_rank(method: str) -> Callable[[ResultTable], ClaimResult]:
    """Is the change of weight of as high a rank as full fine-tuning's?"""

    def check(table: ResultTable) -> ClaimResult:
        if not table.has(method, "full"):
            return ClaimResult("not testable", f"needs runs of {method} and full")
        ours, most = table.mean(method, "change_rank"), table.mean("full", "change_rank")
        return ClaimResult("held" if ours >= 0.95 * most else "not held", f"rank {ours:.0f} against {most:.0f}")

    return check


def step_time(method: str, other: str, *, at_most: float) -> Callable[[ResultTable], ClaimResult]:
    """Does a step take at most this many of another method's? Both were timed against LoRA, in turns; quartiles decide."""

    def check(table: ResultTable) -> ClaimResult:
        if method not in table.costs or other not in table.costs:
            return ClaimResult("not testable", f"needs the costs of {method} and {other}")
        ours, theirs = table.costs[method], table.costs[other]["step_ratio"] if other != "lora" else 1.0
        low, high = (limit / theirs for limit in ours["step_ratio_quartiles"])
        number = f"{ours['step_ratio'] / theirs:.3f} times, quartiles {low:.3f} to {high:.3f}"
        return ClaimResult("held" if high <= at_most else "not held" if low > at_most else "not testable", number)

    return check


CLAIMS: tuple[Claim, ...] = (
    Claim("ailora", "scores higher than LoRA", differs("ailora", "lora", "score")),
    Claim(
        "ailora", "reaches a given loss sooner: lower mean training loss than LoRA", differs("ailora", "lora", "mean_loss", sign=-1)
    ),
    Claim("ailora", "costs nothing per step: at most 1.02 of LoRA's", step_time("ailora", "lora", at_most=1.02)),
    Claim("lora-sb", "is close to full fine-tuning: at most 0.02 worse", differs("lora-sb", "full", "score", margin=CLOSE)),
    Claim("lora-sb", "scores higher than LoRA", differs("lora-sb", "lora", "score")),
    Claim("lora-sb", "trains a small part of LoRA's numbers: at most a tenth", ratio("lora-sb", "lora", "trained", at_most=0.1)),
    Claim("svfit", "trains a sixteenth of LoRA's numbers", ratio("svfit", "lora", "trained", at_most=1 / 16)),
    Claim("svfit", "scores higher than LoRA", differs("svfit", "lora", "score")),
    Claim("loldu", "trains a sixteenth of LoRA's numbers or less", ratio("loldu", "lora", "trained", at_most=1 / 16)),
    Claim("loldu", "is as good as LoRA: at most 0.02 worse", differs("loldu", "lora", "score", margin=CLOSE)),
    Claim("randlora", "changes weights at full rank", full_rank("randlora")),
    Claim("randlora", "scores higher than LoRA at as many numbers", differs("randlora", "lora", "score")),
    Claim("nola", "trains less than a LoRA of rank one", ratio("nola", "lora", "trained", at_most=1 / 8)),
    Claim("loca", "scores higher than FourierFT at as many numbers", differs("loca", "fourierft", "score")),
    Claim("sora", "needs 70 % of LoRA's numbers", ratio("sora", "lora", "trained", at_most=0.7)),
    Claim("sora", "scores higher than AdaLoRA", differs("sora", "adalora", "score")),
    Claim("increlora", "scores higher than AdaLoRA at an equal budget", differs("increlora", "adalora", "score")),
    Claim("increlora", "scores higher than LoRA at an equal budget", differs("increlora", "lora", "score")),
    Claim("diffora", "scores higher than AdaLoRA at an equal budget", differs("diffora", "adalora", "score")),
    Claim("comp-lora", "keeps more than LoRA: less drift", differs("comp-lora", "lora", "drift", sign=-1)),
    Claim("comp-lora", "keeps more of the skill than LoRA", differs("comp-lora", "lora", "skill")),
    Claim("comp-lora", "forgets less of earlier tasks than LoRA: higher backward", differs("comp-lora", "lora", "backward")),
    Claim("comp-lora", "scores higher than LoRA", differs("comp-lora", "lora", "score")),
    Claim("codyra", "keeps more than LoRA: less drift", differs("codyra", "lora", "drift", sign=-1)),
    Claim("codyra", "forgets less of earlier tasks than LoRA: higher backward", differs("codyra", "lora", "backward")),
    Claim("codyra", "keeps more of the skill than LoRA", differs("codyra", "lora", "skill")),
    Claim("clip-svd", "trains less than LoRA", ratio("clip-svd", "lora", "trained", at_most=1.0)),
    Claim("clip-svd", "scores higher than LoRA", differs("clip-svd", "lora", "score")),
    Claim("lora+ggpo", "ends in a flatter minimum than LoRA: less sharpness", differs("lora+ggpo", "lora", "sharpness", sign=-1)),
    Claim("lora+mgpo", "ends in a flatter minimum than LoRA: less sharpness", differs("lora+mgpo", "lora", "sharpness", sign=-1)),
    Claim(
        "full+dct-adamw",
        "needs less optimizer memory than AdamW: at most half",
        ratio("full+dct-adamw", "full", "optimizer_bytes", at_most=0.5),
    ),
    Claim(
        "full+dct-adamw",
        "needs less optimizer memory than GaLore's SVD projection",
        ratio("full+dct-adamw", "full+galore", "optimizer_bytes", at_most=1.0),
    ),
    Claim("full+dct-adamw", "takes no longer per step than GaLore", step_time("full+dct-adamw", "full+galore", at_most=1.0)),
    Claim(
        "full+dct-adamw",
        "scores as high as GaLore: at most 0.02 worse",
        differs("full+dct-adamw", "full+galore", "score", margin=CLOSE),
    ),
    Claim("full+dct-adamw", "is as good as AdamW: at most 0.02 worse", differs("full+dct-adamw", "full", "score", margin=CLOSE)),
    Claim("full+trion", "is as good as AdamW: at most 0.02 worse", differs("full+trion", "full", "score", margin=CLOSE)),
)


def judge_claims(records: Sequence[Mapping[str, Any]], costs: Mapping[str, Mapping[str, Any]]) -> list[JudgedClaim]:
    """Every claim of `CLAIMS` whose method was run."""
    done = [record for record in records if record["status"] == "done"]
    methods = {record["method"] for record in done}
    table = ResultTable(
        {method: measured(done, method) for method in methods},
        {method: cost["measured"] for method, cost in costs.items() if cost["status"] == "done"},
    )
    judged = []
    for claim in CLAIMS:
        if claim.method in methods:
            found = claim.check(table)
            judged.append(JudgedClaim(claim.method, claim.statement, found.verdict, found.number))
    return judged
