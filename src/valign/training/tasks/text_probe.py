"""Fit a linear probe by logistic regression: unsafe prompts of each category against harmless ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from valign.checks import UserError, check_options, option

ITERATIONS = 1000  # of L-BFGS, at most; some 20 are needed


@dataclass(frozen=True, kw_only=True)
class TextProbeConfig:
    """Options of a probe."""

    fit: float = option(
        1.0, help="weight of the errors against the squared weights (C of scikit-learn); lower is smoother", above=0
    )
    threshold: float = option(
        0.5, help="probability of harm from which a prompt is unsafe", above=0, high=1, needs={"false_alarms": (None,)}
    )
    false_alarms: float | None = option(
        None, help="set the threshold instead by this share of harmless prompts that the fit has not seen", above=0, high=0.5
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class LinearFit:
    """Logits of class ``k``: ``weight[k] . state + bias[k]``; class 0 is "harmless"."""

    weight: Float[Tensor, "class dim"]  # float32
    bias: Float[Tensor, " class"]


def fit_text_probe(
    states: Float[Tensor, "prompt dim"],
    labels: Sequence[tuple[str, ...]],
    categories: Sequence[str],
    *,
    fit: float = 1.0,
) -> LinearFit:
    """Multinomial logistic regression on standardized states, with the scaling folded into the weights.

    Minimizes ``fit * sum_i cross_entropy_i + |W|^2 / 2`` with ``W`` the weights on standardized states, in float64; a prompt of
    several categories counts for each by an equal share.

    Args:
        labels: The categories of each prompt; () for a harmless one.
        categories: Of the classes, in their order.
    Raises: UserError if a class has no prompt.
    """
    classes = ("", *categories)
    rows = [(row, classes.index(name), 1 / max(len(names), 1)) for row, names in enumerate(labels) for name in names or ("",)]
    if missing := [name or "harmless" for number, name in enumerate(classes) if number not in {kind for _, kind, _ in rows}]:
        raise UserError(
            f"fit_text_probe.labels must have a prompt of every class, got none of {', '.join(missing)}. Add some, or leave it out."
        )
    chosen, kinds, shares = (np.array(column) for column in zip(*rows, strict=True))
    values = states.double().numpy()
    scaler = StandardScaler().fit(values)
    regression = LogisticRegression(C=fit, max_iter=ITERATIONS, tol=1e-6)
    found = regression.fit(scaler.transform(values)[chosen], kinds, sample_weight=shares)
    weight, bias = found.coef_, found.intercept_
    if len(classes) == 2:  # scikit-learn keeps the logit of the second class alone
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    weight = weight / scaler.scale_
    return LinearFit(torch.from_numpy(weight).float(), torch.from_numpy(bias - weight @ scaler.mean_).float())
