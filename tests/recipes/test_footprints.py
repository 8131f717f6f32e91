"""Phases are sums of what was simulated: weights once, activations per row, the optimizer's state per trained number."""

from dataclasses import replace

import pytest

from valign.interfaces import SamplingConfig
from valign.memory import MemoryConfig
from valign.merging import MERGES
from valign.models.diffusion.sketch import Sketch
from valign.recipes.align import AlignConfig
from valign.recipes.footprints import SLACK, DiffusionPhases
from valign.training import PreferenceConfig
from valign.training.tasks.supervised.config import SupervisedConfig


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


def test_passes_over_retained_prompts_and_for_the_merge_count(sketch):
    phases = DiffusionPhases(sketch=sketch, memory=MemoryConfig(), cuda=False)
    trained, plain = sketch.trained(rank=2, checkpointed=False)[0], sketch.denoised
    config = PreferenceConfig(rank=2, steps=5, pairs_per_step=4)
    without, held = (phases.training(replace(config, retain_weight=weight)) for weight in (0.0, 1.0))
    assert held.flops - without.flops == pytest.approx(5 * 4 * (trained.flops + plain.flops))
    assert without.reads == pytest.approx(5 * (trained.reads + plain.reads))
    assert held.reads == pytest.approx(2 * without.reads)
    looked = phases.looking(MERGES["regmean"], 2, 10)
    assert looked.flops == pytest.approx(4 * (2 * 10 + 300) * plain.flops)
    chain = AlignConfig(merge="regmean", calibration=10, strength=1.0)
    named = {phase.name: phase for phase in phases.align(chain, categories=2, prompts=3, candidates=0)}
    assert named["look at prompts for the merge"] == looked
    assert "look at prompts for the merge" not in {
        phase.name for phase in phases.align(AlignConfig(strength=1.0), categories=2, prompts=3, candidates=0)
    }


def test_every_micro_batch_reads_the_weights(sketch):
    def read(**memory):
        config = SupervisedConfig(steps=3, batch_size=4, memory=MemoryConfig(**memory))
        phases = DiffusionPhases(sketch=sketch, memory=config.memory, cuda=False)
        return phases.finetuning(config, 2, ("to_q",), "adamw").reads

    assert read(accumulation=4) == pytest.approx(4 * read())
    assert read(gradient_checkpointing=True) == pytest.approx(1.5 * read())
    phases = DiffusionPhases(sketch=sketch, memory=MemoryConfig(vae_slice=1), cuda=False)
    one, two = (phases.sampling("s", 8, SamplingConfig(batch_size=size, steps=3)).reads for size in (4, 2))
    assert two - one == pytest.approx(2 * 3 * sketch.denoised.reads)
