import numpy as np
import pytest
import torch
from PIL import Image

from valign.checks import UserError
from valign.detectors.base import flagged
from valign.detectors.clip_probe import ClipProbeDetector, fit_probe, probe_logit, save_probe


class ColourEncoder:
    """Mean colour as the feature."""

    def __init__(self, name="colours"):
        self.weights_sha256 = name

    def image_features(self, images):
        return np.stack([np.asarray(image, dtype=np.float32).mean((0, 1)) for image in images])


def colours(*names):
    return [Image.new("RGB", (2, 2), name) for name in names]


def test_the_sigmoid_of_the_logit_is_the_softmax_of_a_hundred_cosines():
    generator = torch.Generator().manual_seed(0)
    features, vectors = torch.randn(4, 6, generator=generator), torch.randn(3, 2, 6, generator=generator)
    cosine = torch.nn.functional.cosine_similarity(features[:, None, None], vectors[None], dim=-1)
    torch.testing.assert_close(probe_logit(features, vectors).sigmoid(), (100 * cosine).softmax(-1)[..., 1])
    torch.testing.assert_close(probe_logit(7 * features, vectors), probe_logit(features, vectors), atol=1e-4, rtol=1e-5)


def test_by_hand():  # features (1, 0); harmless at 90 degrees, harmful at 60: logit = 100 * (0.5 - 0)
    vectors = torch.tensor([[[0.0, 1.0], [0.5, 0.75**0.5]]])
    torch.testing.assert_close(probe_logit(torch.tensor([[1.0, 0.0]]), vectors), torch.tensor([[50.0]]))


def test_a_probe_with_one_nan_is_refused(tmp_path):
    save_probe(tmp_path / "probe.safetensors", torch.tensor([[[0.0, float("nan")], [1.0, 0.0]]]), ["harm"], "colours")
    with pytest.raises(UserError, match=r"probe\.safetensors: vectors must be finite, got NaN"):
        ClipProbeDetector(tmp_path, encoder=ColourEncoder())


def test_fitted_probe_separates_and_is_the_same_on_every_run(tmp_path):
    images = colours("red", "tomato", "maroon", "blue", "navy", "green", "lime", "teal")
    labels = torch.tensor([[i < 3, 5 <= i <= 6] for i in range(8)])
    encoder = ColourEncoder()
    vectors = fit_probe(torch.from_numpy(encoder.image_features(images)), labels)
    assert torch.equal(vectors, fit_probe(torch.from_numpy(encoder.image_features(images)), labels))
    save_probe(tmp_path / "probe.safetensors", vectors, ("reddish", "greenish"), encoder.weights_sha256)
    probe = ClipProbeDetector(tmp_path, encoder=encoder)
    assert probe.card.classes == ("reddish", "greenish")
    assert probe.card.coverage == {"reddish": ("reddish",), "greenish": ("greenish",)}
    save_probe(tmp_path / "probe.safetensors", vectors, ("reddish", "greenish"), encoder.weights_sha256, covers={"reddish": "all"})
    assert ClipProbeDetector(tmp_path, encoder=encoder).card.coverage == {"reddish": ("all",), "greenish": ()}
    assert ((probe.detect(images) >= 0.5) == labels.numpy()).all()
    assert flagged(probe.detect(images), probe.card).tolist() == labels.any(1).tolist()


def test_another_encoder_a_moved_pin_and_rubbish_are_refused(tmp_path):
    path = tmp_path / "probe.safetensors"
    save_probe(path, torch.ones(1, 2, 3), ["any"], "colours")
    with pytest.raises(UserError, match="was tuned on encoder colours, got encoder other"):
        ClipProbeDetector(tmp_path, encoder=ColourEncoder("other"))
    with pytest.raises(UserError, match="clip-probe weights must have SHA-256 feed"):
        ClipProbeDetector(tmp_path, encoder=ColourEncoder(), sha256="feed")
    path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="must be a probe file"):
        ClipProbeDetector(tmp_path, encoder=ColourEncoder())


def test_a_class_without_both_sorts_is_refused():
    with pytest.raises(ValueError, match=r"fit_probe\.labels must hold both sorts for every class, got \[0\] of 2"):
        fit_probe(torch.eye(2), torch.zeros(2, 1, dtype=torch.bool))


def test_opens_the_clip_model_in_its_own_folder(monkeypatch, tmp_path):
    from valign.models.encoders import clip as encoders

    monkeypatch.setattr(encoders, "ClipEncoder", lambda folder, **options: ColourEncoder(folder.name))
    save_probe(tmp_path / "probe.safetensors", torch.ones(1, 2, 3), ["any"], tmp_path.name)
    assert ClipProbeDetector(tmp_path).card.name == "clip-probe"
