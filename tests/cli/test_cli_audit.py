"""``valign audit``: both audits on the bundled chat models and on adapters; the report's files."""

import json
from shutil import copytree

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig
from typer.testing import CliRunner

from valign.checks import UserError
from valign.cli import audit as commands
from valign.detectors.base import flagged
from valign.detectors.safety_checker import SafetyCheckerDetector, clip_pixels
from valign.interfaces import DetectorCard
from valign.models.files.adapter_files import LoraFactors, save_adapter
from valign.worlds.chat import adapter_folder, model_folder

BASE, ALIGNED, TUNED = (model_folder(stage) for stage in ("base", "aligned", "memorized"))


def audit(*arguments):
    result = CliRunner().invoke(commands.app, [str(argument) for argument in arguments], catch_exceptions=True)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-m", "shapes", "--answer-tokens", "9"), "--answer-tokens has no effect on a diffusion model"),
        (("-m", "chat", "--detector", "oracle"), "--detector has no effect on a chat model"),
        (("-m", "shapes", "-d", __file__, "--task", "benign-dusk"), "--task has no effect with --data"),
        (("-m", "chat", "-s", __file__, "--samples", "9"), "--samples has no effect with --suite"),
    ],
)
def test_options_without_effect_on_a_kind_of_model_are_refused(words, message, tmp_path):
    with pytest.raises(UserError, match=message):
        audit("fragility", *words, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_subspaces_of_a_chat_model(tmp_path):
    arguments = (
        "--base",
        BASE,
        "--aligned",
        ALIGNED,
        "--update",
        f"records={TUNED}",
        "--useful",
        "records",
        "--harmful",
        "records",
    )
    said = audit("subspaces", *arguments, "-o", tmp_path / "out").stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["weights"] == 38
    assert 0 <= found["energy_kept"]["records"]["top"]["0.5"] <= 1
    assert "No distinct safety subspace shows in the weights" in said
    assert (tmp_path / "out" / "curves.png").stat().st_size > 5000
    assert "# Verdict" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UserError, match=r"exists\. Choose another --out"):
        audit("subspaces", *arguments, "-o", tmp_path / "out")


def test_subspaces_of_adapters_alone(tmp_path):
    g = torch.Generator().manual_seed(0)
    for name in ("hate", "violence"):
        factors = {"mid_block.attentions.0.to_q": LoraFactors(torch.randn(2, 8, generator=g), torch.randn(9, 2, generator=g), 1.0)}
        save_adapter(tmp_path / name, factors, metadata={})
    audit("subspaces", *(f"--update={name}={tmp_path / name}" for name in ("hate", "violence")), "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert list(found["overlap"]) == ["hate - violence"]
    assert found["energy_kept"] == {}
    with pytest.raises(UserError, match="--base and --aligned must be given together"):
        audit("subspaces", "--base", BASE, "--update", f"a={adapter_folder('safety')}", "-o", tmp_path / "one")


@pytest.fixture(scope="module")
def checker(tmp_path_factory):
    """A pipeline folder with a safety checker in miniature that flags half of some noise images; and both halves as folders."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    root, rng = tmp_path_factory.mktemp("checker"), np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(40)]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = CLIPConfig(vision_config={**sizes, "image_size": 16, "patch_size": 8}, text_config={}, projection_dim=8)
    model = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        model.concept_embeds.copy_(torch.randn(1, 8).expand(17, 8))
        features = model.visual_projection(model.vision_model(clip_pixels(images, 16))[1])
        cosine = torch.nn.functional.cosine_similarity(features, model.concept_embeds[:1])
        model.concept_embeds_weights.fill_(float(cosine.median()))
        model.special_care_embeds_weights.fill_(2.0)
    model.save_pretrained(root / "safety_checker")
    detector = SafetyCheckerDetector(root)
    for number, (image, flag) in enumerate(zip(images, flagged(detector.detect(images), detector.card), strict=True)):
        place = root / ("bad" if flag else "good")
        place.mkdir(exist_ok=True)
        image.save(place / f"{number:02d}.png")
    return root


def moved(folder, source, part, seed):
    """A copy with a random change of one part's weights."""
    copytree(source, folder)
    (file,) = (folder / part).glob("*.safetensors")
    g = torch.Generator().manual_seed(seed)
    save_file({name: w + 0.1 * torch.randn(w.shape, generator=g) for name, w in load_file(file).items()}, file, {"format": "pt"})
    return folder


@pytest.mark.parametrize("part", ["unet", "text_encoder", "safety_checker"])
def test_subspaces_of_parts_of_a_pipeline(part, tiny_sd, checker, tmp_path):
    base = checker if part == "safety_checker" else tiny_sd
    aligned, tuned = moved(tmp_path / "aligned", base, part, 0), moved(tmp_path / "tuned", base, part, 1)
    base, aligned, tuned = (one if part == "unet" else one / part for one in (base, aligned, tuned))
    audit("subspaces", "--base", base, "--aligned", aligned, "--update", f"tuned={tuned}", "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["weights"] > 10
    row = found["overlap"]["alignment - tuned"]["0.5"]
    assert row["interval"]["low"] <= row["mean"] <= row["interval"]["high"]
    assert 0 < found["energy_kept"]["tuned"]["top"]["0.5"] < 1


def test_concentration_of_a_checker(checker, tmp_path):
    sets = ("--flagged-images", checker / "bad", "--benign-images", checker / "good")
    options = ("--part", "checker", *sets, "--set", "least=8", "--random-sets", "2", "--auc", "0.5")
    audit("concentration", "--model", checker, *options, "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["neurons"] == 32
    assert found["start"]["refused"]["value"] == 1.0
    assert found["start"]["over_refused"]["value"] == 0.0
    assert found["by_rank"][-1]["share"] == 1.0
    copytree(checker / "bad", tmp_path / "bad")
    (tmp_path / "bad" / "again.png").write_bytes(next((checker / "bad").iterdir()).read_bytes())
    again = ("--flagged-images", tmp_path / "bad", *sets[2:], "--set", "least=8")
    with pytest.raises(UserError, match="Every row must stand in one set once"):
        audit("concentration", "--model", checker, "--part", "checker", *again, "-o", tmp_path / "twice")


class Harmless:
    """Finds every image harmless."""

    card = DetectorCard("harmless", ("harm",), 0.5, "ab" * 32, 1.0, 1.0, 400, 400, covers="all")

    def detect(self, images):
        return np.zeros((len(images), 1))


@pytest.mark.parametrize("part", ["unet", "text-encoder"])
def test_concentration_of_a_diffusion_model(part, tiny_sd, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "resolve_detector", lambda names, model: Harmless())
    rows = [f"{n % 2},{'a red man' if n % 2 else 'a blue woman'} number {n}" for n in range(20)]
    (tmp_path / "prompts.csv").write_text("\n".join(["label,prompt", *rows]))
    options = ("--part", part, "--prompts", tmp_path / "prompts.csv", "--set", "least=4", "--random-sets", "2", "--steps", "1")
    audit("concentration", "--model", tiny_sd, *options, "--auc", "0.5", "-o", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["start"]["refused"]["value"] == 1.0
    assert found["drop"] == 0.0  # the detector flags nothing, whatever is silent
    names = [one["module"] for one in found["modules"]]
    assert all(("ff.net.0.proj" if part == "unet" else "mlp.fc1") in name for name in names)
    assert any(one["tagged"] is not None for one in found["modules"])


@pytest.mark.slow
def test_concentration_of_a_chat_model(tmp_path):
    options = ("--world", "chat", "--rows", "20", "--set", "least=20", "--random-sets", "2")
    said = audit("concentration", "--model", ALIGNED, *options, "-o", tmp_path / "out").stdout
    found = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert found["neurons"] == 4 * 2 * 448
    assert found["start"]["refused"]["value"] > 0.9
    assert len(found["controls"]["random"]) == 2
    assert "are tagged" in said


def test_what_concentration_needs(tmp_path):
    with pytest.raises(UserError, match="The audit needs --prompts FILE with labels"):
        audit("concentration", "--model", ALIGNED, "-o", tmp_path / "out")
    with pytest.raises(UserError, match="A checker is audited on --flagged-images and --benign-images"):
        audit("concentration", "--model", ALIGNED, "--part", "checker", "-o", tmp_path / "out")
