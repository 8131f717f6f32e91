"""CLIP as a classifier, on the miniature one: its answers are CLIP's own similarities."""

import numpy as np
import pytest
import torch
from PIL import Image

from valign.data.tasks.images import LabelledImage
from valign.models.encoders.clip import ClipEncoder
from valign.models.heads.clip_task import ClipTaskModel
from valign.models.heads.task_model import Target
from valign.worlds.shapes import clip_folder

LABELS = ("star", "umbrella", "key")


@pytest.fixture
def model():
    return ClipTaskModel(ClipEncoder(clip_folder(), device="cpu"), Target("classification", labels=LABELS), template="a red {}")


def rows(count=4):
    pixels = np.random.default_rng(0).integers(0, 256, (count, 64, 64, 3), dtype=np.uint8)
    return [LabelledImage(image, LABELS[index % 3]) for index, image in enumerate(pixels)]


def test_logits_are_scaled_cosines_whatever_the_padding(model):
    clip, images = ClipEncoder(clip_folder(), device="cpu"), [Image.fromarray(row.pixels) for row in rows()]
    cosines = clip.image_features(images) @ clip.text_features([f"a red {label}" for label in LABELS]).T
    expected = float(clip.model.logit_scale.exp()) * torch.from_numpy(cosines)
    torch.testing.assert_close(model(model.batch(rows())), expected, rtol=1e-4, atol=1e-4)
    assert model.head is None
    assert model.fingerprint == clip.weights_sha256


def test_other_classes_need_no_other_model(model):
    before = model(model.batch(rows()))
    model.target = Target("classification", labels=LABELS[::-1])
    torch.testing.assert_close(model(model.batch(rows())), before.flip(1))


def test_both_encoders_learn_but_not_the_scale(model):
    model.network.requires_grad_(True)
    batch = model.batch(rows())
    model.loss(batch).backward()
    network = model.network
    assert network.vision_model.encoder.layers[0].mlp.fc1.weight.grad.any()
    assert network.text_model.encoder.layers[0].mlp.fc1.weight.grad.any()
    assert network.logit_scale.grad is None
    assert (batch.weight, batch.target.tolist()) == (4, [0, 1, 2, 0])
