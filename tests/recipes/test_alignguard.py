import json
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from pair_data import CATEGORIES, build_pairs

from valign.checks import UserError
from valign.memory import MemoryConfig
from valign.models.diffusion.loading import load_model
from valign.models.files.adapter_files import open_adapter
from valign.recipes.alignguard import AlignGuardRecipe, train_expert, train_experts

FAST = {"steps": 2, "pairs_per_step": 2, "val_pairs": 1, "val_draws": 1}


@pytest.fixture(scope="module")
def sd(tiny_sd):
    return load_model(tiny_sd, device="cpu")


@pytest.fixture(scope="module")
def cache(sd, tmp_path_factory):
    return build_pairs(sd, tmp_path_factory.mktemp("data"), count=8)


def test_presets_are_the_papers():
    base, sdxl, shapes = AlignGuardRecipe(), AlignGuardRecipe.sdxl(), AlignGuardRecipe.shapes()
    assert (base.objective.beta, base.training.rank, base.training.steps, base.training.empty_prompt_prob) == (5000, 4, 2000, 0.2)
    assert (base.training.optimizer, base.training.learning_rate, base.training.warmup_steps) == ("adamw", 1.6e-4, 500)
    assert (sdxl.training.optimizer, sdxl.training.learning_rate, sdxl.training.warmup_steps) == ("adafactor", 1e-5, 0)
    assert (shapes.objective.beta, shapes.training.learning_rate, shapes.training.sft_weight) == (1000, 3e-3, 20)
    assert shapes.training.retain_weight  # spares benign prompts
    for recipe in (base, sdxl, shapes):
        assert recipe.training.pairs_per_step == 16
        assert recipe.warnings() == []


def test_changes_reach_objective_and_training_and_none_leaves_alone():
    recipe = AlignGuardRecipe().changed(beta=100.0, steps=7, seed=None)
    assert (recipe.objective.beta, recipe.training.steps, recipe.training.seed) == (100, 7, 0)
    with pytest.raises(ValueError, match=r"AlignGuardRecipe option must be one of accumulation, .*; got 'betta'"):
        recipe.changed(betta=1.0)


def test_values_become_the_type_of_their_option():
    changed = AlignGuardRecipe().changed(retain_weight=1500, targets=["attn2.to_k", "attn2.to_v"]).training
    assert isinstance(changed.retain_weight, float)
    assert changed.targets == ("attn2.to_k", "attn2.to_v")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("rank", "many", r"PreferenceConfig\.rank: .* valid integer.*, got 'many'"),
        ("targets", "attn2.to_k", r"PreferenceConfig\.targets: .* valid tuple, got 'attn2\.to_k'"),
        ("flip", "maybe", r"PreferenceConfig\.flip: .* valid boolean.*, got 'maybe'"),
        ("beta", -1, r"^DiffusionDPO\.beta must be in \(0, inf\), got -1\.0\.$"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_named(option, value, message):
    with pytest.raises(UserError, match=message):
        AlignGuardRecipe().changed(**{option: value})


def test_a_model_gets_the_preset_of_its_size(sd):
    assert AlignGuardRecipe.for_model(sd, steps=3) == AlignGuardRecipe.shapes(steps=3)

    class Large:
        family, latent_shape, dtype = "sdxl", (4, 128, 128), torch.bfloat16

    recipe = _for(Large())
    assert recipe == AlignGuardRecipe.sdxl()
    assert recipe.training.memory == MemoryConfig(accumulation=4, gradient_checkpointing=True)


def _for(model):
    from jaxtyping import config

    config.update("jaxtyping_disable", True)  # a stand-in for a model of several gigabytes
    try:
        return AlignGuardRecipe.for_model(model)
    finally:
        config.update("jaxtyping_disable", False)


def test_a_push_beyond_what_is_known_to_hold_is_a_warning():
    (warning,) = AlignGuardRecipe().changed(learning_rate=1e-2).warnings()
    assert "learning_rate x beta is 50; settings known to hold stay below 4" in warning


def test_experts_per_category_share_their_start_and_say_what_they_are(sd, cache, tmp_path):
    recipe = AlignGuardRecipe.shapes(**FAST, max_drift=1e9)
    results = train_experts(sd, cache, tmp_path, recipe, metadata={"policy_hash": "abc"})
    assert tuple(results) == CATEGORIES
    for name, result in results.items():
        metadata = json.loads((result.adapter / "valign.json").read_text())
        assert (metadata["category"], metadata["pairs"], metadata["policy_hash"]) == (name, 4, "abc")
        assert result.adapter == tmp_path / name / "adapter"
    files = [open_adapter(result.adapter) for result in results.values()]
    module = files[0].modules[0]
    first, second = (file.factors(module) for file in files)
    assert not torch.equal(first.up, second.up)
    assert (first.down - second.down).abs().max() < 0.05  # A ~ N(0, 1/4^2) in both, moved by two small steps
    assert train_experts(sd, cache, tmp_path, recipe, metadata={"policy_hash": "abc"}) == results


def test_joint_trains_on_every_pair(sd, cache, tmp_path):
    result = train_expert(sd, cache, None, tmp_path / "joint", AlignGuardRecipe.shapes(**FAST))
    metadata = json.loads((result.adapter / "valign.json").read_text())
    assert (metadata["category"], metadata["pairs"]) == ("joint", 8)


def test_a_category_without_data_is_refused_before_any_training(sd, cache, tmp_path):
    with pytest.raises(UserError, match=r"has no pair of category 'sexual', only of hate, violence"):
        train_experts(sd, cache, tmp_path / "all", AlignGuardRecipe.shapes(**FAST), categories=("hate", "sexual"))
    assert not (tmp_path / "all").exists()


@pytest.fixture
def command(sd, cache):
    from valign.cli.train import app

    def run(*words):
        fast = [f"--set={name}={value}" for name, value in FAST.items() if name not in ("steps", "pairs_per_step")]
        given = ["alignguard", "--model", sd.folder, "--data", str(cache.folder.parent), "--device", "cpu"]
        return CliRunner().invoke(app, [*given, "--steps", "2", "--pairs-per-step", "2", *fast, *words], catch_exceptions=False)

    return run


def test_the_command_trains_one_or_all(command, tmp_path):
    one = command("--category", "Violence", "--out", str(tmp_path / "one"))
    assert one.exit_code == 0, one.output
    assert str(tmp_path / "one" / "adapter") in one.output
    every = command("--all", "--out", str(tmp_path / "all"), "--no-flip", "--beta", "200")
    assert every.exit_code == 0, every.output
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == list(CATEGORIES)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), r"needs one of --category NAME, --all or --joint"),
        (("--all", "--joint"), r"needs one of --category NAME, --all or --joint"),
        (("--all", "--set", "beta"), r"--set must be NAME=VALUE, got 'beta'"),
        (("--all", "--preset", "flux"), r"--preset must be one of auto, stable-diffusion, sdxl, shapes; got 'flux'"),
        (("--category", "sexual"), r"has no pair of category 'sexual', only of hate, violence"),
    ],
)
def test_mistakes_on_the_command_line_are_one_sentence(command, tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        command("--out", str(tmp_path / "run"), *words)
