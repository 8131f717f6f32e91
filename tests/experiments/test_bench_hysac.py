"""Recall and redirection by hand, and the whole comparison on coloured squares."""

from types import SimpleNamespace

import pytest
import torch

from clip_models import build_clip, coloured_quadruples
from valign.experiments.hysac import TASKS, bench_hysac, cosine_ranks, page, recalls
from valign.models.encoders.clip import ClipEncoder
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


def test_the_comparison_trains_measures_and_reads_finished_seeds(tmp_path, monkeypatch):
    clip = build_clip(tmp_path / "clip")
    world = SimpleNamespace(
        origins=("world:squares",),
        clip=lambda: ClipEncoder(clip, device="cpu"),
        quadruples=lambda *, per_category, seed, test=False: coloured_quadruples(per_category, start=1000 * test + seed),
    )
    changes = {"steps": 40, "batch_size": 8, "learning_rate": 2e-2, "validate_every": 20, "rank": 4, "alpha": 4.0}
    summary = bench_hysac(world, tmp_path / "runs", seeds=2, per_category=12, changes=changes)
    assert summary["test"] == 6
    assert set(summary["systems"]) >= {"plain CLIP", "Safe-CLIP", "HySAC, no traversal", "HySAC, the group's bound"}
    assert all(set(tasks) == set(TASKS) for tasks in summary["systems"].values())
    assert sorted(summary["order"][0]) == sorted(GROUPS)
    assert summary["errors"]["prompts"]["positives"] == 12
    shown = page(summary)
    assert "| Safe-CLIP |" in shown
    assert "6 test quadruples a seed, 2 seeds" in shown
    monkeypatch.setattr("valign.experiments.hysac.train_hysac", None)  # finished seeds are not trained again
    assert bench_hysac(world, tmp_path / "runs", seeds=2, per_category=12, changes=changes) == summary
    alone = bench_hysac(world, tmp_path / "runs", seeds=1, per_category=12, changes=changes)
    assert "low" not in alone["systems"]["plain CLIP"]["safe T -> I"]["recall"]


@pytest.mark.parametrize("name", ["hysac"])
def test_the_command_is_listed(name):
    from typer.testing import CliRunner

    from valign.cli.root import build

    assert name in CliRunner().invoke(build(), ["bench", "--help"]).stdout
