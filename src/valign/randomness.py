"""Random generators by name."""

import hashlib

import torch


def generator_for(*key: str | int) -> torch.Generator:
    """A CPU generator seeded by SHA-256 of ``key``, so that neighbouring keys share nothing."""
    digest = hashlib.sha256("\0".join(map(str, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
