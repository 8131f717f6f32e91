from math import log

import pytest
import torch
from pair_data import small_config
from torch.testing import assert_close

from valign.models.diffusion.lora import adapter_off, attach_lora, unload_adapters
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
            for name, parameter in sd.denoiser.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(scale)
        drifts.append(validator()["drift"])
    assert 0 < drifts[0] < drifts[1]
    assert validator()["drift"] == drifts[1]


def test_drift_is_the_squared_move_over_the_squared_error_of_the_base(validator, sd):
    with torch.no_grad():
        for name, parameter in sd.denoiser.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    draws, moved, own = validator.step.config.val_draws, 0.0, 0.0
    for pair in (0, 1):
        for place in range(draws):
            safe = validator.source.validation([(pair, place)], draws, safe_caption=True)
            noisy, target = safe.noisy[:1], safe.target[:1]  # the winner
            with torch.no_grad():
                policy = sd.predict(noisy, safe.timesteps, safe.conditioning)
                with adapter_off(sd):
                    base = sd.predict(noisy, safe.timesteps, safe.conditioning)
            moved += float((policy - base).double().square().sum())
            own += float((base - target).double().square().sum())
    assert_close(validator()["drift"], moved / own, rtol=1e-4, atol=0)


def test_at_most_val_pairs_pairs_are_used(validator, monkeypatch):
    seen, validation = set(), validator.source.validation

    def noted(places, *args, **options):
        seen.update(pair for pair, _ in places)
        return validation(places, *args, **options)

    monkeypatch.setattr(validator.source, "validation", noted)
    validator()
    assert seen == {0, 1}
