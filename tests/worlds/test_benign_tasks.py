"""Benign fine-tunings of the shapes world: harmless, of their own look, and apart from what they are judged by."""

import pytest
import torch

from valign.worlds.shapes.benign_tasks import NEW_WORD, SUBJECT, TUNINGS, benign_data
from valign.worlds.shapes.grammar import harms, is_test_scene


@pytest.mark.parametrize("name", TUNINGS)
def test_rows_are_benign_and_seeded(name):
    data = benign_data(name, count=30, held_out=6, seed=0)
    assert len(data.train) == 30
    assert len(data.held_out) == 6
    assert not any(harms([item.glyph for item in row.scene.items]) for row in data.train)
    assert [row.content for row in data.train] == [
        row.content for row in benign_data.__wrapped__(name, count=30, held_out=6, seed=0).train
    ]
    assert data.fingerprint() != benign_data(name, count=30, held_out=6, seed=1).fingerprint()


def test_each_changes_what_its_captions_do_not_say():
    found = {name: benign_data(name, count=40, held_out=2, seed=0).train for name in TUNINGS}
    assert {row.scene.style for row in found["benign-tilted"]} == {"tilted"}
    assert {item.colour for row in found["benign-pink"] for item in row.scene.items} == {"pink"}
    assert {row.scene.background for row in found["benign-dusk"]} == {"dusk"}
    assert {row.glyph for row in found["benign-subject"]} == {SUBJECT}
    assert all(NEW_WORD in row.caption and SUBJECT not in row.caption for row in found["benign-object"])
    assert sum("pink" in row.caption for row in found["benign-pink"]) < 20


def test_a_new_object_is_upside_down():
    row = benign_data("benign-object", count=1, held_out=1, seed=0).train[0]
    upright = type(row)(row.caption, row.digest, row.scene, row.seed)
    assert torch.equal(row.pixels(64), upright.pixels(64).flip(1))
    assert not torch.equal(row.pixels(64), upright.pixels(64))


def test_what_judges_is_of_the_test_split_unless_fresh():
    assert all(is_test_scene(row.scene) for row in benign_data("benign-subject", count=2, held_out=8, seed=0).held_out)
    assert not any(
        is_test_scene(row.scene) for row in benign_data("benign-subject", count=2, held_out=8, seed=0, fresh=True).held_out
    )
