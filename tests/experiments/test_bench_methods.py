"""The whole comparison in one tiny run on the bundled model: every part is there, nothing is shown to work."""

import json
from dataclasses import replace

import pytest

from valign.cli.common import resolve_model
from valign.data.build import DataConfig
from valign.data.images.value_sets import ValueDataConfig
from valign.evaluation import Suite
from valign.experiments.methods import tuned
from valign.experiments.methods.bench import BIASED, bench_methods
from valign.experiments.methods.trained import MethodsConfig, methods_config
from valign.experiments.methods.tuned import GRIDS
from valign.recipes.align import AlignConfig
from valign.recipes.alignguard import AlignGuardRecipe
from valign.recipes.livo import LivoRecipe
from valign.recipes.tuning import searched
from valign.training.engine.loop import TrainingLoop
from valign.training.tasks.erasing import ErasingConfig
from valign.worlds.shapes.world import SHAPES

ALIKE = ("esd-u", "mean", "ties", "dare-ties")  # made as esd-x, regmean and sum are
FEW = {name: grid[: 2 if name in ("sum", "uce") else 1] for name, grid in GRIDS.items() if name not in ALIKE}
SYSTEMS = ["base", *FEW, "guard", "guard-dpo", "guard-livo"]


def tiny(seed):
    short = {"steps": 2, "pairs_per_step": 2, "val_pairs": 1, "val_draws": 1, "validate_every": 2, "seed": seed}
    data = DataConfig(categories=("hate", "violence"), pairs_per_category=2, steps=1, flip=False, retain=("a tree",), seed=seed)
    return MethodsConfig(
        align=AlignConfig(
            data=data,
            experts=AlignGuardRecipe.shapes(**short),
            merge="co-merge",
            calibration=2,
            sld=("medium",),
            steps=1,
            batch_size=40,
            seed=seed,
        ),
        values=ValueDataConfig(principles=("no-teeth", "equal-heads"), images=1, steps=1, flip=False, seed=seed, batch_size=40),
        livo=LivoRecipe.shapes().changed(**short),
        esd=ErasingConfig(iterations=1, sample_steps=2, seed=seed),
        per_concept=1,
        role_images=2,
        curve=2,
    )


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    world = replace(SHAPES, suite=lambda **options: Suite("few", SHAPES.suite(**options).prompts[::18]))
    model = resolve_model("shapes", device="cpu")

    def run():
        return bench_methods(world, model, out, [tiny(3)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuned, "GRIDS", FEW)
        yield out, run, run()


def test_every_method_is_in_the_report(bench):
    out, _, summary = bench
    assert [system["name"] for system in summary["systems"]] == SYSTEMS
    page = (out / "evaluation" / "report.html").read_text()
    for heading in ("How every method was set", "What training costs", "Social bias", "Convergence", "Run by run"):
        assert f"<h2>{heading}</h2>" in page


def test_costs_bias_curves_and_runs_are_recorded(bench):
    out, _, summary = bench
    record = json.loads((out / "bench.json").read_text())
    assert sorted(record["trained"]) == ["dpo", "esd-u", "esd-x", "experts", "livo", "retriever"]
    for name, runs in record["trained"].items():
        assert all(run["parameters"] > 0 and run["seconds"] > 0 for run in runs)
        assert [run["steps"] for run in runs] == [{"experts": 4, "dpo": 4, "retriever": 0, "livo": 2}.get(name, 1)]
    assert record["trained"]["experts"][0]["parameters"] == 2 * record["trained"]["dpo"][0]["parameters"]
    assert [one["name"] for one in record["bias"]] == [*BIASED, "livo-0", "livo-1"]
    base, without = record["bias"][0], record["bias"][-2]
    assert {**without, "name": "base", "versus": None} == base  # without the token LiVO is the base model
    assert {name: [point["step"] for point in points] for name, points in record["curves"].items()} == {
        "dpo": [0, 2, 4],
        "livo": [0, 1, 2],
    }
    shares = {system["name"]: system["ip"][0]["rate"]["share"]["value"] for system in summary["systems"]}
    assert {name: run["harm"] for name, (run,) in record["by_run"].items()} == pytest.approx(
        {name: 100 * share for name, share in shares.items()}
    )


def test_every_choice_is_recorded_with_its_candidates(bench):
    out, _, summary = bench
    record = json.loads((out / "bench.json").read_text())["tuned"]
    assert list(record) == list(FEW)
    for name, found in record.items():
        assert len(found["candidates"]) == searched(FEW[name])
        measured = [{key: value for key, value in one.items() if key not in ("harm", "benign")} for one in found["candidates"]]
        assert all(dict(candidate) in measured for candidate in FEW[name])
        assert found["chosen"] in measured
        assert all(0 <= one["harm"] <= 1 and 0 <= one["benign"] <= 1 for one in found["candidates"])
    described = {system["name"]: system["description"] for system in summary["systems"]}
    assert f"weight {record['sum']['chosen']['weight']:g}" in described["sum"]
    bases = [path / "evaluation" / "images" / "base" / "seconds.jsonl" for path in (out / "tuning").iterdir()]
    assert len({path.read_bytes() for path in bases}) == 1  # generated once


def test_every_method_has_as_many_candidates_as_the_others():
    assert {name: searched(grid) for name, grid in GRIDS.items()} == dict.fromkeys(GRIDS, tuned.SIZE)
    assert set(GRIDS) == {"negative-prompt", "sld", "uce", "esd-x", "esd-u", "dpo", "livo", *tuned.COMPARED_MERGES}
    assert {"co-merge", "sum", "mean", "ties", "dare-ties", "regmean"} == set(tuned.COMPARED_MERGES)


def test_what_should_change_nothing_changes_nothing(bench):
    drawn = {system["name"]: system for system in bench[2]["systems"]}
    assert drawn["guard"]["rmse"]["mean"]["value"] == 0  # benign prompts pass to the letter
    assert drawn["guard"]["blocking"]["benign"]["count"] == 0
    assert drawn["uce"]["rmse"]["mean"]["value"] > 0


def test_a_second_call_does_nothing_again(bench, monkeypatch):
    out, run, summary = bench
    written = [path for path in out.rglob("*") if path.suffix in (".png", ".safetensors", ".parquet", ".jsonl")]
    stamps = {path: path.stat().st_mtime_ns for path in written}
    monkeypatch.setattr(TrainingLoop, "run", None)
    assert run() == json.loads(json.dumps(summary))
    assert {path: path.stat().st_mtime_ns for path in written} == stamps


def test_some_categories_only():
    config = methods_config(SHAPES, "quick", categories=("hate", "violence"), seed=4)
    assert config.align.data.categories == ("hate", "violence")
    assert config.esd.iterations == 2 * config.align.experts.training.steps == 300
    assert config.values.principles == ("no-teeth", "no-rays", "equal-heads")
    whole = methods_config(SHAPES, "quick", seed=4)
    assert (whole.align.data.categories, whole.values.principles, whole.esd.iterations) == (None, None, 7 * 150)
