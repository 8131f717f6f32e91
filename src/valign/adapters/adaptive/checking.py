"""What the adaptive methods check alike: whose state is loaded, and that their small numbers keep float32."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from valign.checks import UserError


def check_modules(method: str, saved: Collection[str], have: Collection[str], *, hint: str = "Use the same LoRA.") -> None:
    """Raises: UserError unless a state was saved for the modules that are there."""
    differing = sorted(set(saved) ^ set(have))
    if differing:
        raise UserError(f"{method}: the state was saved for other modules: {', '.join(differing[:4])}. {hint}")


def check_precision(name: str, tensors: Iterable[Tensor]) -> None:
    """Raises: TypeError for half precision, in which steps of 1e-3 and gains of 1e-5 are lost."""
    half = next((tensor.dtype for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)), None)
    if half is not None:
        raise TypeError(f"{name} must stay in float32, got {half}. Change the model's dtype before the method is made.")
