"""Matrix products in 8 bits on the CPU: a quarter of the memory and some three times the speed of float32, where it has them.

Weights have one scale per output, activations one per row, computed on the spot; both are symmetric. Products are exact integers,
so a row's result does not depend on the rows beside it.
"""

from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from valign.models.devices import cpu_has


@dataclass(frozen=True)
class Int8Matrix:
    """``weight[out, in] ~ values[in, out].T * scale[out, None]``."""

    values: Int8[Tensor, "fan_in fan_out"]
    scale: Float[Tensor, " fan_out"]


def to_int8(weight: Float[Tensor, "fan_out fan_in"]) -> Int8Matrix:
    """Round to the nearest of 255 steps per output; the largest error is half a step, ``max|row| / 254``."""
    values, scale = _rounded(weight)
    return Int8Matrix(values.t().contiguous(), scale[:, 0])


def int8_linear(
    x: Float[Tensor, "... fan_in"], weight: Int8Matrix, bias: Float[Tensor, " fan_out"]
) -> Float[Tensor, "... fan_out"]:
    """``x @ weight.T + bias``."""
    rows, scale = _rounded(x.reshape(-1, x.shape[-1]))
    product = torch._int_mm(rows, weight.values).to(x.dtype)
    return product.mul_(scale).mul_(weight.scale).add_(bias).view(*x.shape[:-1], -1)


def _rounded(rows: Float[Tensor, "row column"]) -> tuple[Int8[Tensor, "row column"], Float[Tensor, "row 1"]]:
    scale = rows.abs().amax(dim=1, keepdim=True).clamp_(min=1e-12).div_(127)
    return rows.div(scale).round_().to(torch.int8), scale


@cache
def has_int8() -> bool:
    """Whether this processor and build of torch multiply 8-bit matrices quickly, and exactly."""
    return cpu_has("avx512_vnni", "amx_int8") and exact_int8()


@cache
def exact_int8() -> bool:
    """Whether products in 8 bits are whole numbers without loss: some processors saturate halfway."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        return False
    largest = torch.full((32, 64), 127, dtype=torch.int8)
    signs = torch.ones(64, 32, dtype=torch.int8)
    signs[::2] = -1
    try:
        return all(
            torch.equal(torch._int_mm(largest, other), largest.int() @ other.int())
            for other in (signs, largest.t().contiguous(), -largest.t().contiguous())
        )
    except (RuntimeError, AttributeError):
        return False
