import json
from dataclasses import replace

import pytest

from valign.training.tasks.preference.config import EXECUTION, PreferenceConfig


def test_recipe_leaves_out_what_does_not_shape_the_result():
    recipe = PreferenceConfig().recipe()
    json.dumps(recipe)
    assert not set(recipe) & set(EXECUTION)
    assert PreferenceConfig().changed({"split_pairs": True, "accumulation": 2, "checkpoint_every": 7}).recipe() == recipe
    assert replace(PreferenceConfig(), rank=8).recipe() != recipe


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rank", 0, r"\[1, inf\)"),
        ("learning_rate", 0.0, r"\(0, inf\)"),
        ("empty_prompt_prob", 1.5, r"\[0, 1\]"),
        ("winner_safeguard", -0.1, r"\[0, 1\]"),
        ("min_snr", 0.0, r"\(0, inf\)"),
        ("alpha", float("nan"), r"\(0, inf\)"),
        ("val_fraction", 0.9, r"\[0, 0\.5\]"),
    ],
)
def test_refuses_numbers_out_of_range(name, value, rule):
    with pytest.raises(ValueError, match=rf"PreferenceConfig\.{name} must be in {rule}, got"):
        PreferenceConfig(**{name: value})


def test_records_keep_the_names_that_older_runs_have():
    recorded = PreferenceConfig(displacement_warn=0.3, displacement_stop=0.4, displacement_window=7).recipe()
    assert (recorded["alarm_warn"], recorded["alarm_stop"], recorded["alarm_window"]) == (0.3, 0.4, 7)
    assert not [name for name in recorded if name.startswith("displacement")]
