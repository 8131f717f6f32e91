"""Adapting detectors: what is written, what stays as it was, and what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from clip_models import SAFE, UNSAFE, build_clip, square
from valign.checks import UserError
from valign.data.images.conditions import CONDITIONS, ImagePair, pairs_of, read_pairs, under
from valign.data.images.labelled import HarmExample, gather
from valign.detectors import NudeNetDetector, OracleDetector, build
from valign.detectors.adaptable import ProbeTower, tower_of
from valign.detectors.clip_probe import ClipProbeDetector
from valign.detectors.fitting import FitOptions, fit_detector
from valign.detectors.oracle import OracleConfig, OracleNet, save_oracle
from valign.models.encoders.clip import ClipEncoder
from valign.recipes.condition_robust import adapt_detector
from valign.training.engine.loop import TrainingLoop
from valign.training.tasks.condition_robust import AdaptConfig, ConditionRobustTask, adapt_tower

QUICK = AdaptConfig(steps=6, batch_size=4, width=8, queue=128, checkpoint_every=2)


def squares(count, start=0):
    colours = [("violence", UNSAFE["violence"][1]), ("hate", UNSAFE["hate"][1]), ("", SAFE[1]), ("", (40, 200, 40))]
    found = []
    for number in range(start, start + count):
        for category, colour in colours:
            found.append(
                HarmExample(f"{category or 'harmless'}/{colour}-{number}", (category,) if category else (), square(colour, number))
            )
    return found


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    clip = build_clip(tmp_path_factory.mktemp("models") / "clip")
    folder = tmp_path_factory.mktemp("detectors") / "probe"
    fit_detector(gather(squares(8), "squares"), ClipEncoder(clip, device="cpu"), folder, place=clip, options=FitOptions(steps=200))
    return folder


@pytest.fixture
def oracle(tmp_path):
    config = OracleConfig(
        image_size=32,
        glyphs=("bolt", "star"),
        colours=("red", "blue"),
        places={"left": (16, 16)},
        backgrounds=("paper",),
        styles=("flat",),
        categories={"bolt": "hate"},
        width=16,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = OracleNet(config).eval()
    save_oracle(tmp_path / "oracle", net, config)
    return OracleDetector(tmp_path / "oracle")


def clean(count=6):
    return pairs_of([(one.name, one.source) for one in squares(count, start=50)])


def test_the_adapted_probe_is_a_detector_with_errors_before_and_after(probe, tmp_path):
    test = gather(squares(6, start=20), "others")
    found = adapt_detector(
        build(str(probe)), clean(), test, tmp_path / "robust", runs=tmp_path / "run", conditions=["night"], config=QUICK
    )
    assert list(found) == ["clean", "night"]
    adapted, before = build(str(tmp_path / "robust")), build(str(probe))
    assert adapted.card.classes == before.card.classes
    assert adapted.card.threshold == before.card.threshold
    assert adapted.card.weights_sha256 != before.card.weights_sha256
    assert torch.equal(adapted.vectors, before.vectors)
    assert (adapted.card.positives, adapted.card.negatives) == (12, 12)
    record = json.loads((tmp_path / "robust" / "detector.json").read_text())
    assert record["measured"]["conditions"]["night"]["after"]["positives"] == 12
    assert record["made"]["adapted_from_sha256"] == before.card.weights_sha256
    again = adapt_detector(adapted, clean(), test, tmp_path / "twice", runs=tmp_path / "run2", conditions=["blur"], config=QUICK)
    assert list(again) == ["clean", "blur"]
    assert json.loads((tmp_path / "twice" / "detector.json").read_text())["options"]["adapters"] == ["adapter-1", "adapter-2"]
    assert build(str(tmp_path / "twice")).detect([square(SAFE[1], 1)]).shape == (1, 2)


def test_only_the_lora_and_the_projection_train_and_the_head_never(probe):
    tower = tower_of(build(str(probe)))
    assert isinstance(tower, ProbeTower)
    task = ConditionRobustTask(tower, clean(), ["night"], QUICK)
    start = {name: value.clone() for name, value in tower.trained().items()}
    assert all("lora_" in name and "vision_model" in name for name in start)
    loop = TrainingLoop(task, _accelerator())
    loop.train_step(0)
    assert all(float(task.averages[name].sub(value).abs().max()) == 0 for name, value in _as_averages(task, start).items())
    loop.train_step(1)
    assert not tower.detector.vectors.requires_grad


def _as_averages(task, start):
    return {f"tower.{name}": value for name, value in start.items()}


def _accelerator():
    from valign.training.engine.processes import start_processes

    return start_processes(cpu=True)


def test_decisions_equal_the_detectors(probe, oracle):
    images = [one.source for one in squares(3)]
    for detector in (build(str(probe)), oracle):
        tower = tower_of(detector)
        with torch.no_grad():
            chances = tower.logits(tower.maps(tower.pixels(images))).softmax(1).numpy()
        if detector is oracle:
            expected = oracle._logits(images).glyph.flatten(0, 1).softmax(1).numpy()
            np.testing.assert_allclose(chances, expected, atol=1e-5)
        else:
            harmful = (chances[:, 1] >= 0.5).reshape(len(images), -1)
            assert (harmful == (detector.detect(images) >= detector.card.threshold)).all()


def test_an_adapted_oracle_is_no_longer_the_worlds_own(oracle, tmp_path):
    test = gather(
        [
            HarmExample(f"{name}-{n}", own, square(colour, n))
            for n in range(4)
            for name, own, colour in (("hate", ("hate",), (200, 0, 0)), ("harmless", (), (0, 0, 200)))
        ],
        "these",
    )
    adapt_detector(oracle, clean(), test, tmp_path / "o", runs=tmp_path / "run", conditions=["noise"], config=QUICK)
    found = build(str(tmp_path / "o"))
    assert isinstance(found, OracleDetector)
    assert (found.card.name, found.card.positives) == ("o", 4)
    assert found.net.reader[0].weight.equal(oracle.net.reader[0].weight.half().float())
    assert not found.net.body[0].weight.equal(OracleDetector(tmp_path / "oracle").net.body[0].weight)


def test_a_killed_training_goes_on_to_the_same_weights(oracle, tmp_path, monkeypatch):
    def run(name):
        tower = tower_of(OracleDetector(tmp_path / "oracle"))
        adapt_tower(tower, clean(), ["night", "jpeg"], QUICK, tmp_path / name)
        return {key: value.detach().clone() for key, value in tower.trained().items()}

    whole, step = run("whole"), TrainingLoop.train_step

    def dying(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(TrainingLoop, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(TrainingLoop, "train_step", step)
    resumed = run("killed")
    assert all(resumed[name].equal(value) for name, value in whole.items())


def test_other_detectors_and_existing_folders_are_refused(probe, tmp_path):
    class Plain(NudeNetDetector):
        def __init__(self):
            self.card = build(str(probe)).card

    with pytest.raises(UserError, match="cannot be adapted: it must be a world's oracle, a CLIP probe"):
        tower_of(Plain())
    (tmp_path / "there").mkdir()
    test = gather(squares(2, start=20), "others")
    with pytest.raises(UserError, match=r"exists\. Choose another --out"):
        adapt_detector(build(str(probe)), clean(), test, tmp_path / "there", runs=tmp_path / "run")
    with pytest.raises(ValueError, match="--condition must be one of jpeg, blur, night, style, upscaling, noise; got 'rain'"):
        adapt_detector(build(str(probe)), clean(), test, tmp_path / "new", runs=tmp_path / "run", conditions=["rain"])
    assert not (tmp_path / "run").exists()


def test_a_probe_of_another_encoder_is_refused(probe):
    found = ClipProbeDetector(probe)
    found.encoder = object()
    with pytest.raises(UserError, match="must read a transformers CLIP to be adapted, got object"):
        tower_of(found)


# ---- conditions and pairs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONDITIONS)
def test_a_condition_keeps_the_size_repeats_by_its_numbers_and_changes_the_image(name):
    image = square((200, 40, 40), 5)
    found = under(name, image, 1, 2)
    assert (found.size, found.mode) == (image.size, "RGB")
    assert found.tobytes() == under(name, image, 1, 2).tobytes()
    assert found.tobytes() != under(name, image, 1, 3).tobytes()
    assert np.abs(np.asarray(found, dtype=float) - np.asarray(image, dtype=float)).mean() > 1


def test_night_is_dark():
    image = square((200, 200, 200), 3)
    assert np.asarray(under("night", image, 0)).mean() < 0.45 * np.asarray(image).mean()


def test_pairs_are_read_by_name(tmp_path):
    for side in ("clean", "adverse"):
        (tmp_path / side).mkdir()
        square(SAFE[1], 1).save(tmp_path / side / "one.png")
    square(SAFE[1], 1).save(tmp_path / "clean" / "two.png")
    with pytest.raises(
        UserError, match=r"must hold each image in clean/ and in adverse/, got two in one of them\. .* self-training"
    ):
        read_pairs(tmp_path)
    (tmp_path / "clean" / "two.png").unlink()
    (pair,) = read_pairs(tmp_path)
    assert [image.size for image in pair.images("")] == [(32, 32), (32, 32)]
    with pytest.raises(UserError, match="must be a folder: pairs stand in clean/ and adverse/ under equal names"):
        read_pairs(tmp_path / "clean")


def test_a_pair_of_two_sizes_is_refused():
    pair = ImagePair("x", Image.new("RGB", (8, 8)), Image.new("RGB", (8, 6)))
    with pytest.raises(UserError, match=r"x must have two images of one size, got \(8, 8\) and \(8, 6\)"):
        pair.images("")
