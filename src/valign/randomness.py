"""Random generators by name."""

import hashlib

import numpy as np
import torch


def generator_for(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by SHA-256 of ``key``, so that neighbouring keys share nothing."""
    return torch.Generator().manual_seed(_number(key))


def numpy_generator_for(*key: str | int) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(_number(key))


def _number(key: tuple[str | int, ...]) -> int:
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
