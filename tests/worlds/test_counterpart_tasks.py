import numpy as np
import torch

from valign.detectors.oracle import OracleDetector
from valign.worlds.shapes import oracle_folder
from valign.worlds.shapes.counterpart_tasks import SHOWN, counterpart_data
from valign.worlds.shapes.grammar import is_test_scene
from valign.worlds.shapes.renderer import render
from valign.worlds.shapes.vocabulary import BENIGN, GROUP_OF, GROUPS


def test_captions_name_what_is_not_to_be_drawn_and_pictures_show_the_counterpart():
    oracle = OracleDetector(oracle_folder())
    data = counterpart_data("counterparts", count=28, held_out=28, seed=0)
    for rows in (data.train, data.held_out):
        for row, (glyph, safe) in zip(rows, SHOWN * 2):
            assert glyph in row.caption
            assert row.glyph == safe != glyph
            assert safe in BENIGN
        right = oracle.matches([render(row.scene, row.seed) for row in rows], [{"glyph": row.glyph} for row in rows])
        assert right["glyph"].all()


def test_no_held_out_concept_is_shown_and_every_group_is():
    glyphs = [glyph for glyph, _ in SHOWN]
    assert not {word.name for group in GROUPS for word in group.words if word.held_out} & set(glyphs)
    assert {GROUP_OF[glyph].category for glyph in glyphs} == {group.category for group in GROUPS}


def test_rows_to_judge_by_are_of_the_test_split_and_the_same_for_all_seeds():
    first, second = (counterpart_data("counterparts", count=20, held_out=20, seed=seed) for seed in (0, 1))
    assert first.held_out == second.held_out
    assert first.train != second.train
    asked = [[(glyph, row) for row, (glyph, _) in zip(rows, SHOWN * 2)] for rows in (first.train, first.held_out)]
    for rows, test in zip(asked, (False, True)):
        for glyph, row in rows:
            (item,) = row.scene.items
            named = type(row.scene)((type(item)(glyph, item.colour, item.place),), row.scene.background, row.scene.style)
            assert is_test_scene(named) == test
    fresh = counterpart_data("counterparts", count=20, held_out=20, seed=0, fresh=True)
    assert fresh.train == first.train
    assert fresh.held_out != first.held_out


def test_a_row_is_its_picture_in_minus_one_to_one():
    row = counterpart_data("counterparts", count=1, held_out=1, seed=0).train[0]
    pixels = row.pixels(64)
    expected = torch.from_numpy(np.asarray(render(row.scene, row.seed)).astype("float32")).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels, expected)
    assert len({other.content for other in counterpart_data("counterparts", count=40, held_out=1, seed=0).train}) == 40
