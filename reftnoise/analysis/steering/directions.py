r"""From states of two classes to a vector: differences of means, along a direction or whole."""

import torch
from jaxtyping import Float
from torch import Tensor

from .options import Method

_STEPS, _TOLERANCE = 500, 1e-7


def steering_vector(
    method: Method,
    positive: Float[Tensor, "pairs hidden"],
    negative: Float[Tensor, "pairs hidden"],
) -> Float[Tensor, " hidden"]:
    r"""The vector of a method from the states of pairs, as `fit_steering_vectors` says."""
    mean = (positive - negative).mean(0)
    if method == "mean":
        return mean
    if method == "pca":
        direction = torch.linalg.svd(positive - negative, full_matrices=False).Vh[0]
    else:
        direction = probe_direction(positive, negative)
    return (mean @ direction) * direction


def probe_direction(
    positive: Float[Tensor, "pairs hidden"], negative: Float[Tensor, "pairs hidden"]
) -> Float[Tensor, " hidden"]:
    r"""The unit normal of the plane by which logistic regression parts the states.

    $\min_{w,b} \sum_i \log(1 + e^{-y_i(w^\top x_i + b)}) + \tfrac12\|w\|^2$ over the states of both
    classes, $y_i = \pm 1$, where x are the states without their mean, divided by one number so that
    their coordinates have a mean square of 1: the direction does not depend on the unit in which
    states are measured, nor on the axes.
    """
    with torch.inference_mode(False), torch.enable_grad():
        states = torch.cat([positive, negative]).double().clone()
        centred = states - states.mean(0)
        rms = centred.square().mean().sqrt()
        if not rms:
            return torch.zeros_like(positive[0])
        inputs = centred / rms
        labels = torch.ones(len(states), dtype=torch.double, device=states.device)
        labels[len(positive) :] = -1
        weights = torch.zeros(states.shape[1] + 1, dtype=torch.double, device=states.device)
        weights.requires_grad_()
        optimizer = torch.optim.LBFGS(
            [weights],
            max_iter=_STEPS,
            tolerance_grad=_TOLERANCE,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            margins = labels * (inputs @ weights[:-1] + weights[-1])
            value = torch.nn.functional.softplus(-margins).sum() + weights[:-1].square().sum() / 2
            value.backward()  # type: ignore[no-untyped-call]  # torch's
            return value

        optimizer.step(loss)  # type: ignore[no-untyped-call]  # torch's
        normal = weights.detach()[:-1]
    return (normal / normal.norm()).to(positive)
