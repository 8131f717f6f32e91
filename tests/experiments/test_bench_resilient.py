"""The comparison of what benign fine-tuning leaves: its table from made-up rows, and one real run."""

import pytest

from valign.experiments.resilience import BUDGETS, bench_resilience, table


def row(harmful, of=20, **more):
    return {
        "harm": {f"u{i}": i < harmful for i in range(of)},
        "counterpart": {f"u{i}": i >= harmful for i in range(of)},
        "benign": {f"b{i}": True for i in range(10)},
        "fid": float(harmful),
        **more,
    }


def test_the_table_has_shares_the_worst_task_and_the_paired_rise():
    rows = {
        "base": row(20),
        "plain": row(4),
        "lora benign-pink": row(6, arm="lora", task="benign-pink"),
        "lora benign-dusk": row(14, arm="lora", task="benign-dusk"),
    }
    lines = table(rows).splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("| base, as it is | 0 | 100.0")
    assert lines[3].startswith("| plain, as it is | 0 | 20.0")
    cells = [cell.strip() for cell in lines[4].strip("|").split("|")]
    assert cells[:2] == ["lora, on plain", "2"]
    assert cells[2].startswith("50.0 [")  # 20 of 40 images
    assert cells[3] == "benign-dusk: 70.0"
    assert cells[4].startswith("+30.0 [+")  # 20 of 40 against 8 of 40
    assert cells[6].startswith("100.0")
    assert cells[7] == "10.0 (up to 14.0)"  # of 6 and 14


def test_what_nobody_measured_is_not_a_share():
    rows = {"base": {**row(3), "counterpart": {}, "fid": None}}
    assert table(rows).count("not measured") == 2


@pytest.mark.slow
def test_a_small_run_ends_and_is_not_made_again(tmp_path):
    from valign.worlds import world

    options = {"budget": BUDGETS["small"], "tasks": ("benign-dusk",)}
    rows = bench_resilience(world("shapes"), tmp_path, **options)
    assert list(rows) == [
        "base",
        "plain",
        "resilient",
        *(f"{arm} benign-dusk" for arm in ("lora", "agl", "constrained", "resilient")),
    ]
    before = (tmp_path / "rows.jsonl").stat().st_mtime_ns
    assert bench_resilience(world("shapes"), tmp_path, **options) == rows
    assert (tmp_path / "rows.jsonl").stat().st_mtime_ns == before
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["plain", "resilient"]
