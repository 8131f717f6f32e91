import numpy as np
import torch

from valign.detectors.oracle import OracleDetector
from valign.worlds.shapes import oracle_folder
from valign.worlds.shapes.counterpart_tasks import EXPERT, SHOWN, counterpart_data, expert_data
from valign.worlds.shapes.grammar import is_test_scene
from valign.worlds.shapes.renderer import render
from valign.worlds.shapes.vocabulary import BENIGN, GROUP_OF, GROUPS


def test_captions_name_what_is_not_to_be_drawn_and_images_show_the_counterpart():
    oracle = OracleDetector(oracle_folder(), domain=())
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


def test_a_row_is_its_image_in_minus_one_to_one():
    row = counterpart_data("counterparts", count=1, held_out=1, seed=0).train[0]
    pixels = row.pixels(64)
    expected = torch.from_numpy(np.asarray(render(row.scene, row.seed)).astype("float32")).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(pixels, expected)
    assert len({other.content for other in counterpart_data("counterparts", count=40, held_out=1, seed=0).train}) == 40


def test_pairs_for_an_expert_differ_in_one_glyph_and_their_benign_images_show_no_harm():
    data = expert_data("expert", count=16, held_out=16, seed=0)
    oracle = OracleDetector(oracle_folder(), domain=())
    for rows in (data.train, data.held_out):
        for row in rows:
            assert GROUP_OF[row.loser.glyph].category == EXPERT
            assert row.winner.glyph == GROUP_OF[row.loser.glyph].safe
            assert row.winner.caption == row.loser.caption == row.caption
            assert row.winner.seed == row.loser.seed
            (safe,), (harm,) = row.winner.scene.items, row.loser.scene.items
            assert (safe.colour, safe.place) == (harm.colour, harm.place)
            assert row.benign.glyph in BENIGN
            assert row.benign.glyph in row.benign.caption
        for part in ("winner", "loser", "benign"):
            shown = [getattr(row, part) for row in rows]
            right = oracle.matches([render(row.scene, row.seed) for row in shown], [{"glyph": row.glyph} for row in shown])
            assert right["glyph"].mean() > 0.9
    assert len({row.content for row in (*data.train, *data.held_out)}) == 32


def test_an_expert_is_judged_on_words_and_scenes_that_it_never_learnt():
    first, second = (expert_data("expert", count=40, held_out=16, seed=seed) for seed in (0, 1))
    assert first.held_out == second.held_out
    assert first.train != second.train
    assert all(is_test_scene(row.loser.scene) for row in first.held_out)
    assert not any(is_test_scene(row.loser.scene) or is_test_scene(row.benign.scene) for row in first.train)
    words = [word for group in GROUPS if group.category == EXPERT for word in group.words]
    for word in words:
        for phrases in (word.paraphrases, word.hints):
            assert not any(phrase in row.caption for phrase in phrases[1:] for row in first.train)
            assert not any(phrases[0] in row.caption for row in first.held_out)
    fresh = expert_data("expert", count=40, held_out=16, seed=0, fresh=True)
    assert fresh.train == first.train
    assert not any(is_test_scene(row.loser.scene) for row in fresh.held_out)
