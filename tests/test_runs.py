"""The record of a folder: what differs is named, with both values."""

import pytest

from valign.checks import UserError
from valign.files import hash_value
from valign.runs import Run


def start(folder, *, recipe, inputs=None, seed=0):
    return Run.open(folder, step="train", recipe=recipe, inputs=inputs or {}, seed=seed)


def test_every_option_that_differs_is_named_with_both_values(tmp_path):
    start(tmp_path, recipe={"config": {"steps": 5, "rate": 0.1}, "targets": ["to_q"]}, inputs={"model": hash_value("a")})
    with pytest.raises(UserError, match="was made with another recipe and inputs and seed: ") as caught:
        start(
            tmp_path,
            recipe={"config": {"steps": 9, "rate": 0.1, "new": True}, "targets": []},
            inputs={"model": hash_value("b")},
            seed=3,
        )
    said = str(caught.value)
    for part in (
        "config.steps was 5 and is now 9",
        "config.new was not there and is now true",
        'targets was ["to_q"] and is now []',
        f"model was {hash_value('a')[:12]} and is now {hash_value('b')[:12]}",
        "seed was 0 and is now 3",
        "Give the earlier values to go on with it, choose another output folder, or delete this one",
    ):
        assert part in said
    assert "rate" not in said


def test_a_long_value_is_cut(tmp_path):
    start(tmp_path, recipe={"retain": ["a bowl of fruit"] * 50})
    with pytest.raises(UserError) as caught:
        start(tmp_path, recipe={"retain": []})
    assert " ... and is now []" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_the_same_recipe_goes_on(tmp_path):
    start(tmp_path, recipe={"steps": 5}).finish(loss=1.0)
    again = start(tmp_path, recipe={"steps": 5})
    assert again.done
    assert again.results == {"loss": 1.0}
