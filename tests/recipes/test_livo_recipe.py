from types import SimpleNamespace

import pytest

from valign.memory import MemoryConfig
from valign.objectives import DiffusionDPO, LiVO
from valign.recipes.livo import LivoRecipe


def test_the_defaults_are_the_authors():
    recipe = LivoRecipe()
    assert recipe.objective == LiVO(beta=1000.0, alpha=500.0, gamma_win=1.0, gamma_lose=0.5)
    training = recipe.training
    assert (training.learning_rate, training.pairs_per_step, training.steps, training.weight_decay) == (1e-6, 8, 15_000, 0.01)
    assert (training.max_grad_norm, training.flip, training.empty_prompt_prob) == (1.0, True, 0.0)
    assert recipe.lora_rank is None


@pytest.mark.parametrize(
    ("family", "size", "dtype", "expected"),
    [
        ("stable-diffusion", 8, "torch.float32", {"flip": False, "steps": 300}),
        ("stable-diffusion", 64, "torch.float16", {"flip": True, "steps": 15_000}),
        ("sdxl", 128, "torch.bfloat16", {"memory": MemoryConfig(gradient_checkpointing=True)}),
    ],
)
def test_the_preset_fits_the_model(family, size, dtype, expected, as_in_use):
    training = LivoRecipe.for_model(SimpleNamespace(family=family, latent_shape=(4, size, size), dtype=dtype)).training
    assert {name: getattr(training, name) for name in expected} == expected


def test_options_reach_objective_training_and_recipe():
    recipe = LivoRecipe().changed(beta=10.0, steps=3, lora_rank=2, layout="padded", seed=None)
    assert (recipe.objective.beta, recipe.training.steps, recipe.lora_rank, recipe.layout) == (10.0, 3, 2, "padded")
    compared = recipe.with_objective("diffusion-dpo")
    assert compared.objective == DiffusionDPO()
    assert compared.training == recipe.training
    assert compared.with_objective("livo").objective == LiVO()
    assert recipe.with_objective("livo") == recipe  # its own numbers stay
    assert LivoRecipe.shapes().with_objective("livo").objective == LiVO(beta=100.0, alpha=50.0, gamma_win=10.0)


def test_refuses_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"LivoRecipe option must be one of .*gamma_win"):
        LivoRecipe().changed(gamma=1)
    with pytest.raises(ValueError, match="must be one of diffusion-dpo, livo; got 'kto'"):
        LivoRecipe().with_objective("kto")
