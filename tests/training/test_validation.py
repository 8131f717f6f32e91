from math import log

import pytest
import torch
from pair_data import small_config
from torch.testing import assert_close

from valign.models.diffusion.lora import attach_lora, unload_adapters
from valign.objectives import DiffusionDPO
from valign.training.engine.processes import start_processes
from valign.training.tasks.preference.batches import PairSource
from valign.training.tasks.preference.pair_step import PairStep
from valign.training.tasks.preference.validation import Validator


@pytest.fixture
def validator(sd, cache):
    config = small_config()
    attach_lora(sd, rank=2)
    step = PairStep(sd, DiffusionDPO(), config, start_processes(cpu=True))
    yield Validator(step, PairSource(sd, cache, cache.rows()[:3], config), batch=3)
    unload_adapters(sd)


def test_an_untrained_adapter_has_not_drifted(validator):
    found = validator()
    assert found["drift"] == found["val_displacement"] == found["val_accuracy"] == 0
    assert_close(found["val_loss"], log(2))


def test_drift_grows_with_the_adapter_and_the_base_is_kept(validator, sd):
    validator()
    drifts = []
    for scale in (0.05, 0.1):
        with torch.no_grad():
            for name, parameter in sd.unet.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(scale)
        drifts.append(validator()["drift"])
    assert 0 < drifts[0] < drifts[1]
    assert validator()["drift"] == drifts[1]


def test_at_most_val_pairs_pairs_are_used(validator):
    assert {pair for part in validator._parts() for pair, _ in part} == {0, 1}
