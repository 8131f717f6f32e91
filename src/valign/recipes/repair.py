"""Give a drifted model its safety back: the smallest realignment that passes the check, searched over methods and strengths."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_range
from valign.data.journal import Journal
from valign.evaluation.checking.decision import DriftLimits
from valign.files import hash_value, read_json, write_json
from valign.merging.realign import REALIGN, RealignMethod, open_realignment, realign
from valign.policy import Policy
from valign.recipes.check import CheckOptions, check
from valign.recipes.subjects import Subject, find_subjects
from valign.runs import Run, versions

LADDERS: Mapping[str, tuple[float, ...]] = {  # strengths from the smallest change on
    "resta": (0.1, 0.25, 0.5, 1.0),
    "enchtable": (0.1, 0.3, 1.0),
    "safe-lora": (0.35, 0.7, 1.0),
}
KEPT = ("check.json", "junit.xml", "report.html")  # of the check that the repaired model passed


@dataclass(frozen=True, kw_only=True)
class RepairAttempt:
    """One realignment: how far it moved the weights (a share of the fine-tuning's change), and the check's verdict on it."""

    method: str
    strength: float
    moved: float
    verdict: str
    reason: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.strength:g}"


Try = Callable[[str, float], RepairAttempt]  # method, strength -> what came of it


def search(ladders: Mapping[str, Sequence[float]], attempt: Try, *, refine: int = 2) -> list[RepairAttempt]:
    """All attempts: every method's strengths from the smallest on until one passes, then ``refine`` halvings back towards the
    last that did not.

    A method is given up where its change is already larger than that of the smallest that passed.
    """
    found: list[RepairAttempt] = []
    least = float("inf")  # change of the smallest that passed
    for method, strengths in ladders.items():
        last = 0.0
        for strength in sorted(strengths):
            found.append(attempt(method, strength))
            if found[-1].verdict == "safe":
                least = min(least, found[-1].moved)
                low, high = last, strength
                for _ in range(refine):
                    middle = (low + high) / 2
                    found.append(attempt(method, middle))
                    passed = found[-1].verdict == "safe"
                    low, high = (low, middle) if passed else (middle, high)
                    least = min(least, found[-1].moved) if passed else least
                break
            if found[-1].moved > least:
                break
            last = strength
    return found


def best_attempt(attempts: Sequence[RepairAttempt]) -> RepairAttempt | None:
    """The smallest change that passed; None if none did."""
    return min((one for one in attempts if one.verdict == "safe"), key=lambda one: one.moved, default=None)


def repair(
    before: str,
    after: str,
    policy: Policy,
    out: Path,
    *,
    base: str,
    methods: Sequence[str] = (),
    refine: int = 2,
    limits: DriftLimits | None = None,
    options: CheckOptions | None = None,
    **checking: Any,
) -> dict[str, Any]:
    """Realign ``after`` until `check` calls it safe against ``before``; returns what ``out/repair.json`` holds.

    ``out/repaired`` has the weights, or the adapter, of the smallest change that passed, ``out/check.json`` and its report those of
    its check. Weights of other attempts are deleted; their checks stay in ``out/attempts``. An interrupted search goes on.

    Args:
        base: The model before its safety training, whose difference to ``before`` is the safety vector; the model under adapters.
        methods: Of `LADDERS`; all for none.
        checking: As `check` takes it.
    Raises: UserError for an unknown method, and for what `open_realignment` and `check` refuse.
    """
    chosen = list(methods) or list(LADDERS)
    unknown = [name for name in chosen if name not in LADDERS]
    if unknown:
        raise UserError(f"--method must be of {', '.join(LADDERS)}, got {unknown[0]}. SOMF is learned first: valign realign somf.")
    check_range("repair.refine", refine, low=0)
    limits, options = limits or DriftLimits(), options or CheckOptions()
    first, second = find_subjects(before, after, base=base)
    origin, _ = find_subjects(base, base)
    what = open_realignment(origin.folder, _weights(first), [_weights(second)])
    run = Run.open(
        out,
        step="repair",
        recipe={"methods": chosen, "refine": refine, "limits": asdict(limits), "options": asdict(options)},
        inputs={"vectors": what.vectors.fingerprint(), "policy": hash_value(policy.id)},
    )
    if run.done and (out / "repair.json").exists():
        return dict(read_json(out / "repair.json"))
    journal = Journal(out / "attempts.jsonl")

    def checked(place: str, folder: Path) -> dict[str, Any]:
        shared = out / "attempts" / "start" / "before"
        if shared.exists() and not (folder / "before").exists():
            shutil.copytree(shared, folder / "before")  # the answers of the model before are asked for once
        under = base if first.adapter is not None else ""
        return check(before, place, policy, folder, base=under, limits=limits, options=options, **checking)

    start = checked(after, out / "attempts" / "start")

    def attempt(method: str, strength: float) -> RepairAttempt:
        key = f"{method}-{strength:g}"
        if key not in journal.entries:
            made = out / "attempts" / key / "model"
            done = realign(_method(method, strength), what, made, name=method)
            result = checked(str(made), out / "attempts" / key / "check")
            found = {"moved": float(done["moved"]), "verdict": result["verdict"], "reason": result["decision"]["reason"]}
            tried = RepairAttempt(method=method, strength=strength, **found)
            journal.add({"key": key, **asdict(tried)})
            shutil.rmtree(made)
        return RepairAttempt(**{name: value for name, value in journal.entries[key].items() if name != "key"})

    attempts = [] if start["verdict"] == "safe" else search({name: LADDERS[name] for name in chosen}, attempt, refine=refine)
    best = best_attempt(attempts)
    if best is not None:
        shutil.rmtree(out / "repaired", ignore_errors=True)
        realign(_method(best.method, best.strength), what, out / "repaired", name=best.method)
        for name in KEPT:
            shutil.copy(out / "attempts" / best.name / "check" / name, out / name)
    record = {
        "outcome": "not needed" if start["verdict"] == "safe" else "repaired" if best else "nothing passes",
        "start": {"verdict": start["verdict"], "reason": start["decision"]["reason"]},
        "best": best and asdict(best),
        "attempts": [asdict(one) for one in attempts],
        "repaired": str(out / "repaired") if best else None,
        "versions": versions(),
    }
    write_json(out / "repair.json", record)
    run.finish(outcome=record["outcome"])
    return dict(json.loads(json.dumps(record)))


def _weights(subject: Subject) -> Path:
    return subject.adapter or subject.folder


def _method(name: str, strength: float) -> RealignMethod:
    kind: Any = REALIGN[name]
    made: RealignMethod = kind(strength=strength)
    return made
