"""The report on who won."""

import pytest
import torch
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
