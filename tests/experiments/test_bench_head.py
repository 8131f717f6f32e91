"""Rivals on toy rows: the same rows for all, unknown sources, resuming, and the tables."""

import json

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli.bench import app
from valign.data.prompts.pairs import LabelledPrompt
from valign.experiments.guard_head import NOTHING, RIVALS, bench_head
from valign.files import read_json
from valign.models.encoders.minilm import MiniLM
from valign.policy import load_policy
from valign.training.tasks.guard_head.fit import FitConfig

TOYS = ("boat", "lamp", "tree")


def rows(source, words=("quiet", "furious"), count=12):
    return [
        LabelledPrompt(f"{source}{toy}{n}{label}", f"{a} {toy} number {n} of {source}", label, (), source, f"{source}{toy}{n}")
        for toy in TOYS
        for n in range(count)
        for label, a in enumerate(words)
    ]


@pytest.fixture(scope="module")
def encoder():
    return MiniLM()


@pytest.fixture(scope="module")
def config():
    return FitConfig(epochs=3, hidden=16, buckets=512, generated=0)


def test_a_source_that_none_saw(encoder, config, tmp_path, monkeypatch):
    """Two sources speak alike and one means the opposite: whoever learnt from the first two is wrong about the third."""
    data = [*rows("one"), *rows("two"), *rows("odd", ("furious", "quiet"))]
    seen = {}
    for name, fit in RIVALS.items():
        monkeypatch.setitem(
            RIVALS, name, lambda bench, some, fit=fit, name=name: seen.setdefault(name, []).append(some) or fit(bench, some)
        )
    results = bench_head(data, load_policy("default"), tmp_path, config=config, encoder=encoder, leave_out=["odd"], target_fpr=0.1)
    splits = results["splits"]
    assert list(splits) == ["odd", NOTHING]
    assert all(splits["odd"][name]["auroc"]["value"] < 0.5 for name in ("tfidf", "linear", "mlp", "head"))
    assert splits["odd"]["tfidf"]["unsafe"] == splits["odd"]["tfidf"]["safe"] == len(rows("odd")) // 2  # the whole source
    first = next(iter(seen.values()))
    assert all(each == first for each in seen.values())  # the same rows for every rival
    assert {row.source for row in first[0]} == {"one", "two", "policy"}
    assert {row.source for row in first[1]} == {"one", "two", "odd", "policy"}
    assert (tmp_path / "roc.png").stat().st_size > 1000
    report = (tmp_path / "report.md").read_text()
    assert report.count("| odd |") == report.count("| rest of odd |") == 3
    assert {name: each["tfidf"]["safe"] > 0 for name, each in results["seen"].items()} == {"odd": True, "one": True, "two": True}
    assert "furious" not in report


def test_an_interrupted_run_goes_on(encoder, config, tmp_path, monkeypatch):
    data, policy = [*rows("one"), *rows("two")], load_policy("default")
    made = {"config": config, "encoder": encoder, "leave_out": ["two"], "target_fpr": 0.1}

    def stop(bench, some):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setitem(RIVALS, "head", stop)
        with pytest.raises(KeyboardInterrupt):
            bench_head(data, policy, tmp_path, **made)
    stored = (tmp_path / "two" / "linear.json").read_bytes()
    with monkeypatch.context() as once:
        calls = []
        once.setitem(RIVALS, "linear", lambda bench, some, fit=RIVALS["linear"]: calls.append(1) or fit(bench, some))
        resumed = bench_head(data, policy, tmp_path, **made)
        assert len(calls) == 1  # for the split that leaves nothing out; the other was there
    assert (tmp_path / "two" / "linear.json").read_bytes() == stored
    assert all(resumed["splits"]["two"][name]["auroc"]["value"] > 0.9 for name in ("tfidf", "linear", "head"))
    assert resumed == bench_head(data, policy, tmp_path, **made) == read_json(tmp_path / "results.json")
    with pytest.raises(UserError, match="was made with another recipe"):
        bench_head(data, policy, tmp_path, **made | {"target_fpr": 0.2})


def test_refuses_what_leaves_nothing(encoder, config, tmp_path):
    with pytest.raises(UserError, match=r"--leave-out must name sources of the data, got three\. Known: one, two"):
        bench_head(
            [*rows("one"), *rows("two")], load_policy("default"), tmp_path, config=config, encoder=encoder, leave_out=["three"]
        )
    with pytest.raises(UserError, match="must leave safe and unsafe rows to train on"):
        bench_head(rows("one"), load_policy("default"), tmp_path, config=config, encoder=encoder)


def test_the_command(tmp_path):
    for name in ("one", "two"):
        lines = [{"id": row.id, "prompt": row.prompt, "label": row.label, "pair_id": row.group} for row in rows(name, count=8)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    command = [
        "head",
        "-d",
        str(tmp_path),
        "-o",
        str(tmp_path / "run"),
        "--leave-out",
        "two",
        "--epochs",
        "2",
        "--generated",
        "0",
        "--target-fpr",
        "0.2",
    ]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "Recall" in result.stdout
    assert list(read_json(tmp_path / "run" / "results.json")["splits"]) == ["two", NOTHING]
