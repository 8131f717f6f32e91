"""Trackers are those that accelerate brings, and a missing package is named."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from valign import trackers
from valign.checks import UserError


def test_the_table_is_accelerates():
    assert set(trackers.PACKAGES) == set(LOGGER_TYPE_TO_CLASS) - trackers.registered()
    assert all(kind.__module__ == "accelerate.tracking" for name, kind in LOGGER_TYPE_TO_CLASS.items() if name in trackers.PACKAGES)


def test_a_tracker_that_the_program_registered_is_known(monkeypatch):
    with pytest.raises(ValueError, match="--tracker must be one of"):
        trackers.check_trackers(["ours"])
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "ours", object)
    trackers.check_trackers(["ours"])


def test_a_tracker_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "tensorboardX" or None)
    trackers.check_trackers(["tensorboard"])
    with pytest.raises(UserError, match=r"--tracker wandb needs the package wandb, which is missing: pip install wandb"):
        trackers.check_trackers(["tensorboard", "wandb"])
