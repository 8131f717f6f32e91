"""Where a network runs and in which precision, what the processor can do, and what may go wrong when weights are loaded."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from safetensors import SafetensorError

from valign.checks import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, ImportError, SafetensorError)


def choose_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device must be auto, cpu, cuda or another torch device, got {device!r}.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {device} was asked for, but this machine or this build of torch has no CUDA. Use device cpu.")
    return chosen


def choose_dtype(device: torch.device) -> torch.dtype:
    """float32 on the CPU; bfloat16, or float16 on older cards, on CUDA."""
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


@cache
def cpu_has(*features: str) -> bool:
    """Whether the processor has one of ``features``, as torch names them (``avx512_vnni``); False where torch does not tell."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older versions lack it
    return any(found.get(feature, False) for feature in features)


class _Threads:
    """How many calls hold torch to fewer threads, and how many it had before the first of them."""

    lock = threading.Lock()
    calls, before = 0, 0


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Run with ``count`` threads of torch, then with as many as before; 0 changes nothing.

    Short texts gain little from further threads, and lose much on a busy machine, where each product waits for the slowest of them.
    torch keeps the number per thread, but a new thread starts with the last one that was set anywhere: calls at the same time must
    agree on the number to go back to, and a thread that needs more should ask for `torch.get_num_threads` when it starts.
    """
    if count == 0:
        yield
        return
    with _Threads.lock:
        if _Threads.calls == 0:
            _Threads.before = torch.get_num_threads()
        _Threads.calls += 1
        before = _Threads.before
    torch.set_num_threads(count)
    try:
        yield
    finally:
        with _Threads.lock:
            _Threads.calls -= 1
            torch.set_num_threads(before)
