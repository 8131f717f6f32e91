"""CLIP features against transformers itself."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel

from clip_models import build_clip
from valign.checks import UserError
from valign.models.encoders.clip import CLIP_MEAN, CLIP_STD, ClipEncoder

PROMPTS = ["a photo of a red man", "the", "a painting"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A CLIP with random weights."""
    return build_clip(tmp_path_factory.mktemp("clip") / "clip")


@pytest.fixture(scope="module")
def clip(folder):
    return ClipEncoder(folder, device="cpu", batch_size=2)


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]


def unit(rows):
    return (rows / rows.norm(dim=1, keepdim=True)).detach().numpy()


def test_features_are_those_of_transformers(clip, images):
    pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 255 for image in images])
    pixels = (pixels - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    expected = unit(clip.model.get_image_features(pixels).pooler_output)
    np.testing.assert_allclose(clip.image_features(images), expected, atol=1e-5)
    tokens = clip.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    np.testing.assert_allclose(clip.text_features(PROMPTS), unit(clip.model.get_text_features(**tokens).pooler_output), atol=1e-5)
    assert clip.image_features(images).shape == (3, clip.dim)


def test_the_score_is_the_cosine_of_each_pair(clip, images):
    score = clip.score(images, PROMPTS)
    expected = (clip.image_features(images) @ clip.text_features(PROMPTS).T).diagonal()
    np.testing.assert_allclose(score, expected, atol=1e-6)
    assert (abs(score) <= 1).all()
    with pytest.raises(ValueError, match="one prompt per image, got 1 for 3 images"):
        clip.score(images, PROMPTS[:1])


def test_tensors_and_images_are_the_same(clip, images):
    tensor = torch.stack([torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1 for image in images])
    np.testing.assert_allclose(clip.image_features(tensor), clip.image_features(images), atol=1e-5)
    assert clip.prepare(torch.zeros(1, 3, 50, 77)).shape == clip.prepare([Image.new("RGB", (77, 50))]).shape == (1, 3, 32, 32)


def test_nothing_gives_no_rows(clip):
    assert clip.image_features([]).shape == clip.text_features([]).shape == (0, clip.dim)


def test_long_texts_are_cut(clip):
    assert np.array_equal(clip.text_features(["red " * 500]), clip.text_features(["red " * 600]))


def test_own_pixel_statistics_are_used(folder, images, clip, tmp_path):
    other = shutil.copytree(folder, tmp_path / "clip")
    (other / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    plain = ClipEncoder(other, device="cpu")
    assert plain.prepare(images).min() >= -1
    assert not np.allclose(plain.image_features(images), clip.image_features(images))
    assert plain.weights_sha256 == clip.weights_sha256
    assert len(plain.weights_sha256) == 64


def test_pixels_follow_the_model_to_another_device(folder, images):
    clip = ClipEncoder(folder, device="cpu")
    clip.prepare(images)
    clip.model.to("meta")  # a device without values
    assert clip.device.type == clip.prepare(images).device.type == "meta"


def test_refuses_what_is_not_clip(folder, tiny_sd, tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json, so it is not a CLIP folder"):
        ClipEncoder(tmp_path)
    with pytest.raises(UserError, match="must hold a CLIP model, got clip_text_model"):
        ClipEncoder(tiny_sd / "text_encoder")
    holed = CLIPModel.from_pretrained(folder)
    with torch.no_grad():
        holed.visual_projection.weight[0, 0] = float("nan")
    holed.save_pretrained(tmp_path / "holed")
    shutil.copytree(folder, tmp_path / "holed", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with pytest.raises(UserError, match=r"holed: visual_projection\.weight must be finite, got NaN"):
        ClipEncoder(tmp_path / "holed")
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(UserError, match="could not be loaded as a CLIP model"):
        ClipEncoder(broken)
    weights.rename(broken / "pytorch_model.bin")
    with pytest.raises(UserError, match="has no safetensors file; pickles are not opened"):
        ClipEncoder(broken)
