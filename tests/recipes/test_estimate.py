"""Of the options that are open the cheapest that fits is taken; a run beyond the machine is refused with what would make it fit."""

from dataclasses import replace

import pytest

from valign.checks import UserError
from valign.memory import MemoryConfig
from valign.recipes.estimate import LIBRARIES, Machine, PlannedRun, plan, refuse_beyond
from valign.recipes.footprints import Phase


def phases(memory):
    """A made-up training: 8 GB of networks, 10 of activations per step of 4 rows, a fifth of them with checkpointing."""
    networks = 5 if memory.phased else 8
    activations = 10 / memory.micro_batches / (5 if memory.gradient_checkpointing else 1) / (2 if memory.split_pairs else 1)
    precise = 0.5 if memory.precision == "bfloat16" else 1
    return [Phase("encode", 4e9, 1.0), Phase("train", (networks + activations) * precise * 1e9, 2.0, disk=1e9)]


def machine(free, device="cpu"):
    return Machine(device, free * 1e9 + LIBRARIES["cpu"], 100e9, speed=2.0)


RUN = PlannedRun(phases=phases, rows=4, pairs=True)


@pytest.mark.parametrize(
    ("free", "expected"),
    [
        (20, {}),
        (14, {"accumulation": 2}),
        (11, {"accumulation": 4}),
        (8, {"accumulation": 4, "phased": True}),
        (7.1, {"accumulation": 2, "phased": True, "gradient_checkpointing": True}),
        (6, {"accumulation": 4, "phased": True, "gradient_checkpointing": True}),
        (5.45, {"accumulation": 4, "phased": True, "gradient_checkpointing": True, "split_pairs": True}),
    ],
)
def test_the_cheapest_that_fits(free, expected):
    found = plan(RUN, MemoryConfig(), machine(free))
    assert found.fits
    assert found.memory.chosen() == expected
    refuse_beyond(RUN, found, MemoryConfig())


def test_what_somebody_set_is_kept():
    given = MemoryConfig(accumulation=1, phased=False)
    assert plan(RUN, given, machine(10.6)).memory == MemoryConfig(accumulation=1, phased=False, gradient_checkpointing=True)


@pytest.mark.parametrize(
    ("given", "free", "remedy"),
    [
        (
            {"gradient_checkpointing": False, "accumulation": 1},
            9,
            r"Leave out memory\.gradient_checkpointing: it needs 7\.90 GB then",
        ),
        ({}, 4.5, r"With --precision bfloat16 it needs"),
        ({}, 0.1, r"No option makes it fit: use a device with more memory, or a smaller model"),
    ],
)
def test_a_run_beyond_the_machine_is_refused_with_what_makes_it_fit(given, free, remedy):
    memory = MemoryConfig(**given)
    found = plan(RUN, memory, machine(free))
    with pytest.raises(UserError, match=rf"needs about .* GB in its phase 'train', and .* GB are free on cpu\. .*{remedy}"):
        refuse_beyond(RUN, found, memory)


def test_a_smaller_batch_is_named_where_it_helps():
    run = PlannedRun(
        phases=lambda _: [Phase("sample", 9e9, 1.0)], smaller={"--batch-size 1": lambda _: [Phase("sample", 2e9, 1.0)]}
    )
    with pytest.raises(UserError, match=r"With --batch-size 1 it needs 2\.90 GB\."):
        refuse_beyond(run, plan(run, MemoryConfig(), machine(4)), MemoryConfig())


def test_a_card_offloads_where_a_processor_cannot():
    run = PlannedRun(phases=lambda memory: [Phase("sample", (4 if memory.offload else 9) * 1e9, 1.0)])
    assert plan(run, MemoryConfig(), machine(5, "cuda:0")).memory.offload
    assert not plan(run, MemoryConfig(), machine(5)).fits


def test_the_disk_counts():
    full = Machine("cpu", 100e9, 0.5e9)
    with pytest.raises(UserError, match=r"would write about 1\.0 GB, and 0\.5 GB are free there\. Name another --out"):
        refuse_beyond(RUN, plan(RUN, MemoryConfig(), full), MemoryConfig())


def test_the_record_names_every_phase():
    record = plan(RUN, MemoryConfig(), machine(20)).record()
    assert record["fits"]
    assert [phase["phase"] for phase in record["phases"]] == ["encode", "train"]
    assert record["phases"][1] == {"phase": "train", "memory_gb": 18.9, "disk_gb": 1.0, "seconds": 1.0}
    reading = replace(machine(20), reading=4.0)  # bytes of weights a second
    found = replace(plan(RUN, MemoryConfig(), reading), phases=(Phase("train", 1e9, 2.0, reads=6.0),), start=7.04).record()
    assert (found["phases"][0]["seconds"], found["start_seconds"]) == (2.5, 7.0)
    unknown = Machine("cpu", 100e9, 100e9)
    assert plan(RUN, MemoryConfig(), unknown).record()["phases"][0]["seconds"] is None
