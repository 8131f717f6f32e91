import numpy as np

from valign.worlds.shapes.renderer import BACKGROUNDS, COLOURS, PLACES, Item, Scene, background, render, render_array


def test_same_seed_same_bytes_and_another_seed_other_bytes():
    scene = Scene((Item("star", "red", "left"), Item("key", "blue", "right")), "dusk", "shadow")
    assert render(scene, 3).tobytes() == render(scene, 3).tobytes()
    assert render(scene, 3).tobytes() != render(scene, 4).tobytes()


def test_ink_is_where_the_scene_says():
    for place, (x, y) in PLACES.items():
        scene = Scene((Item("square", "black", place),), "paper", "flat")
        ink = np.abs(render_array(scene, np.random.default_rng(0)) - background("paper")).sum(-1) > 60
        rows, columns = np.nonzero(ink)
        assert abs(rows.mean() - y) < 3.5
        assert abs(columns.mean() - x) < 3.5


def test_a_tilted_glyph_is_turned_and_stays_where_it_is():
    def ink(style):
        pixels = render_array(Scene((Item("arrow", "black", "centre"),), "paper", style), np.random.default_rng(0))
        return np.nonzero(np.abs(pixels - background("paper")).sum(-1) > 200)

    (rows, columns), (turned_rows, turned_columns) = ink("flat"), ink("tilted")
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.1  # the arrow lies flat
    assert np.corrcoef(turned_rows, turned_columns)[0, 1] < -0.5  # it rises to the right
    assert abs(turned_rows.mean() - rows.mean()) < 2


def test_the_middle_of_a_filled_glyph_has_its_colour():
    for colour, rgb in COLOURS.items():
        pixels = render_array(Scene((Item("circle", colour, "centre"),), "fog", "flat"), np.random.default_rng(1))
        np.testing.assert_allclose(pixels[32, 32], rgb, atol=1)


def test_rendering_leaves_the_shared_canvas_alone():
    before = {name: background(name).copy() for name in BACKGROUNDS}
    for name in BACKGROUNDS:
        render(Scene((Item("moon", "pink", "top"),), name, "shadow"), 0)
        np.testing.assert_array_equal(background(name), before[name])
