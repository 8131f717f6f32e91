"""Optimizer, learning rate and the one gradient step over the factors."""

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from valign.training.tasks.preference.config import PreferenceConfig


def build_optimizer(parameters: ParamsT, config: PreferenceConfig) -> torch.optim.Optimizer:
    """AdamW (0.9, 0.999, 1e-8), or Adafactor at a fixed rate with update clipping at 1, as in the authors' launchers."""
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        clip_threshold=1.0,
        scale_parameter=False,
        relative_step=False,
    )


def rate_at(step: int, config: PreferenceConfig) -> float:
    """Learning rate of step ``step`` (from 0): linear warm-up, then constant or a cosine. A function: nothing to restore."""
    warmup = config.warmup_steps
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.decay == "none":
        return config.learning_rate
    return config.learning_rate * 0.5 * (1 + cos(pi * (step - warmup) / max(config.steps - warmup, 1)))


def flatten_gradients(parameters: Sequence[nn.Parameter], extra: Tensor) -> Tensor:
    """All gradients and ``extra`` as one float32 vector, so that processes need one sum per step."""
    zeros = (p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters)
    return torch.cat([*(gradient.flatten().float() for gradient in zeros), extra.float()])


def spread_gradients(parameters: Sequence[nn.Parameter], flat: Tensor) -> Tensor:
    """Undo `flatten_gradients`: write the gradients back, return ``extra``."""
    sizes = [parameter.numel() for parameter in parameters]
    *gradients, extra = flat.split([*sizes, len(flat) - sum(sizes)])
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.view_as(parameter)
    return extra
