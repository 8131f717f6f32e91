"""Few-shot tasks: balanced, seeded, and judged on images that no seed trains on."""

from collections import Counter

from valign.worlds.shapes.glyph_tasks import KEPT, LEARNT, captioned, glyph_data
from valign.worlds.shapes.vocabulary import GLYPHS


def images(rows):
    return {row.content for row in rows}


def test_every_class_has_its_shots_and_rows_take_turns():
    data = glyph_data("g", shots=2, held_out=30, seed=0)
    assert [row.target for row in data.train] == [*LEARNT] * 2
    assert Counter(row.target for row in data.held_out) == dict.fromkeys(LEARNT, 30 // len(LEARNT))
    assert data.train[0].pixels.shape == (64, 64, 3)
    assert data.labels == tuple(sorted(LEARNT))


def test_a_seed_draws_the_shots_and_nothing_else():
    first, again, other = (glyph_data("g", shots=2, held_out=12, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint() == again.fingerprint()
    assert not images(first.train) & images(other.train)
    assert images(first.held_out) == images(other.held_out)
    assert not images(first.train) & images(first.held_out)


def test_fresh_images_are_neither_trained_on_nor_judged_by_elsewhere():
    usual, fresh = (glyph_data("g", shots=2, held_out=12, seed=0, fresh=fresh) for fresh in (False, True))
    assert images(fresh.train) == images(usual.train)
    assert Counter(row.target for row in fresh.held_out) == dict.fromkeys(LEARNT, 2)
    assert not images(fresh.held_out) & (images(usual.held_out) | images(usual.train))


def test_captions_name_what_is_shown_and_no_learnt_glyph():
    known = captioned(30)
    assert len(set(known.captions)) == len(known.rows) == 30
    assert not set(KEPT) & set(LEARNT)
    assert set(KEPT) | set(LEARNT) <= set(GLYPHS)
    for row, text in zip(known.rows, known.captions, strict=True):
        words = text.replace(",", "").split()
        assert row.target in words
        assert not set(words) & set(LEARNT)
