"""A model by its configurations: its sizes are the published ones, and what it needs grows as it should."""

import shutil

import pytest

from valign.checks import UserError
from valign.models.diffusion.published import write_configs
from valign.models.diffusion.sketch import Sketch


def bare(folder, target):
    """A copy of a pipeline's folder without weights."""
    return shutil.copytree(folder, target, ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.mark.parametrize(
    ("name", "denoiser", "texts"),
    [("sd15", 859_520_964, 123_060_480), ("sd21", 865_910_724, 340_387_840), ("sdxl", 2_567_463_684, 817_720_320)],
)
def test_published_sizes(name, denoiser, texts, tmp_path):
    """The counts are those of the published checkpoints."""
    half = Sketch(folder=write_configs(name, tmp_path / name), precision="bfloat16")
    assert (half.bytes("denoiser"), half.bytes("text"), half.bytes("vae")) == (2 * denoiser, 2 * texts, 4 * 83_653_863)
    assert half.bytes() == half.bytes("denoiser") + half.bytes("text") + half.bytes("vae")


def test_what_is_simulated_without_any_weight(tiny_sd, tmp_path):
    sketch = Sketch(folder=bare(tiny_sd, tmp_path / "bare"), precision="float32")
    plain, factors = sketch.trained(rank=2, checkpointed=False)
    sparing, same = sketch.trained(rank=2, checkpointed=True)
    assert factors == same > 0
    assert sparing.activations < plain.activations
    assert sparing.flops > plain.flops > sketch.denoised.flops
    assert sketch.denoised.activations < plain.activations
    assert plain.weights == sketch.bytes("denoiser") + 4 * factors
    assert sketch.decoded.flops > 0 < sketch.encoded.flops
    assert sketch.text_numbers() == 77 * sketch.shapes.text_width


def test_the_other_family_is_read_by_its_index(tiny_sdxl, tmp_path):
    sketch = Sketch(folder=bare(tiny_sdxl, tmp_path / "bare"), precision="bfloat16", vae_precision="bfloat16")
    assert sketch.family == "sdxl"
    assert sketch.text.flops > 0 < sketch.denoised.flops
    assert sketch.bytes("vae") == 2 * sum(p.numel() for p in sketch.shapes.pipe.vae.parameters())


def test_a_model_without_configurations_is_refused(tiny_sd, tmp_path):
    folder = bare(tiny_sd, tmp_path / "bare")
    (folder / "unet" / "config.json").unlink()
    with pytest.raises(UserError, match=r"unet must have a config\.json to be estimated by, got none.* sd15, sd21 or sdxl"):
        Sketch(folder=folder, precision="float32")
    with pytest.raises(UserError, match=r"has no model_index\.json, so it is not a diffusers model"):
        Sketch(folder=tmp_path, precision="float32")
