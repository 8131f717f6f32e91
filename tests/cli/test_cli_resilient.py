"""What the commands around resilient safety refuse, before any work."""

import pytest
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import adapter, audit, bench, train


def run(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_options_of_the_look_ahead_need_it(tmp_path):
    given = ("alignguard", "--model", "shapes", "--data", tmp_path, "--joint", "--out", tmp_path / "run")
    with pytest.raises(UserError, match="scenarios must go with --resilient"):
        run(train.app, *given, "--scenarios", "2")
    with pytest.raises(UserError, match=r"--look-ahead-share must be in \(0, 1\], got 2"):
        run(train.app, *given, "--resilient", "--look-ahead-share", "2")


def test_a_bench_names_what_it_knows(tmp_path):
    with pytest.raises(ValueError, match="--arm must be one of"):
        run(bench.app, "resilient", "-o", tmp_path, "--arm", "nobody")
    with pytest.raises(ValueError, match="--task must be one of"):
        run(bench.app, "resilient", "-o", tmp_path, "--task", "counterparts")


def test_an_audit_of_images_needs_images_and_a_detector(tiny_sd, tmp_path):
    with pytest.raises(UserError, match="--data must name benign images with captions, got nothing"):
        run(audit.app, "fragility", "--model", tiny_sd, "-o", tmp_path / "out")
    with pytest.raises(ValueError, match="--task must be one of benign-outline"):
        run(audit.app, "fragility", "--model", "shapes", "--task", "counterparts", "-o", tmp_path / "out")
    with pytest.raises(UserError, match="--judge has no effect on a diffusion model"):
        run(audit.app, "fragility", "--model", "shapes", "--judge", "phrases", "-o", tmp_path / "out")


def test_only_a_whole_model_takes_an_adapter_in(tmp_path):
    with pytest.raises(UserError, match="must be a folder of a chat model, a diffusers pipeline or an adapter"):
        run(adapter.app, "fuse", tmp_path / "nothing", tmp_path / "adapter", tmp_path / "out")
