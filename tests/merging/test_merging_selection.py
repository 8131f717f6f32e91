"""The report on who won."""

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from valign.checks import UserError
from valign.files import read_json
from valign.merging import Ballot, Votes, save_selection, selection_report


def ballot(counts, void=0):
    counts = torch.tensor(counts)
    return Ballot(counts, counts.float(), torch.full((counts.shape[1],), void))


VOTES = Votes(
    ("hate", "violence"),
    10,
    {"output": {"up_blocks.10.to_q": ballot([[8, 1, 5, 9], [2, 9, 5, 1]]), "down_blocks.0.to_q": ballot([[4, 9], [0, 1]], void=3)}},
)


def test_shares_ties_and_margins():
    report = selection_report(VOTES)
    assert list(report.modules) == ["down_blocks.0.to_q", "up_blocks.10.to_q"]  # the network's order
    up = report.modules["up_blocks.10.to_q"]
    assert up.shares == (0.75, 0.25)  # the tie goes to the first
    assert (up.units, up.tied, up.void) == (4, 1, 0)
    assert up.margin == pytest.approx((6 + 8 + 0 + 8) / 4 / 10)
    assert report.modules["down_blocks.0.to_q"].void == 6
    assert report.shares == pytest.approx((5 / 6, 1 / 6))


def test_written_as_json_and_as_a_image(tmp_path):
    report = selection_report(VOTES)
    save_selection(report, tmp_path)
    assert read_json(tmp_path / "selection.json")["modules"]["up_blocks.10.to_q"]["shares"] == [0.75, 0.25]
    with Image.open(tmp_path / "selection.png") as image:
        assert image.width > 300
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50
    before = (tmp_path / "selection.png").read_bytes()
    save_selection(report, tmp_path)
    assert (tmp_path / "selection.png").read_bytes() == before


def test_units_without_votes_are_refused():
    with pytest.raises(UserError, match="must be one of output, got 'down'"):
        selection_report(VOTES, "down")


def test_the_units_that_have_votes_are_listed():
    votes = Votes(("a",), 1, {"output": {"m": ballot([[1]])}, "down": {"m": ballot([[1]])}})
    with pytest.raises(UserError, match=r".") as caught:
        selection_report(votes, "rank_unit")
    assert str(caught.value) == (
        "selection_report.unit must be one of output, down, got 'rank_unit'. Ranks must be equal for others."
    )


def test_the_image_says_what_it_shows(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: drawn.append(self) or save(self, *args, **options))
    save_selection(selection_report(VOTES), tmp_path)
    axes = drawn[0].axes[0]
    assert axes.get_title() == "Share of neurons by expert"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["hate 83%", "violence 17%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["down0.to_q", "up10.to_q"]
    assert axes.images[0].get_array().tolist() == [[1.0, 0.0], [0.75, 0.25]]
    assert axes.images[0].get_clim() == (0, 1)
    with Image.open(tmp_path / "selection.png") as image:
        assert image.size == (675, 282)  # 4.5 by 1.88 inches at 150 dots


def test_modules_come_in_the_order_of_the_network():
    names = ["up_blocks.2.a", "mid_block.a", "down_blocks.10.a", "down_blocks.9.a", "text.a", "up_blocks.10.a"]
    report = selection_report(Votes(("a", "b"), 1, {"output": {name: ballot([[1], [0]]) for name in names}}))
    assert list(report.modules) == [
        "text.a",
        "down_blocks.9.a",
        "down_blocks.10.a",
        "mid_block.a",
        "up_blocks.2.a",
        "up_blocks.10.a",
    ]
    assert {module.margin for module in report.modules.values()} == {1.0}  # one prompt, one vote


def test_the_image_names_no_software(tmp_path):
    save_selection(selection_report(VOTES), tmp_path)
    with Image.open(tmp_path / "selection.png") as image:
        assert "Software" not in image.info
