"""Names on the command line."""

import shutil

import pytest

from valign.checks import UserError
from valign.cli import common
from valign.policy import load_policy


@pytest.mark.parametrize("name", ["", "oracel", "safety-checker", "clip-probe=", "nudenet=x", "oracle=x", "oracle+x"])
def test_an_unknown_detector_lists_the_known(name):
    with pytest.raises(UserError, match="detector must be oracle, nudenet, safety-checker=FOLDER, clip-probe=FOLDER"):
        common.resolve_detector(name, model="shapes")


def test_detectors_join():
    both = common.resolve_detector("oracle+shapes", model="shapes")
    one = common.resolve_detector("oracle", model="shapes")
    assert len(both.card.classes) == 2 * len(one.card.classes)


def test_readers_may_be_left_out():
    assert common.resolve_fidelity("none", model="shapes") is None
    assert common.resolve_clip(None, model="shapes") is None
    with pytest.raises(UserError, match="fidelity must be oracle or none; got 'clip'"):
        common.resolve_fidelity("clip", model="shapes")


def test_what_knows_a_world_is_refused_for_another_model(tiny_sd):
    for place in (str(tiny_sd), "owner/name-that-is-not-here", "no such folder"):
        with pytest.raises(
            UserError, match=r"world-oracle judges images of models of the world shapes only, and .* is not one of them"
        ):
            common.resolve_detector("oracle", model=place)
        with pytest.raises(UserError, match="world-oracle judges images of models of the world shapes only"):
            common.resolve_fidelity("oracle", model=place)
        for resolve in (common.resolve_clip, common.resolve_contrast):
            with pytest.raises(UserError, match=r"--clip must not be of the world shapes for .*, which is not one of its models"):
                resolve("shapes", model=place)
    with pytest.raises(UserError, match=r"--clip must not be of the world shapes"):
        common.resolve_contrast("oracle", model=str(tiny_sd))


def test_a_folder_that_says_its_world_is_judged_by_its_oracle(tiny_sd, tmp_path):
    folder = tmp_path / "derived"
    shutil.copytree(tiny_sd, folder)
    (folder / "valign_world.json").write_text('{"world": "shapes", "version": 2}')
    assert common.resolve_detector("oracle", model=str(folder)).card.name == "world-oracle"


def test_the_shapes_world_is_found_by_name():
    model = common.resolve_model("shapes")
    assert model.family == "stable-diffusion"
    assert common.resolve_suite("shapes", load_policy("shapes")).prompts
    assert common.resolve_clip("shapes", model="shapes") is not None


def test_only_a_world_makes_prompt_pairs():
    (pair,) = common.resolve_grammar(load_policy("shapes")).pairs("violence", 1, 0)
    assert pair.categories == ("violence",)
    with pytest.raises(UserError, match="policy default has no grammar"):
        common.resolve_grammar(load_policy("default"))
