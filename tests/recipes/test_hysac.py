"""HySAC from quadruples to a detector, a stage of the guard and a search that returns the safe neighbour."""

import json
import shutil

import numpy as np
import pytest
import torch

from clip_models import SAFE, UNSAFE, build_clip, coloured_quadruples, square
from valign.checks import UserError
from valign.detectors import build
from valign.detectors.record import read_record
from valign.guard.head.hyperbolic import HyperbolicStage
from valign.guard.images.safe_search import SafeSearch
from valign.guard.stages import STAGES, StageParts
from valign.models.encoders.clip import ClipEncoder
from valign.models.encoders.hyperbolic_clip import CARD, TENSORS, load_hyperbolic
from valign.models.hyperbolic.lorentz import root_distance
from valign.models.hyperbolic.space import HyperbolicSpace
from valign.objectives.hyperbolic.safety_entailment import SafetyEntailment
from valign.policy import load_policy
from valign.recipes.hysac import HysacRecipe, train_hysac
from valign.training.engine.loop import TrainingLoop
from valign.training.tasks.quadruples import (
    TARGETS,
    HyperbolicTuning,
    QuadrupleConfig,
    QuadrupleTask,
    embed,
    train_on_quadruples,
)

QUICK = {"steps": 60, "batch_size": 8, "learning_rate": 2e-2, "validate_every": 30, "checkpoint_every": 40, "rank": 4, "alpha": 4.0}
TEST = coloured_quadruples(8, start=100)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return build_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="module")
def trained(clip, tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors") / "hysac"
    encoder = ClipEncoder(clip, device="cpu")
    found = train_hysac(encoder, coloured_quadruples(), TEST, folder, HysacRecipe.for_clip(encoder).changed(**QUICK))
    return folder, found


def distances(found, quadruples):
    images = [[row.image(side) for row in quadruples.rows] for side in ("safe", "unsafe")]
    texts = [[row.safe for row in quadruples.rows], [row.unsafe for row in quadruples.rows]]
    points = [
        found.text_points(texts[0]),
        found.image_points(images[0]),
        found.text_points(texts[1]),
        found.image_points(images[1]),
    ]
    return [found.root_distances(own).mean() for own in points]


def test_unsafe_content_comes_to_lie_further_from_the_root(trained):
    _, found = trained
    safe_text, safe_image, unsafe_text, unsafe_image = distances(found, TEST)
    assert safe_text < unsafe_text
    assert safe_image < unsafe_image


def test_the_folder_is_a_detector_with_its_measured_error(trained):
    folder, found = trained
    record, detector = read_record(folder), build(str(folder))
    assert detector.card == record.card
    assert (record.kind, record.card.classes, record.card.coverage) == ("hysac", ("unsafe",), {"unsafe": ("hate", "violence")})
    assert (record.card.positives, record.card.negatives) == (16, 16)
    assert record.card.sensitivity > 0.8
    assert record.card.specificity > 0.8
    assert [row["category"] for row in record.measured["prompts"]] == ["", "hate", "violence"]
    red, blue = (np.round(detector.detect([square(colour, 7)])[0, 0], 3) for colour in (UNSAFE["violence"][1], SAFE[1]))
    assert red > record.card.threshold > blue
    images = [square(UNSAFE["hate"][1], 3)]
    np.testing.assert_allclose(detector.detect(images)[:, 0], found.image_harm(images), atol=1e-5)
    assert detector.detect([]).shape == (0, 1)


def test_only_the_lora_and_four_scalars_are_trained_and_nothing_changes_at_the_start(clip):
    encoder = ClipEncoder(clip, device="cpu")
    rows = coloured_quadruples(4).rows
    before = embed(encoder, rows)
    recipe = HysacRecipe.for_clip(encoder)
    tuning = HyperbolicTuning(HyperbolicSpace(encoder.dim), recipe.objective)
    task = QuadrupleTask(encoder, coloured_quadruples(4), coloured_quadruples(4), tuning, QuadrupleConfig(batch_size=4))
    after = embed(encoder, rows)
    for name in ("safe_text", "unsafe_image"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name))
    task.gradients(0)
    got = {name for name, parameter in task.network.named_parameters() if parameter.grad is not None}
    assert got
    assert all("lora_" in name for name in got)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in got} == set(TARGETS)
    scalars = tuning.scalars()
    assert sorted(scalars) == ["space.alpha_image", "space.alpha_text", "space.log_curvature", "space.logit_scale"]
    assert all(parameter.grad is not None for parameter in scalars.values())
    assert [group["weight_decay"] for group in task.optimizer.param_groups] == [0.2, 0.0]


def test_a_killed_training_goes_on_to_the_same_weights(clip, tmp_path, monkeypatch):
    train, held_out = coloured_quadruples(6).split(0.2, seed=0)
    config = QuadrupleConfig(**QUICK | {"steps": 8, "validate_every": 4, "checkpoint_every": 4})

    def run(name):
        encoder, folder = ClipEncoder(clip, device="cpu"), tmp_path / name
        tuning = HyperbolicTuning(HyperbolicSpace(encoder.dim), SafetyEntailment())
        train_on_quadruples(encoder, train, held_out, tuning, config, folder, folder / "adapter")
        return (folder / "adapter" / "adapter_model.safetensors").read_bytes(), tuning.space.tensors()

    whole = run("whole")
    step = TrainingLoop.train_step

    def dying(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(TrainingLoop, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        run("killed")
    monkeypatch.setattr(TrainingLoop, "train_step", step)
    assert not (tmp_path / "killed" / "adapter").exists()
    weights, scalars = run("killed")
    assert weights == whole[0]
    assert scalars == whole[1]


def test_a_finished_folder_is_read_and_another_recipe_refused(clip, trained):
    folder, found = trained
    encoder = ClipEncoder(clip, device="cpu")
    recipe = HysacRecipe.for_clip(encoder).changed(**QUICK)
    assert train_hysac(encoder, coloured_quadruples(), TEST, folder, recipe).weights_sha256 == found.weights_sha256
    with pytest.raises(UserError, match="steps was 60 and is now 61"):
        train_hysac(encoder, coloured_quadruples(), TEST, folder, recipe.changed(steps=61))


def test_captions_alone_make_a_judge_of_prompts(clip, tmp_path):
    encoder = ClipEncoder(clip, device="cpu")
    recipe = HysacRecipe.for_clip(encoder).changed(**QUICK | {"steps": 40})
    rows = coloured_quadruples(images=False)
    found = train_hysac(encoder, rows, coloured_quadruples(8, start=100, images=False), tmp_path / "texts", recipe)
    assert not (tmp_path / "texts" / "detector.json").exists()
    assert found.text_harm(["flame in the photo"]) > found.text_harm(["heart in the photo"])
    with pytest.raises(UserError, match="was trained on captions alone and cannot judge images"):
        load_hyperbolic(tmp_path / "texts").image_harm([square(SAFE[1], 0)])


# ---- guard and search ------------------------------------------------------------------------------------------------


def test_the_stage_fires_on_unsafe_prompts_and_names_the_category(trained):
    _, found = trained
    policy = load_policy("shapes")
    stage = STAGES["hysac"](StageParts(policy, hyperbolic=found))
    prompts = [row.unsafe for row in TEST.rows] + [row.safe for row in TEST.rows]
    verdicts = stage.check_many(prompts)
    wanted = [row.category for row in TEST.rows]
    assert np.mean([one.fired for one in verdicts[:16]]) > 0.8
    assert np.mean([one.fired for one in verdicts[16:]]) < 0.2
    assert np.mean([one.category == name for one, name in zip(verdicts, wanted)]) > 0.8
    assert all((one.score >= one.threshold) == one.fired for one in verdicts)
    assert stage.fingerprint() == found.weights_sha256
    alone = stage.check(prompts[0])  # batches of other sizes round differently on some processors
    assert (alone.category, alone.fired, alone.threshold) == (verdicts[0].category, verdicts[0].fired, verdicts[0].threshold)
    assert alone.score == pytest.approx(verdicts[0].score, abs=1e-5)


def test_a_policy_with_the_stage_needs_a_clip(trained):
    policy = load_policy("shapes")
    with pytest.raises(UserError, match="lists the stage hysac, which needs a hyperbolic CLIP, got none"):
        STAGES["hysac"](StageParts(policy))
    with pytest.raises(UserError, match=r"HyperbolicStage\.categories must have one of hate, violence, got none"):
        HyperbolicStage(trained[1], categories=["sexual"])


def test_an_unsafe_query_finds_its_safe_neighbours(trained):
    _, found = trained
    images = [square(SAFE[1], n) for n in range(8)] + [square(UNSAFE["violence"][1], n) for n in range(8)]
    index = SafeSearch(found, found.image_points(images), "image", margin=0.0)
    queries = found.image_points([square(UNSAFE["violence"][1], n) for n in range(20, 26)])
    plain, safe = (index.find(queries, top=1, safe=wanted) for wanted in (False, True))
    assert all(one.items[0] >= 8 and not one.moved for one in plain)
    assert all(one.moved for one in safe)
    assert np.mean([one.items[0] < 8 for one in safe]) > np.mean([one.items[0] < 8 for one in plain])
    harmless = found.image_points([square(SAFE[1], 30)])
    assert index.find(harmless)[0].items == index.find(harmless, safe=False)[0].items
    assert len(index.find(queries, top=99)[0].items) == 16
    assert sorted(index.find(queries)[0].distances) == list(index.find(queries)[0].distances)


def test_a_search_without_items_is_refused(trained):
    with pytest.raises(UserError, match=r"SafeSearch\.items must hold at least one item"):
        SafeSearch(trained[1], torch.zeros(0, 12), "image")


# ---- bad input -------------------------------------------------------------------------------------------------------


def broken(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / CARD).read_text())
    change(values)
    (copy / CARD).write_text(json.dumps(values))
    return copy


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda card: card["bounds"].update(curvature=9.0), "points of two curvatures do not compare"),
        (lambda card: card["bounds"]["bounds"].pop("safe_image"), "must have a finite distance for each of"),
        (lambda card: card["notes"].update(encoder_sha256="0" * 64), "was trained on encoder 000000000000, got "),
        (lambda card: card.update(format=9), "must be of format 1, got 9"),
        (lambda card: card["unsafe_captions"].pop(), "must be points of 12 numbers with a category each"),
        (lambda card: card.pop("text"), "does not hold a hyperbolic CLIP"),
    ],
)
def test_a_broken_card_is_refused(trained, tmp_path, change, said):
    with pytest.raises(UserError, match=said):
        load_hyperbolic(broken(trained[0], tmp_path, change))


def test_changed_scalars_are_refused(trained, tmp_path):
    from safetensors.torch import load_file, save_file

    copy = broken(trained[0], tmp_path, lambda card: None)
    tensors = load_file(copy / TENSORS)
    save_file(tensors | {"alpha_image": tensors["alpha_image"] - 1}, copy / TENSORS)
    with pytest.raises(UserError, match=r"must hold the weights that detector\.json describes"):
        build(str(copy))
    save_file(tensors | {"alpha_image": tensors["alpha_image"] * float("nan")}, copy / TENSORS)
    with pytest.raises(UserError, match="alpha_image must be finite"):
        build(str(copy))


def test_a_missing_adapter_is_refused(trained, tmp_path):
    copy = broken(trained[0], tmp_path, lambda card: None)
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"must be a peft adapter's folder, it has no adapter_model\.safetensors"):
        build(str(copy))


def test_features_that_are_not_finite_are_refused(trained, monkeypatch):
    _, found = trained
    monkeypatch.setattr(found.encoder, "text_projections", lambda prompts: torch.full((1, 12), float("nan")))
    with pytest.raises(ValueError, match=r"text features of .* must be finite"):
        found.text_points(["a"])
    assert STAGES["hysac"](StageParts(load_policy("shapes"), hyperbolic=found)) is not None


def test_distances_agree_with_the_space(trained):
    _, found = trained
    points = found.text_points(["flame in the photo"])
    assert found.root_distances(points)[0] == pytest.approx(float(root_distance(points, found.curvature)[0]))
