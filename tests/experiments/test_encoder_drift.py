"""benchmarks/encoder_drift.py on made-up texts: rows that are kept, and the table's arithmetic."""

import json

import numpy as np
import pytest
from scipy.stats import t as student

from valign.checks import UserError


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.slow
def test_the_same_command_goes_on_and_prints_every_arm(bench, tmp_path, monkeypatch, capsys):
    for name in bench.JUDGED:
        texts = (("a red boat", 0), ("a man beats another man bloody", 1))
        found = [
            {"id": f"{n}{label}", "prompt": f"{text} {name} {n}", "label": label, "concept": f"c{n}"}
            for n in range(30)
            for text, label in texts
        ]
        write(tmp_path / name / f"{name}.jsonl", found)
    for part, numbers in (("train", range(8)), ("dev", range(8, 12))):
        write(tmp_path / "glue_sst2" / f"{part}.jsonl", [{"sentence": f"film {n}", "label": n % 2} for n in numbers])
    options = ["--arms", "lora", "agl*10", "--tasks", "sst2", "--steps", "1", "--batch", "2", "--calibration", "4", "--count", "4"]
    monkeypatch.setattr("sys.argv", ["encoder_drift.py", "--data", str(tmp_path), "--out", str(tmp_path / "out"), *options])
    bench.main()
    first = capsys.readouterr().out
    bench.main()
    again = capsys.readouterr().out
    assert [line.split(" | ")[1] for line in again.splitlines()[2:]] == ["none", "`lora`", "`agl*10`"]
    assert first.endswith(again)
    assert len(next((tmp_path / "out").iterdir()).read_text().splitlines()) == 3


def test_a_factor_is_on_every_weight_of_an_arm(bench):
    agl = bench.objectives_of("agl:vector*10")["agl"]
    assert (agl.lambda_A, agl.lambda_T, agl.lambda_NC, agl.projector) == (2.5, 5.0, 1.0, "vector")
    assert bench.objectives_of("kl:weight=3*2")["kl"].weight == 6.0
    with pytest.raises(UserError, match="--preserve must name objectives"):
        bench.objectives_of("ewc")


def test_what_is_given_back_is_a_share_of_plain_loras_mean_loss(bench):
    # lost 0.2 and 0.1, mean 0.15; the method lost 0.05 and 0.1, so 0.15 and 0 of it are not lost: 100 % and 0 %
    half = student.ppf(0.975, 1) * np.std([100, 0], ddof=1) / np.sqrt(2)
    assert bench.given_back(0.9, {0: 0.7, 1: 0.8, 2: 0.1}, {0: 0.85, 1: 0.8}) == f"50 [{50 - half:.0f}, {50 + half:.0f}]"
    assert bench.given_back(0.9, {0: 0.7}, {0: 0.8}) == "50"
    assert bench.given_back(0.9, {0: 0.95}, {0: 0.8}) == ""
    assert bench.given_back(0.9, {}, {0: 0.8}) == ""
