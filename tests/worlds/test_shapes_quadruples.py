"""The world's quadruples: one scene, told and rendered with a stand-in for harm and with its counterpart."""

import numpy as np

from valign.worlds.shapes.quadruples import quadruples
from valign.worlds.shapes.vocabulary import GROUPS

HELD_OUT = {word.name for group in GROUPS for word in group.words if word.held_out}


def test_every_category_has_its_share_and_no_caption_stands_twice():
    found = quadruples(per_category=6, seed=3)
    assert [row.category for row in found.rows] == [group.category for group in GROUPS for _ in range(6)]
    assert len({row.unsafe for row in found.rows}) == len(found.rows)


def test_the_safe_side_names_the_groups_counterpart_and_the_images_differ_in_part():
    for row in quadruples(per_category=4, seed=1).rows:
        group = next(group for group in GROUPS if group.category == row.category)
        assert group.safe in row.safe
        assert not any(word in f"{row.safe} {row.unsafe}".split() for word in HELD_OUT)
        safe, unsafe = (np.asarray(row.image(side), dtype=int) for side in ("safe", "unsafe"))
        changed = (np.abs(safe - unsafe).max(axis=2) > 8).mean()
        assert 0 < changed < 0.5


def test_the_same_seed_gives_the_same_rows_and_test_rows_are_others():
    first, again, other = (quadruples(per_category=3, seed=seed) for seed in (0, 0, 1))
    assert first.fingerprint == again.fingerprint != other.fingerprint
    tested = quadruples(per_category=3, seed=0, test=True)
    assert not {row.unsafe for row in tested.rows} & {row.unsafe for row in quadruples(per_category=12, seed=0).rows}
