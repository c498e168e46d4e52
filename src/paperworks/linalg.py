"""Linear algebra of Gaussian processes and wide networks that several rooms need."""

from __future__ import annotations

import math
from typing import Any

import torch
from linear_operator.utils.cholesky import psd_safe_cholesky
from linear_operator.utils.errors import NanError, NotPSDError
from torch import Tensor

__all__ = ["NanError", "NotPSDError", "cholesky", "erf_gram", "relu_gram"]


def cholesky(K: Tensor, jitter: float = 0.0) -> Tensor:
    """Lower Cholesky factor of positive definite matrices (..., n, n).

    Where rounding leaves one that is not positive definite, jitter is added to its diagonal: 1e-8 of the mean diagonal in
    float64, 1e-6 in float32, then ten and a hundred times as much, with a warning of linear_operator.

    Args:
        K: The matrices; only their lower triangles are read.
        jitter: Added at once, in shares of the mean diagonal.

    Raises:
        NanError: NaN in a matrix.
        NotPSDError: One that is not positive definite with that much jitter either.

    Example:
        >>> cholesky(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        tensor([[1.4142, 0.0000],
                [0.7071, 1.2247]])
    """
    scale = K.diagonal(dim1=-2, dim2=-1).mean(-1).detach()[..., None, None]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    K = K / scale
    if jitter:
        K = K + jitter * torch.eye(K.shape[-1], dtype=K.dtype, device=K.device)
    factor: Tensor = psd_safe_cholesky(K)
    return factor * scale.sqrt()


def relu_gram(K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What a wide layer of ReLUs makes of a kernel: 2 E[relu(f) relu(g)] of jointly normal f and g (arc-cosine, order 1).

    Twice the expectation, so that variances stay what they are. Values and gradients are finite and exact where f and g
    are the same, too.

    Args:
        K: Covariances (..., n, m) of f and g.
        rows: Variances (..., n) of f.
        columns: Variances (..., m) of g.

    Returns:
        (..., n, m).

    Example:
        >>> G = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
        >>> relu_gram(G, G.diagonal(), G.diagonal())
        tensor([[1.0000, 0.7286],
                [0.7286, 2.0000]])
    """
    product = rows[..., :, None] * columns[..., None, :]
    varied = product > 0
    # Without variance the product is 0, and whatever stands for the correlation must not spoil gradients.
    extent = torch.where(varied, product, torch.ones_like(product)).sqrt()
    found: Tensor = extent * _ArcCosine.apply(K / extent)
    return torch.where(varied, found, torch.zeros_like(found))


class _ArcCosine(torch.autograd.Function):
    """J(c) = (sqrt(1 - c^2) + (pi - arccos c) c) / pi, whose derivative, 1 - arccos(c) / pi, is finite at c = 1."""

    @staticmethod
    def forward(ctx: Any, correlation: Tensor) -> Tensor:
        ctx.save_for_backward(correlation)
        c = correlation.clamp(-1, 1)
        return ((1 - c.square()).sqrt() + (math.pi - c.arccos()) * c) / math.pi

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        # In what can be differentiated again.
        (correlation,) = ctx.saved_tensors
        return slope * (1 - correlation.clamp(-1, 1).arccos() / math.pi)


def erf_gram(K: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What a wide layer of error functions makes of a kernel: E[erf(f) erf(g)] of jointly normal f and g (arc-sine).

    Args:
        K: Covariances (..., n, m) of f and g.
        rows: Variances (..., n) of f.
        columns: Variances (..., m) of g.

    Returns:
        (..., n, m).

    Example:
        >>> G = torch.tensor([[1.0, 0.5], [0.5, 2.0]])
        >>> erf_gram(G, G.diagonal(), G.diagonal())
        tensor([[0.4646, 0.1663],
                [0.1663, 0.5903]])
    """
    extent = ((1 + 2 * rows)[..., :, None] * (1 + 2 * columns)[..., None, :]).sqrt()
    return 2 / math.pi * (2 * K / extent).arcsin()
