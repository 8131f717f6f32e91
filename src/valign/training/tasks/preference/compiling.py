"""``torch.compile`` around the steps of a training. Validation and samples, in other batch sizes, stay as they are."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from valign.checks import UserError
from valign.models.diffusion.base import DiffusionModel
from valign.training.tasks.preference.batches import PairBatch
from valign.training.tasks.preference.pair_step import PairStep

MAX_ERROR = 0.02  # of the compiled gradient, relative; half precision differs by less, wrong code by far more


def compiled_step(
    step: PairStep, batch: PairBatch, parameters: Sequence[nn.Parameter]
) -> Callable[[], AbstractContextManager[None]]:
    """A context in which the step's U-Net runs compiled. A new shape is compiled when first met, which takes a minute or more.

    The compiled gradient of ``batch`` is held against the plain one first: compilers have been wrong.
    Raises: UserError if this machine cannot compile, or the gradients differ.
    """
    torch.compiler.reset()  # an earlier training's graphs would use up the limit of recompilations
    inside = _compiled(step.model)
    reference = step.errors(batch, reference=True)
    plain = _gradient(step, batch, reference, parameters)
    try:
        with inside():
            fast = _gradient(step, batch, reference, parameters)
    except Exception as error:
        why = " ".join(str(error).split("\n")[:2]).strip() or type(error).__name__
        raise UserError(
            f"PreferenceConfig.compile needs a compiler that torch can use (g++, or Triton on a GPU), got: {why}. "
            "Install one, or leave compile off."
        ) from error
    wrong = float((fast - plain).norm() / plain.norm())
    if not wrong <= MAX_ERROR:
        raise UserError(
            f"PreferenceConfig.compile must leave gradients as they are, got an error of {wrong:.1%}: torch compiles this model "
            "wrongly here. Leave compile off."
        )
    return inside


def _compiled(model: DiffusionModel) -> Callable[[], AbstractContextManager[None]]:
    fast: Any = torch.compile(model.denoiser, dynamic=False)

    @contextmanager
    def inside() -> Iterator[None]:
        plain, model.denoiser = model.denoiser, fast
        try:
            yield
        finally:
            model.denoiser = plain

    return inside


def _gradient(
    step: PairStep, batch: PairBatch, reference: Float[Tensor, " image"], parameters: Sequence[nn.Parameter]
) -> Float[Tensor, " number"]:
    step.backward(batch, reference, share=1 / len(batch.ids))
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([gradient.flatten().float() for gradient in found])
