"""How near two computations of the same numbers come, by the arithmetic alone.

Bit-equal are weights and files, and what one process computes twice from the same inputs. Whatever
adds the same terms in another order is not: another batch, padding or split, a cache, another
number of threads or processes, another processor. Every order is as right as any other.

A product of width n adds n terms. In whatever order, the sum is off by about √n·ε of what it adds
up, where ε is the dtype's precision (2⁻²³ in fp32). A layer computes about ten such sums one after
another, and the errors of layers add. So what a model returns lies within

    10 · depth · √width · ε · scale

of what it returns elsewhere, and a gradient, which passes all layers twice, within twice that. The
scale is the largest number expected, or the size of the terms where these cancel.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

DEPTH, WIDTH = 4, 64
"""At most, of the tiny models."""


def precision(dtype: torch.dtype = torch.float32) -> float:
    """The error of a model's outputs, relative to their scale: 4e-5 of tiny models in fp32."""
    return 10 * DEPTH * math.sqrt(WIDTH) * torch.finfo(dtype).eps


def assert_close(actual: Any, expected: Any, *, scale: float | None = None) -> None:
    """Compare tensors or numbers, or mappings and lists of them, that models computed.

    Args:
        actual: what was computed in one way
        expected: what was computed in another
        scale: size of the terms that were added up; by default, that of each expected tensor
    """
    if isinstance(expected, Mapping):
        assert actual.keys() == expected.keys()
        for name, values in expected.items():
            assert_close(actual[name], values, scale=scale)
        return
    if isinstance(expected, list | tuple) and any(isinstance(part, Tensor) for part in expected):
        for one, other in zip(actual, expected, strict=True):
            assert_close(one, other, scale=scale)
        return
    actual, expected = (torch.as_tensor(values).detach() for values in (actual, expected))
    if scale is None:
        scale = float(expected.abs().max()) if expected.numel() else 0.0
    bound = precision(expected.dtype) * scale
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def assert_close_gradients(actual: Iterable[Tensor], expected: Iterable[Tensor]) -> None:
    """Compare gradients, each by the length of the difference."""
    for one, other in zip(actual, expected, strict=True):
        error, length = (torch.linalg.vector_norm(t.detach()) for t in (one - other, other))
        assert error <= 2 * precision(other.dtype) * length, f"{error / length:.1e} of {length:.1e}"
