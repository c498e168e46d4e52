"""Small variational autoencoders for recipes. Losses are twice the negative ELBO with beta on the divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def _sample(mean: Tensor, log_var: Tensor, generator: torch.Generator) -> Tensor:
    return mean + (0.5 * log_var).exp() * torch.randn(mean.shape, generator=generator)


def _divergence(mean: Tensor, log_var: Tensor) -> Tensor:
    return (mean**2 + log_var.exp() - log_var - 1).sum(-1)


class VAE(nn.Module):
    """A VAE of rows (x, y) that models y given its first `condition` columns x, with fully connected ReLU layers.

    Args:
        columns: Columns of x and y together.
        latent: Latent variables.
        hidden: Sizes of the encoder's layers; the decoder has them in reverse.
        condition: Columns of x, 0 for none.
    """

    def __init__(self, columns: int, latent: int, hidden: Sequence[int], condition: int = 0) -> None:
        super().__init__()
        self.condition = condition
        self.encoder = _mlp([columns, *hidden, 2 * latent])
        self.decoder = _mlp([latent + condition, *reversed(hidden), columns - condition])

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of the posterior."""
        mean, log_var = self.encoder(rows).chunk(2, -1)
        return mean, log_var

    def loss(self, rows: Tensor, beta: float, eta_dec: float, generator: torch.Generator) -> Tensor:
        """The loss with one sample for each row."""
        x, y = rows[:, : self.condition], rows[:, self.condition :]
        mean, log_var = self.encode(rows)
        error = (y - self.decoder(torch.cat([_sample(mean, log_var, generator), x], 1))).square().sum(-1)
        return (error / eta_dec**2 + beta * _divergence(mean, log_var)).mean()


class HierarchicalVAE(nn.Module):
    """A two-level VAE x -> z1 -> z2 with a fixed posterior standard deviation of z1.

    Args:
        columns: Columns of x.
        latent: Variables of z1, and of z2.
        hidden: Size of the one hidden layer of each part.
        sigma1: Posterior standard deviation of z1.
    """

    def __init__(self, columns: int, latent: int, hidden: int, sigma1: float = 0.5) -> None:
        super().__init__()
        self.sigma1 = sigma1
        self.up1, self.up2 = _mlp([columns, hidden, latent]), _mlp([latent, hidden, 2 * latent])
        self.down2, self.down1 = _mlp([latent, hidden, latent]), _mlp([latent, hidden, columns])

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z2 at the mean of z1."""
        mean, log_var = self.up2(self.up1(rows)).chunk(2, -1)
        return mean, log_var

    def loss(self, rows: Tensor, beta1: float, beta2: float, eta_dec: float, generator: torch.Generator) -> Tensor:
        """The loss with one sample of z1 and z2 for each row."""
        mean1 = self.up1(rows)
        z1 = mean1 + self.sigma1 * torch.randn(mean1.shape, generator=generator)
        mean2, log_var2 = self.up2(z1).chunk(2, -1)
        z2 = _sample(mean2, log_var2, generator)
        error = (rows - self.down1(z1)).square().sum(-1) + beta1 * (z1 - self.down2(z2)).square().sum(-1)
        return (error / eta_dec**2 + beta2 * _divergence(mean2, log_var2)).mean()


def train(
    model: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: Tensor,
    epochs: int,
    batch: int,
    generator: torch.Generator,
    after_epoch: Callable[[int], object] = lambda epoch: None,
) -> None:
    """Minimise a loss of batches by Adam (1e-3), in place; `after_epoch` is called with the epochs done."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(epochs):
        for chosen in torch.randperm(len(rows), generator=generator).split(batch):
            optimizer.zero_grad()
            loss(rows[chosen]).backward()
            optimizer.step()
        after_epoch(epoch + 1)
    model.eval()
