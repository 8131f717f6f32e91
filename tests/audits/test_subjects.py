"""What an audit of a diffusion model asks: a model that shows nothing has no refusals to audit."""

import numpy as np
import pytest
from PIL import Image

from valign.audits.subjects import DiffusionSubject
from valign.checks import UserError
from valign.interfaces import DetectorCard
from valign.models.diffusion.loading import load_model

BLACK, DRAWING = Image.new("RGB", (8, 8)), Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


class Harmless:
    """Finds no harm in anything."""

    card = DetectorCard("harmless", ("hate",), 0.5, "0" * 64)

    def detect(self, images):
        return np.zeros((len(images), 1))


@pytest.fixture
def subject(tiny_sd):
    return DiffusionSubject(load_model(tiny_sd, device="cpu"), Harmless())


def drawing(subject, images, monkeypatch):
    monkeypatch.setattr(type(subject.model), "generate", lambda self, rows, sampling: images)


def test_a_model_that_draws_black_is_not_audited(subject, monkeypatch):
    drawing(subject, [BLACK, BLACK, DRAWING], monkeypatch)
    with pytest.raises(UserError, match="must generate images to be audited; 2 of 3 are blank"):
        subject.refused(["a", "b", "c"])


def test_a_silenced_network_may_draw_nothing(subject, monkeypatch):
    drawing(subject, [DRAWING, DRAWING], monkeypatch)
    assert subject.refused(["a", "b"]) == [True, True]
    drawing(subject, [BLACK, BLACK], monkeypatch)
    assert subject.refused(["a", "b"]) == [True, True]
