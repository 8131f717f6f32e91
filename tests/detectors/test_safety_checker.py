import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor

from valign.checks import UserError
from valign.detectors.base import flagged
from valign.detectors.safety_checker import SafetyCheckerDetector, clip_pixels, safety_margins
from valign.models.encoders.clip import CLIP_MEAN, CLIP_STD


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline folder with a tiny random safety checker whose thresholds flag some noise images and not others."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(0)
    model = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, text_config={}, projection_dim=8)).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.concept_embeds.copy_(torch.randn(17, 8, generator=generator))
        model.special_care_embeds.copy_(torch.randn(3, 8, generator=generator))
        features = model.visual_projection(model.vision_model(clip_pixels(noise(), 16))[1])
        cosine = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(model.concept_embeds).T
        model.concept_embeds_weights.copy_(cosine.quantile(0.95, dim=0))
        special = torch.nn.functional.normalize(features) @ torch.nn.functional.normalize(model.special_care_embeds).T
        model.special_care_embeds_weights.copy_(special.quantile(0.8, dim=0))
    root = tmp_path_factory.mktemp("pipeline")
    model.save_pretrained(root / "safety_checker")
    return root


def noise():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(12)]


def test_same_verdicts_as_diffusers_and_the_images_stay(folder):
    detector = SafetyCheckerDetector(folder, batch_size=5)
    images = noise()
    before = [image.tobytes() for image in images]
    scores = detector.detect(images)
    _, theirs = detector.model(clip_input=clip_pixels(images, 16), images=[np.ones(1)] * 12)
    assert 0 < sum(theirs) < 12
    assert flagged(scores, detector.card).tolist() == theirs
    assert [image.tobytes() for image in images] == before
    assert scores.shape == (12, 17)
    assert detector.detect([]).shape == (0, 17)


def test_special_care_lowers_every_bar_by_a_hundredth():
    concept = np.array([[0.195, 0.18], [0.195, 0.18]])
    special = np.array([[0.2, 0.0], [0.31, 0.0]])  # only the second image is above its special threshold of 0.3
    margins = safety_margins(concept, np.array([0.2, 0.2]), special, np.array([0.3, 0.3]))
    np.testing.assert_allclose(margins, [[-0.005, -0.02], [0.005, -0.01]])


def test_a_margin_of_zero_is_not_flagged_and_a_thousandth_is(folder):
    card = SafetyCheckerDetector(folder).card
    scores = np.full((2, 17), 0.1)
    scores[:, 0] = 0.5 + np.array([0.0, 0.001])
    assert flagged(scores, card).tolist() == [False, True]
    assert (card.measures("sexual"), card.measures("violence")) == (True, False)


def test_wrong_folder_and_wrong_pin(folder, tmp_path):
    with pytest.raises(UserError, match=r"must be a safety checker's folder, it has no config\.json"):
        SafetyCheckerDetector(tmp_path)
    with pytest.raises(UserError, match="weights must have SHA-256 abc"):
        SafetyCheckerDetector(folder, sha256="abc")


def test_a_limit_that_is_no_number_is_refused(folder, tmp_path):
    model = SafetyCheckerDetector(folder).model
    with torch.no_grad():
        model.concept_embeds_weights[0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"concept_embeds_weights must be finite, got NaN"):
        SafetyCheckerDetector(tmp_path)


def test_shape_centre_and_scale():
    image = Image.new("RGB", (40, 20), "black")
    image.paste((255, 255, 255), (10, 0, 30, 20))  # the centre square is white
    values = clip_pixels([image], 20)
    assert values.shape == (1, 3, 20, 20)
    assert values.dtype == torch.float32
    np.testing.assert_allclose(values[0, :, 10, 10], (1 - np.array(CLIP_MEAN)) / CLIP_STD, rtol=1e-5)
    assert (values == values[:, :, :1, :1]).all()


def test_agrees_with_the_processor_of_transformers():
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    processor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    theirs = processor(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(clip_pixels([image], 24), theirs, atol=0.02)  # they round to 8 bits after resizing
