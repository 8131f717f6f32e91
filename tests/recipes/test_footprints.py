"""Phases are sums of what was simulated: weights once, activations per row, the optimizer's state per trained number."""

import pytest

from valign.interfaces import SamplingConfig
from valign.memory import MemoryConfig
from valign.models.diffusion.sketch import Sketch
from valign.recipes.footprints import SLACK, DiffusionPhases
from valign.training import PreferenceConfig


@pytest.fixture(scope="module")
def sketch(tiny_sd):
    return Sketch(folder=tiny_sd, precision="float32")


def peak(sketch, *, cuda=False, **memory):
    config = PreferenceConfig(rank=2, pairs_per_step=8, memory=MemoryConfig(**memory))
    return DiffusionPhases(sketch=sketch, memory=config.memory, cuda=cuda).training(config).memory


def test_a_training_by_hand(sketch):
    unit, trained = sketch.trained(rank=2, checkpointed=False)
    for memory, rows in (({}, 16), ({"accumulation": 4}, 4), ({"accumulation": 8, "split_pairs": True}, 1)):
        wanted = SLACK * (unit.peak(rows) + sketch.bytes("text", "vae")) + 12 * trained
        assert peak(sketch, **memory) == pytest.approx(wanted)
    assert peak(sketch, phased=True) == pytest.approx(peak(sketch) - SLACK * sketch.bytes("text", "vae"))
    assert peak(sketch, cuda=True) == peak(sketch, phased=True)  # encoders wait in main memory


def test_what_a_preset_sets_counts(sketch):
    config = PreferenceConfig(rank=2, memory=MemoryConfig(gradient_checkpointing=True))
    found = DiffusionPhases(sketch=sketch, memory=MemoryConfig(), cuda=False).training(config)
    assert (
        found.memory < DiffusionPhases(sketch=sketch, memory=MemoryConfig(), cuda=False).training(PreferenceConfig(rank=2)).memory
    )


def test_images_need_the_larger_of_denoiser_and_autoencoder(sketch):
    phases = DiffusionPhases(sketch=sketch, memory=MemoryConfig(), cuda=False)
    few, many = (phases.sampling("s", 10, SamplingConfig(batch_size=size, steps=3)) for size in (1, 8))
    assert few.memory < many.memory
    assert few.flops == many.flops == 10 * (3 * 2 * sketch.denoised.flops + sketch.decoded.flops)
    offloaded = DiffusionPhases(sketch=sketch, memory=MemoryConfig(offload=True), cuda=True)
    assert offloaded.sampling("s", 10, SamplingConfig(batch_size=1)).memory < few.memory
