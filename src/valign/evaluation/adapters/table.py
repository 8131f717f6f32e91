"""Runs of the comparison of adapters -> one row per method: means with intervals, and paired tests against the references."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from valign.evaluation.statistics import holm, sign_flip_test, t_interval

Records = Sequence[Mapping[str, Any]]
Key = tuple[str, int]  # task and seed


def summarize(
    records: Records, costs: Mapping[str, Mapping[str, Any]], *, references: Sequence[str], order: Sequence[str] = ()
) -> dict[str, Any]:
    """JSON-able.

    A method's mean score is over tasks, and its interval Student's over seeds, of the seeds in which every task is done; one seed
    has none (null). ``best`` names a method that the paired test tells from every other one, or says why none is named.
    Differences are paired by task and seed; their p-values are exact sign-flip tests, Holm's over the methods tested against one
    reference.

    Args:
        order: Of the rows; methods that it does not name come after, by name.
    """
    done = [record for record in records if record["status"] == "done"]
    names = {record["method"] for record in done}
    methods = [name for name in order if name in names] + sorted(names - set(order))
    tasks = sorted({record["task"] for record in done})
    tables = {name: measured(done, name) for name in methods}
    rows = [_row(name, tables[name], tasks, costs.get(name)) for name in methods]
    for reference in references:
        if reference in tables:
            _test_against(reference, rows, tables)
    return {
        "format": 1,
        "best": best_method(rows, tables),
        "tasks": tasks,
        "scores": {record["task"]: record["score_name"] for record in done},
        "untrained": {record["task"]: record["measured"]["untrained"] for record in done if "untrained" in record["measured"]},
        "seeds": sorted({record["seed"] for record in done}),
        "budget": done[0]["budget"],
        "references": [name for name in references if name in tables],
        "rows": rows,
        "failed": [
            {name: record[name] for name in ("method", "task", "seed", "error")}
            for record in records
            if record["status"] == "failed"
        ],
        "models": {record["task"]: record["model_sha256"] for record in done},
        "versions": done[0]["versions"],
    }


def measured(records: Records, method: str) -> dict[Key, Mapping[str, Any]]:
    """What was measured in each finished run of one method, sorted."""
    found = {(record["task"], record["seed"]): record["measured"] for record in records if record["method"] == method}
    return dict(sorted(found.items()))


def paired(ours: Mapping[Key, Mapping[str, Any]], theirs: Mapping[Key, Mapping[str, Any]], name: str) -> np.ndarray:
    """Differences of one measure, ours minus theirs, over the tasks and seeds in which both have it."""
    both = [key for key in ours if key in theirs and name in ours[key] and name in theirs[key]]
    return np.array([ours[key][name] - theirs[key][name] for key in both], dtype=np.float64)


def interval(values: Sequence[float] | np.ndarray) -> dict[str, float | None]:
    """Mean with Student's interval, JSON-able; without limits where there is one value."""
    if len(values) == 1:
        return {"value": float(values[0]), "low": None, "high": None}
    return dict(asdict(t_interval(np.asarray(values, dtype=np.float64))))


def best_method(
    rows: Sequence[Mapping[str, Any]], tables: Mapping[str, Mapping[Key, Mapping[str, Any]]], *, alpha: float = 0.05
) -> dict[str, str | None]:
    """``method``, or None, and ``text``. Tests are paired by task and seed, Holm's over the other methods."""
    ranked = sorted(rows, key=lambda row: -row["score"]["value"])
    if len(ranked) < 2:
        return {"method": None, "text": "There is nothing to compare."}
    first, *others = (row["method"] for row in ranked)
    if len({seed for _, seed in tables[first]}) < 2:
        return {"method": None, "text": "No method is named the best: each was trained with one seed."}
    differences = {name: paired(tables[first], tables[name], "score") for name in others}
    tests = holm([sign_flip_test(found) if len(found) else 1.0 for found in differences.values()])
    level = [name for name, p in zip(differences, tests, strict=True) if p >= alpha]
    if level:
        listed = ", ".join(level[:5]) + (" and others" if len(level) > 5 else "")
        return {"method": None, "text": f"No method is named the best: the paired test does not tell {first} from {listed}."}
    return {"method": first, "text": f"{first} scores highest; the paired test tells it from every other method."}


def _row(name: str, table: Mapping[Key, Mapping[str, Any]], tasks: Sequence[str], cost: Mapping[str, Any] | None) -> dict[str, Any]:
    def over_seeds(value: Any) -> dict[str, float | None]:
        """Mean over tasks per seed, then over the seeds that have every task; else over all runs."""
        seeds = sorted({seed for _, seed in table})
        whole = [[value(table[task, seed]) for task in tasks] for seed in seeds if all((task, seed) in table for task in tasks)]
        values = [float(np.mean(one)) for one in whole] or [value(entry) for entry in table.values()]
        return interval(values)

    first = next(iter(table.values()))
    backward = [entry["backward"] for entry in table.values() if "backward" in entry]
    return {
        "method": name,
        "runs": len(table),
        "tasks": {
            task: interval([entry["score"] for key, entry in table.items() if key[0] == task])
            for task in tasks
            if any(key[0] == task for key in table)
        },
        "score": over_seeds(lambda entry: entry["score"]),
        "drift": over_seeds(lambda entry: entry["drift"]),
        "skill": over_seeds(lambda entry: entry["skill"] - entry["skill_before"]),
        "backward": interval(backward) if backward else None,  # of streams alone
        "sharpness": over_seeds(lambda entry: entry["sharpness"]),
        "mean_loss": over_seeds(lambda entry: entry["mean_loss"]),
        "change_rank": over_seeds(lambda entry: entry["change_rank"]),
        "start_seconds": over_seeds(lambda entry: entry["start_seconds"]),
        "trained": round(float(np.mean([entry["trained"] for entry in table.values()]))),
        "adapter_bytes": round(float(np.mean([entry["adapter_bytes"] for entry in table.values()]))),
        "optimizer_bytes": first["optimizer_bytes"],
        "cost": dict(cost["measured"]) if cost and cost["status"] == "done" else None,
        "against": {},
    }


def _test_against(reference: str, rows: Sequence[dict[str, Any]], tables: Mapping[str, Mapping[Key, Mapping[str, Any]]]) -> None:
    """Add the paired tests to every row but the reference's own."""
    tested = []
    for row in rows:
        differences = paired(tables[row["method"]], tables[reference], "score")
        if row["method"] != reference and len(differences):
            tested.append((row, differences))
    raw = [sign_flip_test(differences) for _, differences in tested]
    for (row, differences), p, adjusted in zip(tested, raw, holm(raw)):
        row["against"][reference] = {
            "difference": interval(differences),
            "pairs": len(differences),
            "p": p,
            "p_holm": adjusted,
        }
