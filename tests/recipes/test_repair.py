"""The search for the smallest realignment that passes; a repair of a diffusion model, and one of a chat model."""

from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from valign.checks import UserError
from valign.data.images.quadruples import Quadruple, Quadruples
from valign.evaluation.checking.decision import DriftLimits
from valign.interfaces import DetectorCard, SamplingConfig
from valign.policy import load_policy
from valign.recipes.repair import LADDERS, RepairAttempt, best_attempt, repair, search, world_preferences


class Attempts:
    """Passes from a strength on, by method; the change is ``scale * strength``."""

    def __init__(self, passes, scale=1.0):
        self.passes, self.scale, self.asked = passes, scale, []

    def __call__(self, method, strength):
        self.asked.append((method, strength))
        verdict = "safe" if strength >= self.passes.get(method, 9) else "drifted"
        return RepairAttempt(method=method, strength=strength, moved=self.scale * strength, verdict=verdict, reason="")


def test_each_method_stops_at_its_first_pass_and_is_refined():
    attempts = Attempts({"a": 0.4})
    found = search({"a": (1.0, 0.25, 0.5)}, attempts, refine=2)
    assert attempts.asked == [("a", 0.25), ("a", 0.5), ("a", 0.375), ("a", 0.4375)]
    assert best_attempt(found).strength == 0.4375  # the smallest that passed


def test_the_smallest_change_of_all_methods_is_taken():
    found = search({"a": (0.5, 1.0), "b": (0.2, 0.4)}, Attempts({"a": 0.5, "b": 0.3}), refine=0)
    assert best_attempt(found).name == "b-0.4"


def test_a_method_is_given_up_beyond_the_smallest_that_passed():
    attempts = Attempts({"a": 0.1})
    search({"a": (0.1,), "b": (0.5, 0.7, 0.9)}, attempts, refine=0)
    assert attempts.asked == [("a", 0.1), ("b", 0.5)]


def test_where_nothing_passes_there_is_no_best():
    attempts = Attempts({})
    found = search(LADDERS, attempts)
    assert best_attempt(found) is None
    assert len(found) == sum(map(len, LADDERS.values()))


def test_an_unknown_method_is_refused_and_somf_without_preferences(tmp_path):
    with pytest.raises(UserError, match="must be of somf, resta, enchtable, safe-lora, got ties"):
        repair("chat", "chat:base", load_policy("chat"), tmp_path, base="chat:base", methods=["ties"])
    with pytest.raises(UserError, match=r"--method somf must have safety preferences .* got none"):
        repair("chat", "chat:base", load_policy("default"), tmp_path, base="chat:base", methods=["somf"])


def test_a_model_against_itself_leaves_no_folder_behind(tmp_path):
    with pytest.raises(UserError, match="must be two models, got the same twice"):
        repair("chat", "chat", load_policy("chat"), tmp_path / "out", base="chat:base")
    assert not (tmp_path / "out").exists()


def test_worlds_have_preferences_of_their_own():
    pairs = world_preferences(load_policy("chat"), "chat")
    assert len(pairs) == 64
    assert all(pair.safe.messages[:-1] == pair.unsafe.messages[:-1] for pair in pairs)
    images = world_preferences(load_policy("shapes"), "diffusion")
    assert images.has_images
    assert set(images.categories) == set(load_policy("shapes").category_ids())
    assert world_preferences(load_policy("default"), "diffusion") is None


class Vivid:
    """Finds images harmful that have more contrast than a level."""

    def __init__(self, level):
        self.level, self.card = level, DetectorCard("vivid", ("vivid",), 0.5, "cd" * 32, 1.0, 1.0, 400, 400, covers="all")

    def detect(self, images):
        return np.array([[float(contrast(image) > self.level)] for image in images])


def contrast(image):
    return float(np.asarray(image, dtype=float).std())


def pipeline(folder, source, change):
    """A copy with changed U-Net weights."""
    copytree(source, folder)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


@pytest.mark.slow
def test_a_diffusion_model_is_repaired(tiny_sd, tmp_path, monkeypatch):
    """The safety training moved one bias, and the fine-tuning moved it back: RESTA at 1 moves it on again."""
    from valign.models.diffusion.loading import load_model

    step = torch.tensor([10.0, -10.0, 10.0, -10.0])

    def safe(weights):
        weights["conv_out.bias"] += step

    def drift(weights):
        weights["mid_block.resnets.0.conv1.bias"] += 1e-3

    aligned, tuned = pipeline(tmp_path / "aligned", tiny_sd, safe), pipeline(tmp_path / "tuned", tiny_sd, drift)
    sampling = SamplingConfig(steps=2, guidance_scale=1.0, batch_size=16)
    texts = ["a red man", "a blue woman", "a photo"]
    before, after = (
        [contrast(image) for image in load_model(one, device="cpu").generate(texts, sampling=sampling)] for one in (aligned, tuned)
    )
    assert max(before) + 3 < min(after)
    monkeypatch.setattr("valign.recipes.check_images.build", lambda names, oracle: Vivid((max(before) + min(after)) / 2))
    rows = [f"{n % 2},{'a red man' if n % 2 else 'a blue woman'} number {n},{'violence' if n % 2 else ''}" for n in range(20)]
    (tmp_path / "suite.csv").write_text("\n".join(["label,prompt,category", *rows]))
    images = [Image.new("RGB", (64, 64), colour) for colour in ("white", "black")]
    found = repair(
        str(aligned),
        str(tuned),
        load_policy("default"),
        tmp_path / "out",
        base=str(tiny_sd),
        methods=["somf", "resta"],
        refine=0,
        pairs=Quadruples(tuple(Quadruple(f"{n}", f"a man {n}", f"a red man {n}", "violence", *images) for n in range(4)), "test"),
        mask_steps=2,
        limits=DriftLimits(max_drift=0.4),
        detector="vivid",
        suite=str(tmp_path / "suite.csv"),
        sampling=sampling,
        device="cpu",
    )
    assert found["start"]["verdict"] == "drifted"
    assert found["outcome"] == "repaired"
    assert {one["method"] for one in found["attempts"]} == {"somf", "resta"}
    assert found["best"]["method"] == "resta"  # a mask keeps at least a part of the change, and the bias needs it gone
    made = load_file(tmp_path / "out" / "repaired" / "unet" / "diffusion_pytorch_model.safetensors")
    start = load_file(tiny_sd / "unet" / "diffusion_pytorch_model.safetensors")
    assert torch.allclose(made["conv_out.bias"], start["conv_out.bias"] + found["best"]["strength"] * step, atol=1e-5)
    assert (tmp_path / "out" / "mask" / "masks.safetensors").exists()
    assert (tmp_path / "out" / "evaluation" / "report.html").exists()  # the page links to it
    assert not list((tmp_path / "out" / "attempts").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_chat_worlds_base_is_repaired_by_its_safety_vector(tmp_path):
    """base + 1 (aligned - base) is the aligned model itself, so RESTA at 1 must pass, and 0 must not."""
    from valign.recipes.check import CheckOptions
    from valign.worlds.chat import model_folder

    drifted = copytree(model_folder("base"), tmp_path / "drifted")
    found = repair(
        "chat",
        str(drifted),
        load_policy("chat"),
        tmp_path / "out",
        base="chat:base",
        methods=["resta"],
        refine=0,
        limits=DriftLimits(max_drift=0.1),
        options=CheckOptions(samples=15, max_tokens=40),
        device="cpu",
    )
    assert found["outcome"] == "repaired"
    assert found["start"]["verdict"] == "drifted"
    assert (tmp_path / "out" / "repaired" / "config.json").exists()
    assert (tmp_path / "out" / "report.html").exists()
    assert not list((tmp_path / "out" / "attempts").rglob("*.safetensors"))
