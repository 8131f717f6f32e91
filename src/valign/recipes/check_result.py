"""What a check is asked, how, and what comes of it: its options, its result, and the files that say so."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_options, option
from valign.evaluation.chats.judges import JudgeCard
from valign.evaluation.checking.decision import Decision, DriftLimits, VerdictName, decide
from valign.evaluation.checking.junit import write_junit
from valign.evaluation.checking.outcomes import PairedOutcome
from valign.evaluation.checking.page import write_check_page
from valign.evaluation.paired_drift import JudgeError
from valign.files import write_json
from valign.runs import Run, versions

SIDES = ("before", "after")
SCHEMA = 1  # of check.json


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What is asked, and how."""

    samples: int | None = option(
        None,
        help="of a bundled world: requests per kind (chat; default 300, the most) or prompts per concept (shapes; default 10)",
        low=1,
    )
    max_tokens: int = option(128, help="length of an answer of a chat model, in tokens", low=1)
    answer_batch: int = option(64, help="answers of a chat model at a time", low=1)
    seed: int = option(0, help="random seed of the prompts of a world", low=0, rare=True)
    show_texts: bool | None = option(None, help="print changed requests and answers in the report; on only for stand-in harms")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What a check found; ``exit_code`` is 0 safe, 1 drifted, 2 undecided."""

    kind: str
    before: str
    after: str
    policy: str
    suite: str
    judge: JudgeCard
    decision: Decision
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=versions)

    @property
    def verdict(self) -> VerdictName:
        return self.decision.verdict

    @property
    def exit_code(self) -> int:
        return self.decision.exit_code

    def record(self) -> dict[str, Any]:
        """JSON-able, as ``check.json`` holds it."""
        head = {"schema": SCHEMA, "verdict": self.verdict, "reason": self.decision.reason, "exit_code": self.exit_code}
        return head | {"needed": self.decision.needed} | asdict(self)


@dataclass(frozen=True, kw_only=True)
class CheckNames:
    """What stands in the report."""

    before: str
    after: str
    policy: str
    suite: str


def check_different(before: str, after: str) -> None:
    """Raise UserError for one fingerprint on both sides: a model compared with itself shows nothing."""
    if before == after:
        raise UserError("before and after must be two models, got the same twice: there is nothing to compare. Check the paths.")


def decided(
    kind: str,
    outcomes: Sequence[PairedOutcome],
    limits: DriftLimits,
    names: CheckNames,
    judge: JudgeCard,
    *,
    notes: Sequence[str] = (),
    by_category: Mapping[str, JudgeError | None] | None = None,
    blind: str = "",
) -> CheckResult:
    """The verdict on paired outcomes. Args: as `decide` takes them."""
    decision = decide(outcomes, limits, harm=judge.harm, refusals=judge.refusals, by_category=by_category, blind=blind)
    return CheckResult(kind=kind, judge=judge, decision=decision, notes=tuple(notes), **asdict(names))


def write_check(run: Run, out: Path, result: CheckResult, changed: Sequence[Mapping[str, Any]], *, shown: bool) -> dict[str, Any]:
    """Write ``check.json``, the report and the JUnit file into ``out`` and end the run; returns the record.

    Args: changed: Cases whose outcome changed. shown: Whether their texts are printed.
    """
    record: dict[str, Any] = json.loads(json.dumps(result.record()))
    write_junit(out / "junit.xml", record)
    write_check_page(out / "report.html", record, changed, shown=shown)
    write_json(out / "check.json", record)
    run.finish(verdict=record["verdict"])
    return record
