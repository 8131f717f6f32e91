"""Image pairs, value images, and their cached latents."""

import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def __getattr__(name: str) -> Any:
    """What `valign.data.images` held when it was a module. Goes with version 0.2, as the paths in `valign.moved` do."""
    if name.startswith("__") or find_spec(f"{__name__}.{name}"):  # the latter: the import system asks before it looks for modules
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    pairs = import_module("valign.data.images.pairs")
    if not hasattr(pairs, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"{__name__}.{name} is now {pairs.__name__}.{name}. The old path goes with version 0.2.", DeprecationWarning, 2)
    return getattr(pairs, name)
