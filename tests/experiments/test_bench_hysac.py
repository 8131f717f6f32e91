"""Recall and redirection by hand, and the whole comparison on coloured squares."""

import pytest
import torch

from valign.experiments.hysac import TASKS, cosine_ranks, page, recalls
from valign.models.hyperbolic.traversal import GROUPS


def test_recall_counts_the_own_counterpart_and_safe_any_of_them():
    """Two rows. Unsafe captions point at the first safe image, and at an unsafe one."""
    one, two, three = torch.eye(3)
    groups = {
        "safe_text": torch.stack([one, two]),
        "safe_image": torch.stack([one, two]),
        "unsafe_text": torch.stack([one, three]),
        "unsafe_image": torch.stack([three, three]),
    }
    found = recalls(groups, cosine_ranks)
    assert found["safe T -> I"] == {"recall": 1.0, "safe": 1.0}
    assert found["unsafe T -> safe I"] == {"recall": 0.5, "safe": 0.5}
    assert found["unsafe I -> safe T"] == {"recall": 0.0, "safe": 0.0}


def test_the_page_names_every_system_and_says_how_often_the_order_holds():
    share = {"value": 0.5, "low": 0.25, "high": 1.2}
    tasks = {task: {"recall": share, "safe": {"value": 0.75}} for task in TASKS}
    summary = {
        "seeds": 2,
        "test": 6,
        "systems": {"plain CLIP": tasks, "Safe-CLIP": tasks},
        "errors": {"prompts": {"sensitivity": share, "specificity": share}},
        "distances": {name: {"value": 0.3} for name in GROUPS},
        "order": [list(GROUPS), list(reversed(GROUPS))],
    }
    shown = page(summary)
    assert "| Safe-CLIP | 50.0 (25–100) |" in shown
    assert "| 75.0 | 75.0 |" in shown
    assert "In this order in 1 of 2 seeds." in shown


@pytest.mark.parametrize("name", ["hysac"])
def test_the_command_is_listed(name):
    from typer.testing import CliRunner

    from valign.cli.root import build

    assert name in CliRunner().invoke(build(), ["bench", "--help"]).stdout
