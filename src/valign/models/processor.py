"""What the processor can do by itself, and need not be taught by slow code: twenty to fifty times slower, where it was measured."""

from functools import cache
from typing import Any

import torch


@cache
def able(*features: str) -> bool:
    """Whether the processor has one of ``features``, as torch names them (``avx512_vnni``); False where torch does not tell."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions lack it
    return any(found.get(feature, False) for feature in features)
