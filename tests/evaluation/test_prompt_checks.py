"""Yes/no checks of images and of animations, on rendered frames."""

import json

import numpy as np
import pytest

from valign.checks import UserError
from valign.cli.common import find_world
from valign.evaluation.images.prompt_checks import frame_checks, image_checks
from valign.images import count_frames
from valign.objectives.preference.vpo import DominancePairs
from valign.worlds.shapes.renderer import Item, Scene, render

ORACLE = find_world("shapes").oracle()
ASKED = {"glyph": "cup", "colour": "red", "place": "left", "background": "fog"}


class Painter:
    """Paints a prompt as the scenes that stand for it: one per frame, separated by ``;``, each "glyph colour place background"."""

    def animate(self, prompts, *, frames, seeds=None, sampling=None):
        return [self.clip(prompt) for prompt in prompts]

    def generate(self, prompts, *, seeds=None, sampling=None, **options):
        return [self.clip(prompt)[0] for prompt in prompts]

    def fingerprint(self):
        return "painter"

    @staticmethod
    def clip(prompt):
        scenes = [scene.split() for scene in prompt.split(";")]
        made = [Scene((Item(*words[:3]),), words[3], "flat") for words in scenes]
        return [render(scene, seed=number) for number, scene in enumerate(made)]  # the seed moves and scales the glyph a little


class Stills:
    """A model that makes no animations."""

    generate, fingerprint = Painter.generate, Painter.fingerprint


class Films:
    """A model that makes nothing else."""

    animate, fingerprint = Painter.animate, Painter.fingerprint


def checks(**options):
    made = {"reader": ORACLE, "expected": {"a cup": ASKED}, "frames": 3} | options
    return image_checks(Painter(), ORACLE, **made)


CUP, PLACE = "cup red left fog", "cup red right fog"
CLIPS = {
    "holds": f"{CUP};{CUP};{CUP}",
    "moves away": f"{CUP};{CUP};{PLACE}",
    "other all along": f"{PLACE};{PLACE};{PLACE}",
    "turns to harm": f"{CUP};flame red left fog;{CUP}",
    "changes colour": f"{CUP};cup blue left fog;{CUP}",
    "changes background": f"{CUP};{CUP};cup red left dusk",
}


def test_a_check_holds_if_it_holds_in_every_frame():
    passed = checks()("a cup", list(CLIPS.values()))
    # harmless, then the reader's aspects by name: background, colour, glyph, place, style; then steady
    assert dict(zip(CLIPS, passed.astype(int).tolist())) == {
        "holds": [1, 1, 1, 1, 1, 1, 1],
        "moves away": [1, 1, 1, 1, 0, 1, 0],
        "other all along": [1, 1, 1, 1, 0, 1, 1],
        "turns to harm": [0, 1, 0, 0, 0, 1, 0],  # a colour and a place count only where the thing itself is
        "changes colour": [1, 1, 0, 1, 1, 1, 0],
        "changes background": [1, 0, 1, 1, 1, 1, 0],
    }
    assert DominancePairs()(passed) == (0, 1)  # the one that holds wins over the one that moves away


def test_without_an_expectation_harm_and_steadiness_are_left():
    passed = checks(reader=None)("another", [CLIPS["holds"], CLIPS["moves away"], CLIPS["turns to harm"]])
    assert passed.tolist() == [[True, True], [True, False], [False, False]]
    assert checks(frames=1)("another", [CUP, "flame red left fog"]).tolist() == [[True], [False]]
    assert checks(frames=1)("a cup", [CUP, PLACE]).shape == (2, 6)  # of one image nothing is steady


def test_closed_forms_of_frames():
    ones, mixed = np.ones((1, 3), bool), np.array([[True, False, True]])
    found = frame_checks(ones, {"place": mixed, "colour": ones}, [["a", "a", "b"]])
    assert {name: row.tolist() for name, row in found.items()} == {
        "harmless": [True],
        "colour": [True],
        "place": [False],
        "steady": [False],
    }
    assert list(found) == ["harmless", "colour", "place", "steady"]
    assert frame_checks(ones, {}, [["a", "a", "a"]])["steady"].all()
    assert list(frame_checks(ones, {})) == ["harmless"]


def test_animations_are_kept_to_look_at(tmp_path):
    judge = checks(previews=tmp_path)
    judge("a cup", [CLIPS["holds"], CLIPS["moves away"]])
    judge("a cup", [CLIPS["moves away"], CLIPS["holds"]])  # known: the first stays
    judge("another", [CLIPS["holds"]])
    rows = [json.loads(line) for line in (tmp_path / "previews.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a cup", "another"]
    assert rows[0]["prompts"] == [CLIPS["holds"], CLIPS["moves away"]]
    assert rows[0]["passed"]["steady"] == [True, False]
    assert count_frames(tmp_path / rows[0]["file"]) == 4  # there and back: 1 2 3 2


def test_bad_input():
    with pytest.raises(ValueError, match=r"image_checks\.frames must be in \[1, inf\), got 0"):
        checks(frames=0)
    with pytest.raises(UserError, match="frames must be 1 for a model that makes no animations, got 2 for Stills"):
        image_checks(Stills(), ORACLE, frames=2)
    with pytest.raises(UserError, match="frames must be 2 or more for a model that makes animations only, got 1 for Films"):
        image_checks(Films(), ORACLE)
    with pytest.raises(UserError, match=r"An animation must have 3 frames, got \[2\]"):
        checks()("a cup", [f"{CUP};{CUP}"])
