"""What the optimizers here share: which parameters are matrices, adam for the rest, checks, and an exact state."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from valign.checks import check_range
from valign.optimizers.dct import Side

Groups = list[dict[str, Any]]
HEAD = {"max_dim": 1}  # no matrix is that small: a matrix optimizer uses plain Adam


class OptimizerOptions:
    """The options of an optimizer: a frozen dataclass that inherits from this, with defaults for all fields; see `OPTIMIZERS`."""

    learning_rate: float | None  # None is the adapter's

    def check_installed(self) -> None:
        """Raises: UserError if a package that it needs is missing; asked before a model is loaded."""

    def build(self, groups: Groups, head: Groups, lr: float) -> torch.optim.Optimizer:
        """The optimizer of the adapter's parameter ``groups`` at ``lr``, and of the ``head``'s, which train by AdamW."""
        raise NotImplementedError  # abstract


class MatrixOptimizer(torch.optim.Optimizer):
    """An optimizer with one rule for matrices and another for the rest. Its state keeps its own dtypes when loaded: torch casts a
    state to the parameter's, indices and bytes included."""

    def check(self, group: dict[str, Any]) -> None:
        """Raises: ValueError or TypeError for options or parameters that this optimizer cannot use."""
        raise NotImplementedError  # abstract

    def update(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> tuple[Tensor, float]:
        """``(direction, learning rate)`` of one parameter; moves its state, where ``step`` counts from 1."""
        raise NotImplementedError  # abstract

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self.check(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; gradients are left as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = dense_gradient(type(self).__name__, parameter), self.state[parameter]
                state["step"] = state.get("step", 0) + 1
                direction, lr = self.update(parameter, gradient, state, group)
                move(parameter, direction, lr=lr, decay=group["weight_decay"])
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore exactly what `state_dict` returned, on the parameters' devices."""
        super().load_state_dict(dict(state_dict))
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        for index, parameter in zip(saved, parameters, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][key] = value.to(parameter.device, copy=True) if isinstance(value, Tensor) else deepcopy(value)


def check_numbers(owner: str, **values: float) -> None:
    """Learning rates and eps above 0, weight decay from 0, betas in [0, 1)."""
    for name, value in values.items():
        if name.startswith("beta"):
            if not 0 <= value < 1:
                raise ValueError(f"{owner}.{name} must be in [0, 1), got {value!r}.")
        elif name == "weight_decay":
            check_range(f"{owner}.{name}", value, low=0)
        else:
            check_range(f"{owner}.{name}", value, above=0)


def check_parameters(owner: str, group: Mapping[str, Any], rank: int, max_dim: int) -> None:
    """Refuse integer and complex parameters and ranks above a matrix' size, naming the parameter; warn if there is no matrix."""
    names = group.get("param_names", [f"parameter {index}" for index in range(len(group["params"]))])
    for name, parameter in zip(names, group["params"], strict=True):
        if not parameter.is_floating_point():
            raise TypeError(f"{owner} must have real float parameters, got {name} in {parameter.dtype}. Freeze it.")
        if is_matrix(parameter, max_dim):
            rows, columns = as_matrix(parameter).shape
            check_range(f"{owner}.rank for {name}", rank, low=1, high=min(rows, columns), hint=f"It is {rows} x {columns}.")
    if not any(is_matrix(parameter, max_dim) for parameter in group["params"]):
        warnings.warn(f"{owner} has a parameter group without a matrix: it is plain Adam there.", stacklevel=4)


def is_matrix(parameter: Tensor, max_dim: int) -> bool:
    """Two dimensions or more (a convolution's kernel counts as fan_out x rest), none of them 1 or ``max_dim`` and above."""
    return parameter.ndim >= 2 and min(as_matrix(parameter).shape) > 1 and max(as_matrix(parameter).shape) < max_dim


def as_matrix(tensor: Tensor) -> Tensor:
    """``[fan_out, rest]``, a view where it can be."""
    return tensor.reshape(len(tensor), -1)


def goes_left(matrix: Tensor, side: Side) -> bool:
    """Whether the rows are projected: the shorter dimension is, unless a side is named."""
    return matrix.shape[0] < matrix.shape[1] if side == "auto" else side == "left"


def dense_gradient(owner: str, parameter: Tensor) -> Tensor:
    """The gradient, float32 at least. Raises: TypeError for a sparse one."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        raise TypeError(
            f"{owner} must have dense gradients, got a sparse one of {tuple(parameter.shape)}. Use torch.optim.SparseAdam."
        )
    return parameter.grad if parameter.grad.dtype == torch.float64 else parameter.grad.float()


def adam_update(state: dict[str, Any], gradient: Tensor, *, betas: tuple[float, float], eps: float) -> Tensor:
    """Adam's bias-corrected direction, to be multiplied by the learning rate; moves ``exp_avg``, ``exp_avg_sq``; ``step`` is
    set before."""
    first, second, step = *betas, state["step"]
    if "exp_avg" not in state:
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    state["exp_avg"].lerp_(gradient, 1 - first)
    state["exp_avg_sq"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
    root = sqrt(1 - second**step)
    return state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps * root) * (root / (1 - first**step))


def move(parameter: Tensor, direction: Tensor, *, lr: float, decay: float) -> None:
    """``p <- p (1 - lr decay) - lr direction``, in the direction's precision."""
    parameter.copy_(parameter.to(direction.dtype) * (1 - lr * decay) - lr * direction.view_as(parameter))


def by_rank(groups: Sequence[dict[str, Any]], rank: int) -> Groups:
    """The groups cut so that each has matrices of one rank: ``rank``, or their smaller side where that is less."""
    check_range("rank", rank, low=1)
    cut: Groups = []
    for group in groups:
        parts: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            fits = min(rank, *as_matrix(parameter).shape) if is_matrix(parameter, 2**62) else rank
            parts.setdefault(fits, []).append(parameter)
        cut += [{**group, "params": params, "rank": fits} for fits, params in sorted(parts.items(), reverse=True)]
    return cut


def build_by_rank(kind: Callable[..., MatrixOptimizer], options: Any, groups: Groups, head: Groups, lr: float) -> MatrixOptimizer:
    """A matrix optimizer of the dataclass ``options`` (which has a ``rank``), without a warning about groups of vectors alone."""
    numbers = {**asdict(options), "lr": lr}
    del numbers["learning_rate"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*parameter group without a matrix")
        return kind([*by_rank(groups, options.rank), *({**group, **HEAD} for group in head)], **numbers)
