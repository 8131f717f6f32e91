"""Give a drifted model its safety back: the smallest realignment that passes the check, searched over methods and strengths."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from valign.checks import UserError, check_range
from valign.data.journal import Journal
from valign.data.prompts.tables import AS_IT_IS, TableReading
from valign.evaluation.checking.decision import DriftLimits
from valign.files import hash_value, read_json, write_json
from valign.merging.realign import (
    REALIGN,
    PreferenceRows,
    Realignment,
    RealignMethod,
    load_preferences,
    open_realignment,
    read_preferences,
    realign,
    rows_fingerprint,
)
from valign.merging.realign.opening import Start
from valign.merging.realign.somf import MASKS, Somf, learn_masks, masked_space
from valign.policy import Policy
from valign.recipes.check import CheckOptions, check
from valign.recipes.subjects import Subject, find_subjects
from valign.runs import Run, versions
from valign.worlds import CHAT_WORLDS, WORLDS

LADDERS: Mapping[str, tuple[float, ...]] = {  # strengths from the smallest change on; first the method that moves least
    "somf": (0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0),
    "resta": (0.1, 0.25, 0.5, 1.0),
    "enchtable": (0.1, 0.3, 1.0),
    "safe-lora": (0.35, 0.7, 1.0),
}
KEPT = ("check.json", "junit.xml", "report.html", "evaluation")  # of the check that the repaired model passed
SHARED = ("before", "evaluation/images/before")  # what the model before said or made, in every attempt's check
WORLD_PAIRS = 64  # preferences of a world


@dataclass(frozen=True, kw_only=True)
class RepairAttempt:
    """One realignment: how far it moved the weights, how much of the fine-tuning it kept, and the check's verdict on it."""

    method: str
    strength: float
    moved: float  # share of the fine-tuning's norm
    verdict: str
    reason: str
    kept: float | None = None  # share of the fine-tuning's change, along its own direction; None is unknown

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
    start: Start = "aligned",
    methods: Sequence[str] = (),
    refine: int = 2,
    pairs: PreferenceRows | Path | None = None,
    pairs_reading: TableReading = AS_IT_IS,
    mask_steps: int = 60,
    limits: DriftLimits | None = None,
    options: CheckOptions | None = None,
    **checking: Any,
) -> dict[str, Any]:
    """Realign ``after`` until `check` calls it safe against ``before``; returns what ``out/repair.json`` holds.

    ``out/repaired`` has the weights, or the adapter, of the smallest change that passed, ``out/check.json`` and its report those of
    its check. Weights of other attempts are deleted; their checks stay in ``out/attempts``. An interrupted search goes on.

    Args:
        base: The model before its safety training, whose difference to ``before`` is the safety vector; the model under adapters.
        start: What ``after`` was fine-tuned from: ``before``, or the base.
        methods: Of `LADDERS`; all for none, without SOMF where there are no preferences.
        pairs: Safety preferences that SOMF's mask is learned on, or where `read_preferences` finds them; a world's own, if the
            policy is a world's and these are None.
        pairs_reading: Other names of the columns of that table.
        mask_steps: Optimizer steps of that.
        checking: As `check` takes it.
    Raises: UserError for an unknown method, SOMF without preferences, and for what `open_realignment` and `check` refuse.
    """
    unknown = [name for name in methods if name not in LADDERS]
    if unknown:
        raise UserError(f"--method must be of {', '.join(LADDERS)}, got {unknown[0]}.")
    check_range("repair.refine", refine, low=0)
    limits, options = limits or DriftLimits(), options or CheckOptions()
    first, second = find_subjects(before, after, base=base)
    if (first.folder, first.adapter) == (second.folder, second.adapter):
        raise UserError("before and after must be two models, got the same twice: there is nothing to repair. Check the paths.")
    origin, _ = find_subjects(base, base)
    what = open_realignment(origin.folder, _weights(first), [_weights(second)], start=start)
    if isinstance(pairs, Path):
        pairs = read_preferences(what, pairs, known=policy.category_ids(), reading=pairs_reading)
    rows = pairs if pairs is not None else world_preferences(policy, first.kind)
    if rows is None and "somf" in methods:
        raise UserError("--method somf must have safety preferences to learn from, got none. Name them by --pairs.")
    chosen = list(methods) or [name for name in LADDERS if name != "somf" or rows is not None]
    learning = {"mask_steps": mask_steps, "pairs": rows_fingerprint(rows)} if rows is not None and "somf" in chosen else {}
    run = Run.open(
        out,
        step="repair",
        recipe={"methods": chosen, "refine": refine, "limits": asdict(limits), "options": asdict(options), **learning},
        inputs={"vectors": what.vectors.fingerprint(), "policy": hash_value(policy.id)},
    )
    if run.done and (out / "repair.json").exists():
        return dict(read_json(out / "repair.json"))
    journal = Journal(out / "attempts.jsonl")

    def checked(place: str, folder: Path) -> dict[str, Any]:
        for name in SHARED:  # the model before is asked once
            shared = out / "attempts" / "start" / name
            if shared.exists() and not (folder / name).exists():
                shutil.copytree(shared, folder / name)
        under = base if first.adapter is not None else ""
        return check(before, place, policy, folder, base=under, limits=limits, options=options, **checking)

    found = checked(after, out / "attempts" / "start")

    def method(name: str, strength: float) -> RealignMethod:
        if name != "somf":
            return _method(name, strength)
        assert rows is not None
        return Somf(strength=strength, masks=_masks(what, rows, out / MASKS, mask_steps, str(checking.get("device", "auto"))))

    def attempt(name: str, strength: float) -> RepairAttempt:
        key = f"{name}-{strength:g}"
        if key not in journal.entries:
            made = out / "attempts" / key / "model"
            done = realign(method(name, strength), what, made, name=name)
            result = checked(str(made), out / "attempts" / key / "check")
            seen = {
                "moved": float(done["moved"]),
                "kept": done["kept"],
                "verdict": result["verdict"],
                "reason": result["decision"]["reason"],
            }
            tried = RepairAttempt(method=name, strength=strength, **seen)
            journal.add({"key": key, **asdict(tried)})
            shutil.rmtree(made)
        return RepairAttempt(**{name: value for name, value in journal.entries[key].items() if name != "key"})

    attempts = [] if found["verdict"] == "safe" else search({name: LADDERS[name] for name in chosen}, attempt, refine=refine)
    best = best_attempt(attempts)
    if best is not None:
        shutil.rmtree(out / "repaired", ignore_errors=True)
        realign(method(best.method, best.strength), what, out / "repaired", name=best.method)
        _keep(out / "attempts" / best.name / "check", out)
    record = {
        "outcome": "not needed" if found["verdict"] == "safe" else "repaired" if best else "nothing passes",
        "start": {"verdict": found["verdict"], "reason": found["decision"]["reason"]},
        "best": best and asdict(best),
        "attempts": [asdict(one) for one in attempts],
        "repaired": str(out / "repaired") if best else None,
        "versions": versions(),
    }
    write_json(out / "repair.json", record)
    run.finish(outcome=record["outcome"])
    return dict(json.loads(json.dumps(record)))


def world_preferences(policy: Policy, kind: str) -> PreferenceRows | None:
    """What SOMF learns on under a bundled world's policy: requests, or renders, that no test has; None for other policies."""
    if kind == "chat":
        chats = next((one for one in CHAT_WORLDS.values() if one.policy == policy.id), None)
        return None if chats is None else chats.preferences(WORLD_PAIRS)
    world = next((one for one in WORLDS.values() if one.policy == policy.id), None)
    return None if world is None else world.quadruples(per_category=-(-WORLD_PAIRS // len(policy.category_ids())))


def _masks(what: Realignment, rows: PreferenceRows, path: Path, steps: int, device: str) -> Path:
    """The masks' file, learned if it is not there yet."""
    if not path.exists():
        space = masked_space("auto", what.vectors)
        learn_masks(Somf(steps=steps), what.vectors, space, load_preferences(what, rows, device=device), path)
    return path


def _keep(check: Path, out: Path) -> None:
    """Copy the check of the result beside it."""
    for name in KEPT:
        if (check / name).is_dir():
            shutil.copytree(check / name, out / name, dirs_exist_ok=True)
        elif (check / name).exists():
            shutil.copy(check / name, out / name)


def _weights(subject: Subject) -> Path:
    return subject.adapter or subject.folder


def _method(name: str, strength: float) -> RealignMethod:
    kind: Any = REALIGN[name]
    made: RealignMethod = kind(strength=strength)
    return made
