"""Fixtures of the command line's tests."""

import pytest


@pytest.fixture
def hub(tmp_path_factory, monkeypatch):
    """A hub that has every model."""
    index = tmp_path_factory.mktemp("hub") / "model_index.json"
    index.write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr("valign.cli.quick.fetched", lambda name, file: index)
