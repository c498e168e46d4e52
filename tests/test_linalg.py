"""Linear algebra, against sampling, finite differences and float64."""

from __future__ import annotations

import pytest
import torch
from linear_operator.utils.errors import NanError, NotPSDError
from torch.autograd import gradcheck, gradgradcheck

from paperworks.linalg import cholesky, erf_gram, relu_gram


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_a_factor_is_one_whatever_the_scale(scale):
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    K = scale * A @ A.mT
    assert torch.allclose(cholesky(K) @ cholesky(K).mT, K, rtol=1e-10)
    assert torch.allclose(cholesky(K), torch.linalg.cholesky(K), rtol=1e-8)
    # Of rank one: rounding leaves it indefinite, or just not.
    a = torch.linspace(1, 2, 40, dtype=torch.float64)
    singular = scale * torch.outer(a, a)
    with pytest.warns(match="jitter"):
        factor = cholesky(singular)
    assert torch.allclose(factor @ factor.mT, singular, rtol=1e-4)
    stiff = cholesky(singular, 1e-3)
    assert torch.allclose(stiff @ stiff.mT, singular + 1e-3 * singular.diagonal().mean() * torch.eye(40), rtol=1e-8)


def test_what_has_no_factor_is_told():
    with pytest.raises(NanError):
        cholesky(torch.full((2, 2), torch.nan))
    with pytest.raises(NotPSDError), pytest.warns(match="jitter"):
        cholesky(torch.diag(torch.tensor([1.0, -1.0])))


@pytest.mark.parametrize(("gram", "phi", "share"), [(relu_gram, torch.relu, 2), (erf_gram, torch.erf, 1)])
def test_products_of_wide_layers_are_expectations(gram, phi, share):
    generator = torch.Generator().manual_seed(0)
    G = torch.tensor([[1.0, 0.5, -0.8], [0.5, 2.0, 0.1], [-0.8, 0.1, 1.5]], dtype=torch.float64)
    f = torch.randn(400_000, 3, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(G).T
    sampled = share * phi(f).T @ phi(f) / len(f)
    assert torch.allclose(gram(G, G.diagonal(), G.diagonal()), sampled, atol=1e-2)
    part = gram(G[:2, 1:], G.diagonal()[:2], G.diagonal()[1:])
    assert torch.equal(part, gram(G, G.diagonal(), G.diagonal())[:2, 1:])
    assert gradcheck(lambda K, rows, columns: gram(K, rows, columns), tuple(
        one.clone().requires_grad_() for one in (G[:2, 1:] * 0.7, G.diagonal()[:2], G.diagonal()[1:])
    ))  # fmt: skip
    assert gradgradcheck(lambda K, rows, columns: gram(K, rows, columns), tuple(
        one.clone().requires_grad_() for one in (G[:2, 1:] * 0.7, G.diagonal()[:2], G.diagonal()[1:])
    ))  # fmt: skip


# Paper 1 (arXiv 2108.13097), line 1.
def test_relu_gram_of_the_papers_matrix_and_of_equal_rows():
    G = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=torch.float64)
    K = relu_gram(G, G.diagonal(), G.diagonal())
    assert float(K[0, 1]) == pytest.approx(0.7286, abs=5e-5)
    assert torch.allclose(K.diagonal(), G.diagonal(), rtol=1e-12)
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [-1.0, -2.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    G = x @ x.T
    K = relu_gram(G, G.diagonal(), G.diagonal())
    assert torch.allclose(K[0, :2], torch.full((2,), 5.0, dtype=torch.float64)) and float(K[0, 2]) == pytest.approx(
        0, abs=1e-7
    )
    (slope,) = torch.autograd.grad(K[0, 1], x)
    # Of equal rows K is G, whose gradient in either row is the other.
    assert torch.allclose(slope[0], x[1]) and torch.allclose(slope[1], x[0]) and not slope[2:].any()
