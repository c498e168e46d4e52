"""Samplers, against posteriors that are known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from paperworks.nn import FlatNetwork
from paperworks.samplers import Chains, _leapfrogs, _slope, hmc, nuts, sghmc


def regression(rows=40, noise=0.1, seed=0):
    """Features, targets, and the posterior's mean and covariance under weights of N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(rows, 2, generator=generator, dtype=torch.float64)
    y = X @ torch.tensor([0.7, -1.2], dtype=torch.float64)
    y += math.sqrt(noise) * torch.randn(rows, generator=generator, dtype=torch.float64)
    covariance = torch.linalg.inv(X.T @ X / noise + torch.eye(2))
    return X, y, covariance @ X.T @ y / noise, covariance


def log_posterior(X, y, noise=0.1):
    return lambda w: -(w @ X.T - y).square().sum(1) / (2 * noise) - w.square().sum(1) / 2


@pytest.mark.parametrize("sampler", [hmc, nuts])
def test_draws_are_the_posteriors(sampler):
    X, y, mean, covariance = regression()
    options = {"generator": torch.Generator().manual_seed(1)} if sampler is hmc else {"seed": 1}
    count = 16 if sampler is hmc else 2
    # Of standard deviations near 0.05, and of periods near 0.3.
    if sampler is hmc:
        options["path_length"] = 0.15
    start = mean + 0.1 * torch.randn(count, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    chains = sampler(log_posterior(X, y), start, draws=500, burn_in=200, **options)
    assert chains.values.shape == (count, 500, 2)
    errors = covariance.diagonal().sqrt() / torch.from_numpy(chains.ess()).sqrt()
    assert bool(((chains.flat.mean(0) - mean).abs() < 4 * errors).all())
    assert torch.allclose(
        torch.cov(chains.flat.T), covariance, rtol=0.15, atol=0.1 * float(covariance.diagonal().mean())
    )
    assert (chains.r_hat() < 1.02).all()
    if sampler is hmc:
        assert 0.6 < chains.acceptance < 0.95


def test_hmc_without_data_draws_from_the_prior_of_a_network():
    network = FlatNetwork(torch.nn.Linear(2, 1).double())
    generator = torch.Generator().manual_seed(0)
    chains = hmc(
        lambda w: -w.square().sum(1) / (2 * 0.5), torch.zeros(32, network.size, dtype=torch.float64), draws=300, burn_in=150,
        path_length=math.pi / 2 * math.sqrt(0.5), generator=generator,
    )  # fmt: skip
    x = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    outputs = network(chains.flat, x)[:, 0, 0]
    assert float(outputs.var()) == pytest.approx(0.5 * (5 + 1), rel=0.08)
    thinned = outputs[::7].numpy() / math.sqrt(3)
    assert stats.kstest(thinned, "norm").pvalue > 1e-3


def test_leapfrogs_can_be_gone_back_and_keep_the_energy_to_the_square_of_the_step():
    X, y, mean, _ = regression()
    density = log_posterior(X, y)
    start, momentum = mean[None] + 0.02, torch.tensor([[0.3, -0.8]], dtype=torch.float64)
    first, slope = _slope(density, start)
    energy = float(first) - float(momentum.square().sum()) / 2
    errors = []
    for step, count in ((4e-3, 10), (2e-3, 20), (1e-3, 40)):
        place, pushed, last, turned = _leapfrogs(density, start, momentum, slope, step, count)
        errors.append(abs(float(last) - float(pushed.square().sum()) / 2 - energy))
        back, *_ = _leapfrogs(density, place, -pushed, turned, step, count)
        assert torch.allclose(back, start, atol=1e-12)
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.2) and errors[1] / errors[2] == pytest.approx(4, rel=0.2)
    small = hmc(
        density,
        start,
        draws=50,
        burn_in=0,
        step_size=1e-5,
        path_length=1e-4,
        generator=torch.Generator().manual_seed(0),
    )
    assert small.acceptance == pytest.approx(1, abs=1e-4) and small.step_size == 1e-5


def test_the_step_size_is_found_from_afar():
    density = lambda x: -(x * torch.tensor([1.0, 10.0])).square().sum(1) / 2  # noqa: E731
    for step_size in (1e-4, 5.0):
        chains = hmc(
            density,
            torch.zeros(8, 2),
            draws=200,
            burn_in=200,
            step_size=step_size,
            generator=torch.Generator().manual_seed(0),
        )
        assert 0.05 < chains.step_size < 0.3 and 0.6 < chains.acceptance < 0.97
        assert chains.flat.std(0).tolist() == pytest.approx([1, 0.1], rel=0.1)


# Paper 50 (arXiv 2011.12829), line 6.
def test_sghmc_on_minibatches_has_the_posteriors_mean_and_spread():
    X, y, mean, covariance = regression(500)
    generator = torch.Generator().manual_seed(0)

    def gradient(w):
        rows = torch.randint(500, (len(w), 32), generator=generator)
        error = torch.einsum("cbd,cd->cb", X[rows], w) - y[rows]
        return 500 / 32 * torch.einsum("cb,cbd->cd", error, X[rows]) / 0.1 + w

    start = torch.randn(128, 2, generator=generator, dtype=torch.float64)
    options = {"burn_in": 4000, "draws": 40, "thin": 50, "lr": 0.01, "generator": generator}
    chains = sghmc(gradient, start, momentum_decay=0.05, **options)
    spread = covariance.diagonal()
    assert bool(((chains.flat.mean(0) - mean).abs() < 0.15 * spread.sqrt()).all())
    assert (chains.flat.var(0) / spread).tolist() == pytest.approx([1, 1], abs=0.12)
    assert (chains.r_hat() < 1.05).all() and chains.clamped < 0.1
    # With less friction there is no noise left to add, and chains are spread too far.
    with pytest.warns(RuntimeWarning, match="left none to add"):
        loose = sghmc(gradient, start, momentum_decay=0.01, **options)
    assert loose.clamped > 0.5 and float((loose.flat.var(0) / spread).min()) > 1.15


def test_what_comes_between_steps_sees_every_position():
    seen = []
    chains = sghmc(
        lambda x: x, torch.zeros(2, 1), burn_in=3, draws=2, thin=4, lr=0.05, between=lambda step, x: seen.append((step, x)),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(11))
    assert torch.equal(seen[7][1], chains.values[:, 0])


def test_the_same_generator_gives_the_same_draws():
    for sampler, given in ((hmc, lambda x: -x.square().sum(1)), (sghmc, lambda x: 2 * x)):
        options = {"draws": 5, "burn_in": 5, "thin": 2}
        before = torch.get_rng_state()
        first, second = (
            sampler(given, torch.ones(3, 2), generator=torch.Generator().manual_seed(4), **options) for _ in "ab"
        )
        assert torch.equal(first.values, second.values) and torch.equal(before, torch.get_rng_state())


def test_chains_that_disagree_are_seen():
    values = torch.randn(4, 100, 1, generator=torch.Generator().manual_seed(0))
    assert Chains(values).r_hat()[0] < 1.05 and Chains(values).ess()[0] > 200
    assert Chains(values + torch.arange(4.0)[:, None, None]).r_hat()[0] > 1.5


@pytest.mark.parametrize(("call", "told"), [
    (lambda: hmc(lambda x: -x.sum(1), torch.zeros(3)), "chains, d"),
    (lambda: hmc(lambda x: -x.sum(1), torch.zeros(3, 2), draws=0), "draws"),
    (lambda: hmc(lambda x: -x.sum(), torch.zeros(3, 2)), "one number a chain"),
    (lambda: hmc(lambda x: x.sum(1) + math.inf, torch.zeros(3, 2)), "not finite"),
    (lambda: hmc(lambda x: -x.sum(1), torch.zeros(3, 2), target_acceptance=1.0), "target_acceptance"),
    (lambda: sghmc(lambda x: x[:, :1], torch.zeros(3, 2)), "gradient gives"),
    (lambda: sghmc(lambda x: x, torch.zeros(3, 2), momentum_decay=0.0), "momentum_decay"),
    (lambda: sghmc(lambda x: x, torch.zeros(3, 2, dtype=torch.long)), "floating-point"),
])  # fmt: skip
def test_what_cannot_be_is_refused(call, told):
    with pytest.raises(ValueError, match=told):
        call()


def test_a_chain_that_diverges_is_told():
    with pytest.raises(FloatingPointError, match="smaller lr"):
        sghmc(
            lambda x: -1e30 * x**3,
            torch.ones(2, 1),
            lr=1.0,
            burn_in=0,
            draws=50,
            thin=10,
            generator=torch.Generator().manual_seed(0),
        )


def test_many_networks_at_once_are_each_themselves():
    torch.manual_seed(0)
    module = torch.nn.Sequential(
        torch.nn.Linear(3, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    ).eval()
    module[1].running_mean.fill_(0.3)
    network, x = FlatNetwork(module), torch.randn(4, 3)
    assert torch.allclose(network(network.weights, x), module(x))
    weights = torch.randn(2, 3, network.size)
    found = network(weights, x)
    assert found.shape == (2, 3, 4, 2)
    torch.nn.utils.vector_to_parameters(weights[1, 2], module.parameters())
    assert torch.allclose(found[1, 2], module(x), atol=1e-6)
    named = network.named(weights)
    assert torch.equal(named["0.weight"][1, 2], module[0].weight) and list(named) == [
        name for name, _ in module.named_parameters()
    ]
    with pytest.raises(ValueError, match="weights"):
        network(weights[..., :-1], x)


def test_hmc_tries_both_sides_evenly():
    generator = torch.Generator().manual_seed(3)
    two = lambda x: torch.logaddexp(-(x[:, 0] - 1.5).square(), -(x[:, 0] + 1.5).square())  # noqa: E731
    chains = hmc(two, torch.ones(64, 1), draws=300, burn_in=100, path_length=3.0, generator=generator)
    assert float((chains.flat > 0).double().mean()) == pytest.approx(0.5, abs=0.05)
    assert np.isfinite(chains.ess()).all()
