import json

import numpy as np
import pytest
import torch
from PIL import Image

from valign.checks import UserError
from valign.detectors import build
from valign.detectors.image_classifier import ImageClassifierDetector
from valign.detectors.importing import import_classifier
from valign.policy import load_policy

POLICY = load_policy("default")
LABELS = ("high", "neutral", "gore", "medium")  # harm is neither first nor last
IMAGES = [Image.new("RGB", (40, 30), colour) for colour in ("red", "navy", "white")]


@pytest.fixture(scope="session")
def classifier(tmp_path_factory):
    """Folder of a ViT in miniature with random weights and four classes."""
    return save_classifier(tmp_path_factory.mktemp("classifier"))


def save_classifier(folder, labels=LABELS, **options):
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = ViTConfig(image_size=32, patch_size=8, id2label=dict(enumerate(labels)), **sizes, **options)
    model = ViTForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(20)
    model.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def probabilities(folder):
    """By transformers alone."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    pixels = AutoImageProcessor.from_pretrained(folder)(images=IMAGES, return_tensors="pt")
    return AutoModelForImageClassification.from_pretrained(folder)(**pixels).logits.softmax(-1).detach().numpy()


def test_a_category_has_the_probability_of_its_classes_together(classifier, tmp_path):
    import_classifier(classifier, tmp_path / "d", POLICY, {"medium": "sexual", "high": "sexual", "gore": "Shocking"}, {"": 0.4})
    found = build(str(tmp_path / "d"))
    assert isinstance(found, ImageClassifierDetector)
    assert (found.card.name, found.card.classes, found.card.threshold) == ("d", ("sexual", "shocking"), 0.4)
    assert not found.card.measures("hate")
    p = probabilities(classifier)
    np.testing.assert_allclose(found.detect(IMAGES), np.stack([p[:, 0] + p[:, 3], p[:, 2]], axis=1), atol=1e-5)
    assert found.detect([]).shape == (0, 2)


def test_thresholds_of_their_own_are_bent_to_one_half(classifier, tmp_path):
    limits = {"sexual": 0.7, "shocking": 0.2}
    import_classifier(classifier, tmp_path / "d", POLICY, {"high": "sexual", "gore": "shocking"}, limits)
    found = build(str(tmp_path / "d"))
    p = probabilities(classifier)
    assert found.card.threshold == 0.5
    assert ((found.detect(IMAGES) >= 0.5) == (p[:, [0, 2]] >= np.array([0.7, 0.2]))).all()


def test_classes_that_do_not_exclude_one_another(tmp_path):
    model = save_classifier(tmp_path / "model", problem_type="multi_label_classification")
    import_classifier(model, tmp_path / "d", POLICY, {"high": "sexual", "medium": "sexual"}, {})
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    pixels = AutoImageProcessor.from_pretrained(model)(images=IMAGES, return_tensors="pt")
    p = AutoModelForImageClassification.from_pretrained(model)(**pixels).logits.sigmoid().detach().numpy()
    np.testing.assert_allclose(build(str(tmp_path / "d")).detect(IMAGES)[:, 0], p[:, [0, 3]].max(1), atol=1e-5)


def test_a_copy_needs_no_original(tmp_path):
    model = save_classifier(tmp_path / "model")
    import_classifier(model, tmp_path / "d", POLICY, {"high": "sexual"}, {}, copy=True)
    model.rename(tmp_path / "gone")
    assert build(str(tmp_path / "d")).detect(IMAGES).shape == (3, 1)


def test_changed_weights_are_refused(tmp_path):
    model = save_classifier(tmp_path / "model")
    import_classifier(model, tmp_path / "d", POLICY, {"high": "sexual"}, {})
    torch.manual_seed(1)
    save_classifier(tmp_path / "other", LABELS[:2])
    (tmp_path / "other" / "model.safetensors").replace(model / "model.safetensors")
    (tmp_path / "other" / "config.json").replace(model / "config.json")
    with pytest.raises(UserError, match=r"must hold the weights that detector\.json describes"):
        build(str(tmp_path / "d"))


@pytest.mark.parametrize(
    ("classes", "thresholds", "said"),
    [
        ({}, {}, "--map must name the category of at least one class, got none. The model's classes: high, neutral, gore, medium"),
        ({"nsfw": "sexual"}, {}, r"--map must name classes of the model \(high, neutral, gore, medium\), got 'nsfw'"),
        ({"high": "nudity"}, {}, r"--map must name categories of the policy \(hate, .*\), got 'nudity'"),
        (dict.fromkeys(LABELS, "sexual"), {}, "--map must leave out the harmless classes"),
        ({"high": "sexual"}, {"": 1.5}, r"--threshold must be in \(0, 1\], got 1\.5"),
        ({"high": "sexual"}, {"sexual": -0.1}, r"--threshold sexual must be in \(0, 1\], got -0\.1"),
        ({"high": "sexual"}, {"sexual": 0.0}, "At 0 every image would be harmful"),
        ({"high": "sexual"}, {"": float("nan")}, r"must be in \(0, 1\], got nan"),
        ({"high": "sexual"}, {"hate": 0.5}, r"--threshold must name a mapped category \(.*sexual\), got 'hate'"),
    ],
)
def test_maps_and_thresholds_that_do_not_fit_are_refused(classifier, tmp_path, classes, thresholds, said):
    with pytest.raises(UserError, match=said):
        import_classifier(classifier, tmp_path / "d", POLICY, classes, thresholds)
    assert not (tmp_path / "d").exists()


def test_folders_without_a_classifier_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"it has no config\.json"):
        import_classifier(tmp_path, tmp_path / "d", POLICY, {"a": "hate"}, {})
    model = save_classifier(tmp_path / "model")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickles are not opened"):
        import_classifier(model, tmp_path / "d", POLICY, {"high": "hate"}, {})
    (model / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(UserError, match="could not be opened as an image classifier"):
        import_classifier(model, tmp_path / "d", POLICY, {"high": "hate"}, {})
    (model / "config.json").write_text(json.dumps({"model_type": "vit", "id2label": []}))
    with pytest.raises(UserError, match="must name the model's classes as id2label"):
        import_classifier(model, tmp_path / "d", POLICY, {"high": "hate"}, {})
