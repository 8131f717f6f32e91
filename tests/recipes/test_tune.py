"""How a method's settings are chosen: the rule, the prompts it is chosen on, and that a search goes on where it stopped."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from valign.checks import UserError
from valign.data.prompts.pairs import PromptPair
from valign.evaluation import Evaluators, adapter_system, base_system
from valign.evaluation.suite import EvalPrompt, Suite
from valign.interfaces import DetectorCard, SamplingConfig
from valign.merging import MERGES
from valign.models.diffusion.loading import load_model
from valign.models.diffusion.text_states import text_readers
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.recipes.quickstart import of_categories, world_tuning
from valign.recipes.tuning import Tunable, choose, described, finer, searched, shortened, tune, tuning_suite
from valign.worlds import world


def system(name, harm, benign=None, counterpart=None, clip=None):
    def rate(value):
        return None if value is None else {"share": {"value": value}}

    return {
        "name": name,
        "ip": [{"category": "", "column": "all", "rate": rate(harm)}],
        "fidelity": {} if benign is None else {"everything asked": rate(benign)},
        "counterpart": rate(counterpart),
        "clip_score": None if clip is None else {"mean": {"value": clip}},
    }


@pytest.mark.parametrize(
    ("others", "chosen"),
    [
        ([system("a", 0.10, 0.98, 0.5), system("b", 0.02, 0.98, 0.4)], "b"),  # harm first
        ([system("a", 0.10, 0.966, 0.5), system("b", 0.02, 0.960, 0.9)], "a"),  # b loses more than one and a half points of 0.98
        ([system("a", 0.02, 0.98, 0.4), system("b", 0.02, 0.98, 0.9), system("c", 0.02, 0.98, 0.9)], "b"),  # shown, then weakest
        ([system("a", 0.00, 0.50, 0.9), system("b", 0.30, 0.90, 0.1)], "b"),  # none keeps: the one that keeps most
    ],
)
def test_the_rule(others, chosen):
    assert choose([system("base", 1.0, 0.98, 0.0), *others]) == chosen


def test_without_a_reader_of_scenes_clip_says_what_is_kept_and_without_both_harm_alone():
    assert choose([system("base", 1, clip=30.0), system("a", 0.2, clip=29.8), system("b", 0.1, clip=20.0)]) == "a"
    assert choose([system("base", 1, clip=30.0), system("a", 0.2, clip=29.6), system("b", 0.1, clip=29.2)]) == "a"  # half a point
    assert choose([system("base", 1), system("a", 0.2), system("b", 0.1)]) == "b"


def test_tuning_prompts_of_training_data_are_of_both_kinds_and_all_categories():
    pairs = [
        PromptPair(f"{name}-{n}", f"a {name} {n}", f"a calm {n}", (name,), "", kind)
        for name in ("hate", "violence")
        for n, kind in enumerate(("explicit", "implicit", "other", "explicit", "explicit"))
    ]
    suite = tuning_suite(pairs, [f"a calm {n}" for n in range(9)], limit=9)
    assert len(suite) == 9
    assert sum(prompt.benign for prompt in suite.prompts) == 3
    assert suite.categories() == ("hate", "violence")
    assert suite == tuning_suite(pairs[::-1][::-1], [f"a calm {n}" for n in range(8, -1, -1)], limit=9)


def test_a_third_of_the_tuning_prompts_is_benign():
    many = [EvalPrompt(f"u{n}", f"a {n}", "hate" if n % 2 else "violence", "explicit") for n in range(30)]
    suite = Suite("t", (*many, *(EvalPrompt(f"b{n}", f"b {n}") for n in range(30))))
    short = shortened(suite, 12)
    assert [sum(prompt.category == name for prompt in short.prompts) for name in ("hate", "violence", "")] == [4, 4, 4]
    assert shortened(suite, 60) == suite


def test_a_worlds_tuning_prompts_are_no_test_prompts_and_hold_no_held_out_harm():
    shapes = world("shapes")
    tests = shapes.suite(per_concept=2, seed=3)
    tuning = of_categories(world_tuning(shapes, tests, per_concept=2, seed=3), ["hate"])
    assert tuning.categories() == ("hate",)
    assert any(prompt.benign for prompt in tuning.prompts)
    assert not any(prompt.held_out and not prompt.benign for prompt in tuning.prompts)
    held_out = [
        " ".join(prompt.prompt for prompt in suite.prompts if prompt.held_out and prompt.benign) for suite in (tuning, tests)
    ]
    assert ["kite" in text for text in held_out] == [True, False]  # each split has held-out benign glyphs of its own
    assert not {prompt.prompt for prompt in tuning.prompts} & {prompt.prompt for prompt in tests.prompts}


class Dark:
    """Calls dark images harmful."""

    card = DetectorCard("dark", ("hate",), 0.5, "0" * 64)

    def detect(self, images):
        return np.array([[1 - np.asarray(image.convert("L")).mean() / 255] for image in images])


def test_a_search_measures_every_candidate_once_and_goes_on(tiny_sd, tmp_path):
    model, calls = load_model(tiny_sd, device="cpu"), []
    factors = {
        name: LoraFactors(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 1.0)
        for name, layer in text_readers(model).items()
    }

    sampling = SamplingConfig(steps=1, guidance_scale=1.0)

    def system(candidate, name, folder):
        calls.append(candidate["weight"])
        scaled = {name: dataclasses.replace(lora, scale=candidate["weight"]) for name, lora in factors.items()}
        save_adapter(folder / "adapter", scaled, metadata={"base_fingerprint": model.fingerprint()})
        return adapter_system(model, folder / "adapter", sampling, name=name, description=described(candidate))

    base, method = base_system(model, sampling), Tunable("sum", ({"weight": 0.5}, {"weight": 2.0}), system)
    tuning = Suite("t", (EvalPrompt("u", "a red man", "hate", "explicit"), EvalPrompt("b", "a blue photo")))
    arguments = (Evaluators(Dark()), sampling)
    found = tune(base, method, tuning, *arguments, tmp_path / "a")
    weights = [0.5, 1.0, 1.5, 2.0] if found.chosen["weight"] < 2 else [0.5, 2.0, 2.5, 3.0]  # beside what the grid chose
    assert sorted(set(calls)) == weights
    assert json.loads((tmp_path / "a" / "choice.json").read_text())["chosen"] == found.chosen
    assert [candidate["weight"] for candidate, _ in found.measured] == weights
    assert [system["description"] for _, system in found.measured] == [f"weight {weight:g}" for weight in weights]
    assert (tmp_path / "a" / "evaluation" / "report.html").exists()
    images = tmp_path / "a" / "evaluation" / "images"
    assert {folder.name for folder in images.iterdir()} == {"base", *(f"sum-weight-{weight:g}" for weight in weights)}
    before = (tmp_path / "a" / "evaluation" / "summary.json").stat().st_mtime_ns
    assert tune(base, method, tuning, *arguments, tmp_path / "a").chosen == found.chosen
    assert (tmp_path / "a" / "evaluation" / "summary.json").stat().st_mtime_ns == before
    choice = tmp_path / "a" / "choice.json"
    said = json.loads(choice.read_text())
    choice.write_text(json.dumps(said | {"candidates": [*method.grid, {"weight": 2.5}]}))  # of another outcome of the grid
    assert [one["weight"] for one, _ in tune(base, method, tuning, *arguments, tmp_path / "a").measured] == weights
    assert json.loads(choice.read_text()) == said
    blind = dataclasses.replace(base, generate=lambda prompts, seeds: 1 / 0)  # its images are taken over
    again = tune(blind, method, tuning, *arguments, tmp_path / "b", base_images=images / "base")
    assert [system["ip"] for _, system in again.measured] == [system["ip"] for _, system in found.measured]
    with pytest.raises(UserError, match="best-single has no grid to search"):
        tune(base, Tunable("best-single", (), system), tuning, *arguments, tmp_path / "c")
    with pytest.raises(UserError, match="must hold unsafe and benign prompts"):
        tune(base, method, Suite("t", tuning.prompts[:1]), *arguments, tmp_path / "c")


GRID = tuple({"weight": weight} for weight in (0.5, 0.8, 1.4))


@pytest.mark.parametrize(
    ("chosen", "kept", "beside"),
    [(0.5, True, [0.6, 0.7]), (0.8, True, [1.0, 1.2]), (1.4, True, [1.6, 1.8]), (0.5, False, [0.167, 0.333])],
)
def test_a_search_goes_on_between_what_it_chose_and_the_next_stronger(chosen, kept, beside):
    assert [one["weight"] for one in finer(GRID, {"weight": chosen}, kept=kept)] == beside


@pytest.mark.parametrize(
    "grid", [GRID[:1], ({"text": "a"}, {"text": "b"}), ({"lam": 1.0, "scale": 1.0}, {"lam": 2.0, "scale": 1.0})]
)
def test_nothing_lies_between_settings_that_are_not_one_number(grid):
    assert finer(grid, grid[0]) == []
    assert searched(grid) == len(grid)
    assert searched(GRID) == len(GRID) + 2


def test_every_grid_is_of_the_merges_own_options():
    for kind in MERGES.values():
        known = {"weight", *(item.name for item in dataclasses.fields(kind))}
        assert all(set(candidate) <= known for candidate in kind.grid)
