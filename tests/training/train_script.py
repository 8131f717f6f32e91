"""Run by the tests in a process of its own: ``MODEL DATA OUT [KILL_AT]``; SIGKILL right after the metrics of step KILL_AT."""

import os
import signal
import sys
from pathlib import Path

import torch
from pair_data import small_config

from valign.data.images.latents import open_latents
from valign.models.diffusion.loading import load_model
from valign.objectives import DiffusionDPO
from valign.training import train_preference
from valign.training.engine.metrics import MetricsLog

CONFIG = {"steps": 8, "checkpoint_every": 2, "validate_every": 4, "sft_weight": 1.0, "winner_safeguard": 0.9}


def main(model, data, out, kill_at=0):
    torch.set_num_threads(1)
    append = MetricsLog.append

    def append_and_die(log, record):
        append(log, record)
        if record["step"] == int(kill_at):
            os.kill(os.getpid(), signal.SIGKILL)

    MetricsLog.append = append_and_die
    cache = open_latents(Path(data))
    loaded = load_model(model, device="cpu")
    train_preference(loaded, cache, cache.rows(), Path(out), small_config(**CONFIG), DiffusionDPO(beta=500.0))


if __name__ == "__main__":
    main(*sys.argv[1:])
