"""A simulation counts what a real run would hold, and nothing is computed."""

import torch
from torch import nn

from valign.models.footprint import Unit, _Storages, materialize, simulation

WEIGHTS = 4 * (4 * 8 + 8)


def test_a_linear_layer_by_hand():
    layer = nn.Linear(4, 8, device="meta").requires_grad_(False)
    with simulation() as meter:
        materialize(layer)
        assert meter.now == WEIGHTS
        given = torch.zeros(3, 4)
        found = meter.measure(lambda: layer(given))
        assert meter.now == WEIGHTS + 4 * 3 * 4  # the answer is gone
    assert found.peak == WEIGHTS + 4 * 3 * 4 + 4 * 3 * 8
    assert found.flops == 2 * 3 * 4 * 8


def test_a_view_takes_nothing_and_what_is_dropped_does_not_count():
    with simulation() as meter:
        values = torch.zeros(1000)
        assert meter.measure(lambda: values.view(10, 100).T).peak == 4000

        def twice():
            for _ in range(2):
                values + 1

        assert meter.measure(twice).peak == 8000


def test_it_says_what_the_real_run_holds():
    """The same counting of a real training step of a small network."""

    def step(network, rows):
        network(torch.zeros(rows, 16)).square().mean().backward()

    def network(device):
        return nn.Sequential(nn.Linear(16, 64, device=device), nn.GELU(), nn.Linear(64, 16, device=device))

    sketched = network("meta")
    with simulation() as meter:
        materialize(sketched)
        simulated = meter.measure(lambda: step(sketched, 32)).peak
    real = network("cpu")
    with _Storages() as counted:
        for parameter in real.parameters():
            counted._add(parameter.untyped_storage())
        step(real, 32)
    assert simulated == counted.peak


def test_activations_grow_with_the_rows():
    assert Unit(weights=100, activations=7, flops=1.0).peak(3) == 121
