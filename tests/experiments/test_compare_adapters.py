"""The comparison of adapters on a tiny language: only what is missing is done, failures are kept apart, numbers add up."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from text_data import glue_folder, images_folder, tiny_bert
from valign.checks import UserError
from valign.cli.compare import parse_rates, parse_seeds, parse_settings
from valign.cli.root import build
from valign.experiments.adapters import compare as module
from valign.experiments.adapters import shapes_diffusion
from valign.experiments.adapters.compare import Comparison, all_methods, compare_adapters
from valign.experiments.adapters.runs import measure_overhead, peak_memory, stretches
from valign.experiments.adapters.settings import BUDGETS, TextSetting
from valign.training.engine.tuning import parse_tuning

SETTINGS = {"lora": {"rank": 2}, "fourierft": {"n_frequency": 20}, "lora-sb": {"rank": 4}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("bert") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return glue_folder(tmp_path_factory.mktemp("glue"))


def comparison(model, data, **changes):
    given = {"methods": ("lora", "svfit"), "tasks": ("sst2", "stsb"), "seeds": (0, 1), "settings": {"lora": {"rank": 2}}}
    given |= {"bases": data.parent / "bases", "budget": BUDGETS["tiny"], **changes}
    return Comparison(model=model, data=data, device="cpu", **given)


@pytest.fixture(scope="module")
def finished(model, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("comparison")
    return out, compare_adapters(comparison(model, data), out, overhead=False)


def runs(out):
    return {str(path.relative_to(out / "runs")): json.loads(path.read_text()) for path in (out / "runs").rglob("*.json")}


def test_every_run_is_one_file_with_its_origin(finished):
    out, summary = finished
    found = runs(out)
    assert len(found) == 8
    record = found["stsb/svfit/seed-1.json"]
    assert (record["status"], record["method"], record["task"], record["seed"]) == ("done", "svfit", "stsb", 1)
    assert record["recipe"]["adapter"]["learning_rate"] > 0
    assert all(len(record[name]) == 64 for name in ("key", "model_sha256", "data_sha256"))
    assert record["versions"]["peft"]
    assert len(record["measured"]["curve"]) == 10
    assert np.isclose(np.mean(record["measured"]["curve"]), record["measured"]["mean_loss"])
    assert [row["method"] for row in summary["rows"]] == ["lora", "svfit"]


def test_the_table_is_that_of_the_runs(finished):
    out, summary = finished
    row = next(row for row in summary["rows"] if row["method"] == "lora")
    scores = {key: record["measured"]["score"] for key, record in runs(out).items() if record["method"] == "lora"}
    assert np.isclose(row["score"]["value"], np.mean(list(scores.values())))
    assert np.isclose(row["tasks"]["sst2"]["value"], np.mean([v for key, v in scores.items() if key.startswith("sst2")]))
    assert row["trained"] == 2 * 2 * (16 + 16) * 2  # two layers, query and value, rank 2
    assert "lora" not in row["against"]


def test_only_what_is_missing_or_failed_is_done_again(model, data, finished, monkeypatch):
    out, summary = finished
    asked = []
    monkeypatch.setattr(module, "run_once", lambda setting, tuning, **_: asked.append((setting.task, tuning.name, setting.seed)))
    assert compare_adapters(comparison(model, data), out, overhead=False)["rows"] == summary["rows"]
    assert not asked
    path = out / "runs" / "sst2" / "lora" / "seed-0.json"
    kept = path.read_text()
    path.write_text(json.dumps({**json.loads(kept), "status": "failed", "error": "x"}))
    monkeypatch.setattr(module, "report", lambda out: {})
    compare_adapters(comparison(model, data), out, overhead=False)
    path.write_text(kept)
    assert asked == [("sst2", "lora", 0)]


def test_a_failed_run_says_why_and_stops_no_other(model, data, tmp_path):
    broken = comparison(model, data, methods=("nola", "lora-sb"), tasks=("sst2",), seeds=(0,), settings={"lora-sb": {"rank": 99}})
    summary = compare_adapters(broken, tmp_path, overhead=False)
    assert [row["method"] for row in summary["rows"]] == ["nola"]
    (failed,) = summary["failed"]
    assert failed["method"] == "lora-sb"
    assert "LoRASB.rank must be in [1, 16]" in failed["error"]
    assert "LoRASB.rank" in (tmp_path / "report.html").read_text()


def test_other_options_do_not_overwrite(model, data, finished):
    with pytest.raises(UserError, match=r"seed-0\.json was made with another budget, option, model or data"):
        compare_adapters(comparison(model, data, settings={"lora": {"rank": 1}}), finished[0], overhead=False)


def test_the_page_holds_every_method_and_is_whole(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count('<svg class="plot"') == 2
    assert all(text in page for text in ("svfit", "minus LoRA", "What the papers claim", "trains a sixteenth"))
    assert (out / "table.md").read_text().count("\n") == 4


def test_same_seed_same_numbers(model, data, finished, tmp_path):
    again = comparison(model, data, methods=("svfit",), tasks=("sst2",), seeds=(1,), settings={})
    compare_adapters(again, tmp_path, overhead=False)
    ours, theirs = (runs(out)["sst2/svfit/seed-1.json"]["measured"] for out in (tmp_path, finished[0]))
    timed = {"start_seconds", "train_seconds"}
    assert {key: value for key, value in ours.items() if key not in timed} == {
        key: value for key, value in theirs.items() if key not in timed
    }


def test_cost_is_paired_with_lora(model, data):
    setting = TextSetting(model=model, data=data, task="sst2", seed=0, budget=BUDGETS["tiny"])
    found = measure_overhead(setting, "lora", {"rank": 2}, device="cpu")
    assert found["timed"] == 3
    assert found["step_ratio_quartiles"][0] <= found["step_ratio"] <= found["step_ratio_quartiles"][1]
    assert found["peak_bytes"] >= 0
    import torch

    assert peak_memory(torch.device("cpu")) > 2**20


def test_every_method_of_the_default_list_can_be_named():
    assert len(all_methods()) == len({parse_tuning(method).name for method in all_methods()})


@pytest.mark.parametrize(
    ("values", "count", "expected"), [([1.0, 3.0, 5.0], 20, [1.0, 3.0, 5.0]), ([1.0, 3.0, 5.0, 7.0], 2, [2.0, 6.0])]
)
def test_stretches_are_means_of_equal_parts(values, count, expected):
    assert stretches(values, count) == expected


def test_seeds_and_settings_are_read():
    assert parse_seeds("0-2") == parse_seeds("0,1,2") == (0, 1, 2)
    assert parse_settings([("lora:rank", 4), ("lora:alpha", 8)]) == {"lora": {"rank": 4, "alpha": 8}}
    for bad in ("", "2-1", "one", "1,,2"):
        with pytest.raises(UserError, match=r"--seeds must be numbers like 0,1,2"):
            parse_seeds(bad)
    with pytest.raises(UserError, match=r"--set must be METHOD:NAME=VALUE, got 'rank'"):
        parse_settings([("rank", 4)])


def test_tasks_with_files_need_a_folder():
    given = {"model": "minilm", "bases": Path("bases"), "methods": ("lora",), "seeds": (0,), "budget": BUDGETS["tiny"]}
    with pytest.raises(UserError, match=r"--data must be the folder of sst2, got none\. Tasks without one: glyphs, .*counterparts"):
        Comparison(data=None, tasks=("sst2", "glyphs"), **given)
    assert Comparison(data=None, tasks=("glyphs",), **given).setting("glyphs", 0).rows().train


def test_a_head_alone_has_nothing_to_train_in_the_shapes_world():
    given = {"model": "minilm", "data": None, "bases": Path("bases"), "seeds": (0,), "budget": BUDGETS["tiny"]}
    with pytest.raises(UserError, match=r"methods must have one besides head.*models of expert, glyphs have none"):
        Comparison(tasks=("expert", "glyphs"), methods=("head",), **given)
    Comparison(tasks=("expert",), methods=("head", "lora"), **given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, r"methods must be one or more, each once, got none"),
        ({"seeds": (0, 0)}, r"seeds must be one or more, each once, got 0, 0"),
        (
            {"tasks": ("qnli",)},
            r"tasks must be of cola, sst2, mrpc, rte, stsb, cifar10, mnist, glyphs, .*, got qnli",
        ),
        ({"settings": {"dora": {}}}, r"--set must name methods of the comparison, got dora"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(model, data, changes, message):
    with pytest.raises(UserError, match=message):
        comparison(model, data, **changes)


def test_the_command_prints_the_page(model, data, tmp_path):
    command = ["compare", "adapters", "--model", model, "--data", str(data), "--methods", "head", "--tasks", "rte", "--seeds", "0"]
    done = CliRunner().invoke(build(), [*command, "--budget", "tiny", "--no-overhead", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "report.html").exists()
    assert runs(tmp_path / "out")["rte/head/seed-0.json"]["measured"]["drift"] == pytest.approx(0, abs=1e-6)


def test_learning_rates_are_chosen_on_training_rows_of_another_seed(model, data, tmp_path):
    tried = comparison(model, data, methods=("lora",), tasks=("sst2",), seeds=(0,), rates=(1.0, 20.0))
    compare_adapters(tried, tmp_path, overhead=False)
    found = json.loads((tmp_path / "rates" / "sst2" / "lora.json").read_text())
    best = max(found["tried"], key=lambda entry: (entry["score"], -entry["loss"]))
    assert found["factor"] == best["factor"]
    record = runs(tmp_path)["sst2/lora/seed-0.json"]
    assert record["recipe"]["adapter"]["learning_rate"] == pytest.approx(found["factor"] * tried.tuning("lora").learning_rate)
    setting = tried.setting("sst2", module.REHEARSAL_SEED, rehearsal=True)
    whole = tried.setting("sst2", module.REHEARSAL_SEED)
    assert set(setting.rows().train) | set(setting.rows().held_out) == set(whole.rows().train)
    assert not {row.texts for row in setting.rows().held_out} & {row.texts for row in whole.rows().held_out}


def test_a_factor_that_fails_is_out(model, data, tmp_path):
    tried = comparison(model, data, methods=("full",), tasks=("sst2",), seeds=(0,), settings={}, rates=(1e34, 1.0))
    compare_adapters(tried, tmp_path, overhead=False)
    assert json.loads((tmp_path / "rates" / "sst2" / "full.json").read_text())["factor"] == 1.0


def test_rates_are_read():
    assert parse_rates("0.3,1,3") == (0.3, 1.0, 3.0)
    with pytest.raises(UserError, match=r"--rates must be factors like 0\.3,1,3, got 'fast'"):
        parse_rates("fast")


def test_images_on_a_small_vit_that_knows_other_images(tmp_path):
    budget = replace(BUDGETS["tiny"], steps=2, batch_size=2)
    data, methods = images_folder(tmp_path / "data"), ("lora", "ailora", "full")
    given = {"methods": methods, "tasks": ("cifar10",), "seeds": (0,), "settings": {}, "budget": budget}
    summary = compare_adapters(comparison("minilm", data, **given), tmp_path / "out", overhead=False)
    assert not summary["failed"]
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows["lora"]["trained"] == rows["ailora"]["trained"] == 4 * 2 * 8 * (96 + 96)
    found = [record["measured"] for record in runs(tmp_path / "out").values()]
    assert len({entry["skill_before"] for entry in found}) == 1  # the old head on the untrained ViT
    assert all(0 <= entry["skill"] <= 1 and entry["drift"] > 0 for entry in found)
    assert json.loads((tmp_path / "bases" / "mnist" / "run.json").read_text())["status"] == "done"


def test_glyphs_are_learnt_at_once_and_in_turn_without_a_folder(tmp_path):
    budget = replace(BUDGETS["tiny"], steps=8, batch_size=1, train_rows=12, held_out_rows=12, probes=10)
    out = tmp_path / "out"
    command = Comparison(
        model="minilm",
        data=None,
        bases=tmp_path / "bases",
        methods=("clip-svd", "codyra", "head"),  # the last is left out: CLIP has no head
        tasks=("glyphs", "glyph-stream"),
        seeds=(0,),
        budget=budget,
        device="cpu",
    )
    summary = compare_adapters(command, out, overhead=False)
    assert not summary["failed"]
    found = {key: record["measured"] for key, record in runs(out).items()}
    once, stream = found["glyphs/clip-svd/seed-0.json"], found["glyph-stream/codyra/seed-0.json"]
    for task in command.tasks:
        assert len({found[f"{task}/{method}/seed-0.json"]["untrained"] for method in ("clip-svd", "codyra")}) == 1
    assert len(found) == 4
    assert len({entry["skill_before"] for entry in found.values()}) == 1
    assert once["steps"] == stream["steps"] == 8
    assert "stream" not in once
    table = np.array(stream["stream"])
    assert table.shape == (4, 4)
    assert stream["score"] == pytest.approx(table[-1].mean())
    assert stream["backward"] == pytest.approx((table[-1] - table.diagonal())[:3].mean())
    assert once["trained"] == 2 * 4 * 6 * 128  # encoders, layers, linear modules, singular values
    page = (out / "report.html").read_text()
    assert "before training" in page
    assert "Backward" in page
    assert "forgets less of earlier tasks than LoRA" in page
    assert "| backward |" in (out / "table.md").read_text()


@pytest.mark.parametrize(("task", "score"), [("counterparts", "drawn"), ("expert", "removed")])
def test_a_diffusion_model_is_judged_by_what_it_draws(task, score, tmp_path, monkeypatch):
    monkeypatch.setattr(shapes_diffusion, "SAMPLING", replace(shapes_diffusion.SAMPLING, steps=2))
    command = Comparison(
        model="minilm",
        data=None,
        bases=tmp_path / "bases",
        methods=("lora", "svfit"),
        tasks=(task,),
        seeds=(0,),
        budget=replace(BUDGETS["tiny"], steps=3, batch_size=2, train_rows=14, timed=1),
        device="cpu",
    )
    summary = compare_adapters(command, tmp_path / "out", overhead=False)
    assert not summary["failed"]
    assert summary["scores"] == {task: score}
    found = [record["measured"] for record in runs(tmp_path / "out").values()]
    assert all(0 <= entry["score"] <= 1 and entry["score"] == entry["scores"][score] for entry in found)
    assert all(entry["drift"] > 0 and entry["steps"] == 3 for entry in found)
    assert len({(entry["untrained"], entry["skill_before"]) for entry in found}) == 1
    rows = {row["method"]: row for row in summary["rows"]}
    assert rows["svfit"]["trained"] < rows["lora"]["trained"]
