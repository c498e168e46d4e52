"""Deep kernel machines (arXiv 2108.13097): the lines of its file, against closed forms, dense algebra and finite machines."""

from __future__ import annotations

import math
import pickle
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.integrate import quad
from torch.distributions import MultivariateNormal

from paperworks.linalg import relu_gram
from paperworks.samplers import hmc
from paperworks.uncertainty.deep_kernel_machine import (
    ActivationGram,
    Blocks,
    DeepKernelMachine,
    DeepKernelMachineClassifier,
    DeepKernelMachineRegressor,
    centres,
    collapsed_bound,
    sample_finite_dgp,
)

NOTHING = torch.zeros(0, dtype=torch.float64)


def bare(points, n_layers=1, **options):
    """A machine whose kernels are neither scaled nor shifted."""
    machine = DeepKernelMachine(
        1, torch.zeros(points, 1, dtype=torch.float64), n_layers=n_layers, jitter=0.0, learn_inducing=False, **options
    )
    with torch.no_grad():
        machine.log_b.fill_(-math.inf)
    return machine


def maximised(machine, log_likelihood, G0):
    """The objective's values on the way to its optimum over the Gram matrices, and these matrices."""
    free = [*machine.lower, *machine.log_diagonal]
    optimizer = torch.optim.LBFGS(
        free, max_iter=30, line_search_fn="strong_wolfe", tolerance_grad=1e-11, tolerance_change=1e-15
    )
    blocks, told = Blocks(G0, G0[:0], NOTHING), []

    def loss():
        optimizer.zero_grad()
        K, divergences = machine.deepened(blocks)
        found = machine.penalty(divergences) - log_likelihood(K.inducing)
        found.backward()
        return found

    for _ in range(40):
        told.append(-float(optimizer.step(loss).detach()))
    with torch.no_grad():
        found, G = [], G0
        for T in machine.factors():
            V = torch.linalg.cholesky(machine.kernel(G, G.diagonal(), G.diagonal())) @ T
            G = V @ V.T
            found.append(G)
    return told, found


def gaussian(Y, noise):
    def log_likelihood(K):
        law = MultivariateNormal(torch.zeros(len(K), dtype=torch.float64), K + noise * torch.eye(len(K)))
        return law.log_prob(Y.T).sum()

    return log_likelihood


# Line 2.
@pytest.mark.parametrize("n_layers", [1, 3])
def test_linear_machines_go_from_the_inputs_to_the_targets_in_equal_steps(n_layers):
    generator = torch.Generator().manual_seed(0)
    A, Y = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in "ab")
    G0, S = A @ A.T / 6, Y @ Y.T / 6
    _, grams = maximised(bare(3, n_layers, kernel="linear", nu=6.0), gaussian(Y, 0.0), G0)
    values, vectors = torch.linalg.eig(torch.linalg.solve(G0, S))
    for layer, G in enumerate(grams, start=1):
        power = (vectors @ torch.diag(values ** (layer / (n_layers + 1))) @ torch.linalg.inv(vectors)).real
        assert torch.allclose(G, G0 @ power, atol=2e-4)


@pytest.mark.parametrize(("nu", "optimum"), [(1.0, 2.0), (2.0, 1.68614066), (0.5, 2.37228132)])
def test_a_single_linear_number_solves_its_quadratic(nu, optimum):
    one = torch.ones(1, 1, dtype=torch.float64)
    _, (G,) = maximised(bare(1, kernel="linear", nu=nu), gaussian(2 * one, 0.0), one)
    assert float(G) == pytest.approx(optimum, abs=1e-6)


# Line 3, and what line 7 says of the way and of nu.
def test_reference_optima_of_three_points():
    X = torch.tensor([[1.0, 0], [0, 1], [1, 1]], dtype=torch.float64)
    y, G0 = torch.tensor([[1.0], [-1], [0.5]], dtype=torch.float64), X @ X.T / 2 + 0.1 * torch.eye(3)
    at_start = float(gaussian(y, 0.1)(relu_gram(relu_gram(G0, G0.diagonal(), G0.diagonal()), *[G0.diagonal()] * 2)))
    assert at_start == pytest.approx(-4.667343, abs=1e-6)
    ends = []
    for nu, optimum in ((1.0, -3.939354), (10.0, -4.503340), (1e4, -4.667138)):
        told, (G,) = maximised(bare(3, nu=nu), gaussian(y, 0.1), G0)
        assert told[-1] == pytest.approx(optimum, abs=2e-6)
        assert all(later >= earlier - 1e-10 for earlier, later in pairwise(told))
        assert bool((torch.linalg.eigvalsh(G) > 0).all())
        ends.append(told[-1])
        if nu == 1.0:
            expected = [[0.7263, -0.1680, 0.4740], [-0.1680, 0.6032, 0.1133], [0.4740, 0.1133, 0.5809]]
            assert torch.allclose(G, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
    assert ends == sorted(ends, reverse=True)
    assert torch.allclose(G, relu_gram(G0, G0.diagonal(), G0.diagonal()), atol=2e-4)


def dense(machine, noise, X, y, new):
    """Predictions by the products of all rows together, one by one as the paper has them."""
    both = torch.cat([X, new])
    with torch.no_grad():
        scale = machine.log_scales.exp() / X.shape[1] ** 0.5
        G = (both * scale) @ (both * scale).T + machine.log_bias.exp()
        n = len(X)
        for layer, T in enumerate(machine.factors()):
            K = machine.log_w[layer].exp() * machine.kernel(G, G.diagonal(), G.diagonal()) + machine.log_b[layer].exp()
            C = torch.linalg.cholesky(K[:n, :n])
            inside = C @ T @ T.T @ C.T
            B = torch.linalg.solve(K[:n, :n], K[:n, n:]).T
            rest = K[n:, n:] - B @ K[:n, n:]
            G = torch.cat([torch.cat([inside, inside @ B.T], 1), torch.cat([B @ inside, rest + B @ inside @ B.T], 1)])
        K = machine.log_w[-1].exp() * machine.kernel(G, G.diagonal(), G.diagonal()) + machine.log_b[-1].exp()
        weights = torch.linalg.solve(K[:n, :n] + noise * torch.eye(n), K[:n, n:]).T
        return weights @ y, K[n:, n:] - weights @ K[:n, n:], gaussian(y, noise)(K[:n, :n])


def made(n=14, seed=0):
    random = np.random.default_rng(seed)
    # In the order in which a fit has them.
    X = random.normal(size=(n, 3))
    X = X[X[:, 0].argsort()]
    return X, np.sin(X.sum(1)) + 0.1 * random.normal(size=n), random.normal(size=(5, 3))


# Line 4.
@pytest.mark.parametrize("nu", [math.inf, 2.0, (1.0, 20.0)])
@pytest.mark.parametrize("kernel", ["relu", "erf", "rbf"])
def test_the_full_machine_is_dense_algebra_and_with_infinite_nu_the_nngp(nu, kernel):
    X, y, new = made()
    model = DeepKernelMachineRegressor(2, nu=nu, kernel=kernel, max_iter=25, lr=0.05).fit(X, y)
    rows, more = model._features(X), model._features(new)
    z = torch.from_numpy((y - y.mean()) / y.std())[:, None]
    mean, covariance, evidence = dense(model._layers, model.noise_, rows, z, more)
    found, std = model.predict(new, return_std=True)
    assert found == pytest.approx(mean[:, 0].numpy() * y.std() + y.mean(), abs=1e-5)
    assert std == pytest.approx(np.sqrt(covariance.diagonal().numpy() + model.noise_) * y.std(), rel=1e-5)
    together = model._together(more, False)[1]
    assert torch.allclose(together, covariance, atol=1e-5)
    K, divergences = model._layers(rows)
    bound = collapsed_bound(K, z, torch.tensor(model.noise_, dtype=torch.float64))
    assert float(bound) == pytest.approx(float(evidence), abs=1e-4)
    # A row that is passed as another gets the row that it has.
    assert torch.allclose(K.cross, K.inducing, atol=1e-6) and torch.allclose(K.own, K.inducing.diagonal(), atol=1e-6)
    if nu == math.inf:
        assert all(float(one) == 0 for one in divergences)
    else:
        assert min(float(one) for one in divergences) > 1e-3


def test_inducing_rows_bound_the_evidence_from_below():
    X, y, _ = made(40)
    rows, z = torch.from_numpy(X), torch.from_numpy(y)[:, None]
    full = DeepKernelMachine(3, rows, n_layers=2, nu=math.inf)
    noise = torch.tensor(0.1, dtype=torch.float64)
    exact = float(collapsed_bound(full(rows)[0], z, noise))
    bounds = [
        float(collapsed_bound(DeepKernelMachine(3, rows[:P], n_layers=2, nu=math.inf)(rows)[0], z, noise))
        for P in (5, 20, 39)
    ]
    assert bounds == sorted(bounds) and bounds[-1] < exact and exact - bounds[-1] < exact - bounds[0]
    assert exact == pytest.approx(float(gaussian(z, 0.1)(full(rows)[0].inducing)), abs=1e-4)


def test_minibatches_with_explicit_values_reach_the_collapsed_bound():
    X, y, new = made(60)
    options = {"n_layers": 1, "nu": math.inf, "n_inducing": 20, "kernel": "rbf", "random_state": 1}
    whole = DeepKernelMachineRegressor(**options, max_iter=300).fit(X, y)
    parts = DeepKernelMachineRegressor(**options, batch_size=30, max_iter=800, lr=0.03).fit(X, y)
    assert parts.predict(new) == pytest.approx(whole.predict(new), abs=0.25)
    # With the best values at the inducing rows, in closed form, both bounds are one, and with others explicit ones are lower.
    rows, z = whole._features(X), torch.from_numpy((y - y.mean()) / y.std())[:, None]
    K, noise, jitter = whole._layers(rows)[0], torch.tensor(whole.noise_, dtype=torch.float64), whole._layers.jitter
    exact = float(collapsed_bound(K, z, noise, jitter))
    assert float(whole._values.bound(K, z, noise, jitter)) == pytest.approx(exact, abs=1e-6)
    halves = [(Blocks(K.inducing, K.cross[part], K.own[part]), z[part]) for part in (slice(0, 30), slice(30, 60))]
    each = [float(whole._values.bound(*half, noise, jitter, 2.0)) for half in halves]
    assert np.mean(each) == pytest.approx(exact, abs=1e-6)
    with torch.no_grad():
        whole._values.mean[0] += 0.1
    assert float(whole._values.bound(K, z, noise, jitter)) < exact - 1e-3


# Line 5.
def test_wide_finite_machines_come_to_the_optimum():
    y, noise = 2.0, 0.1
    one = torch.ones(1, 1, dtype=torch.float64)
    told, (G,) = maximised(bare(1, nu=1.0, kernel="linear"), gaussian(y * one, noise), one)
    assert float(G) == pytest.approx(1.92612728, abs=1e-6)
    for width, expected in ((4, 2.03468), (64, 1.93312), (1024, 1.92657)):

        def log_density(r, N=width):
            return (N / 2 - 1) * math.log(r) - N * r / 2 + N * stats.norm(0, math.sqrt(r + noise)).logpdf(y)

        top = max(log_density(r) for r in np.linspace(0.5, 4, 400))
        moments = [
            quad(lambda r, k=k: r**k * math.exp(log_density(r) - top), 0.01, 12, limit=300, points=[1.9])[0]
            for k in (0, 1)
        ]
        assert moments[1] / moments[0] == pytest.approx(expected, abs=1e-4)


def five_points(targets, noise):
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)
    F = torch.stack([x, torch.ones(5, dtype=torch.float64)], 1)
    G0 = F @ F.T / 2 + 0.001 * torch.eye(5)
    K0 = relu_gram(G0, G0.diagonal(), G0.diagonal()) + 1e-4 * torch.eye(5)
    y = targets(x)[:, None]
    without = 2.5 * math.log(2 * math.pi)
    return K0, y, lambda K: gaussian(y, noise)(K) + without


def test_hmc_over_the_features_of_a_finite_machine_has_the_optimums_gram_matrix():
    K0, y, log_likelihood = five_points(lambda x: torch.sin(2 * x), 0.3)
    machine = bare(5, nu=1.0)
    # The first kernel is given: only what the last layer makes of G is left.
    machine.kernel = lambda K, rows, columns: K if K.data_ptr() == K0.data_ptr() else relu_gram(K, rows, columns)
    told, (G,) = maximised(machine, log_likelihood, K0)
    assert told[-1] == pytest.approx(-3.323754, abs=1e-5)
    width, C = 64, torch.linalg.cholesky(K0)

    def log_density(flat):
        F = C @ flat.reshape(-1, 5, width)
        own = F @ F.mT / width
        each = own.diagonal(dim1=1, dim2=2)
        K = relu_gram(own, each, each) + 0.3 * torch.eye(5)
        law = MultivariateNormal(torch.zeros(5, dtype=torch.float64), K)
        return width * law.log_prob(y[:, 0]) - flat.square().sum(1) / 2

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(12, 5 * width, generator=generator, dtype=torch.float64)
    chains = hmc(log_density, start, draws=150, burn_in=150, path_length=1.0, generator=generator)
    F = C @ chains.flat.reshape(-1, 5, width)
    mean = (F @ F.mT / width).mean(0)
    assert float((mean - G).norm() / G.norm()) < 0.05
    assert float((mean - K0).norm() / K0.norm()) > 0.1


# Line 6.
def test_relu_machines_have_several_optima_and_restarts_find_the_best():
    K0, _, log_likelihood = five_points(lambda x: 1.5 * torch.sin(2 * x), 0.1)
    ends = []
    for start in range(12):
        machine = bare(5, nu=1.0)
        machine.kernel = lambda K, rows, columns: K if K.data_ptr() == K0.data_ptr() else relu_gram(K, rows, columns)
        random = torch.Generator().manual_seed(start)
        for one in [*machine.lower, *machine.log_diagonal]:
            one.data += 0.7 * torch.randn(one.shape, generator=random, dtype=torch.float64)
        ends.append(maximised(machine, log_likelihood, K0)[0][-1])
    assert max(ends) == pytest.approx(-11.8422, abs=2e-4)
    assert any(end == pytest.approx(-12.0496, abs=2e-4) for end in ends)
    X, y, _ = made()
    options = {"n_layers": 1, "nu": 1.0, "max_iter": 40}
    once, often = (DeepKernelMachineRegressor(**options, n_restarts=n).fit(X, y) for n in (1, 4))
    assert often.objective_[-1] >= once.objective_[-1]


def test_the_kernel_of_any_activation_by_quadrature(tmp_path):
    G = torch.tensor([[1.0, 0.5, -0.7], [0.5, 2.0, 0.3], [-0.7, 0.3, 0.8]], dtype=torch.float64)
    tanh = ActivationGram(torch.tanh)(G, G.diagonal(), G.diagonal())
    f = (
        torch.randn(400_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        @ torch.linalg.cholesky(G).T
    )
    assert torch.allclose(tanh, torch.tanh(f).T @ torch.tanh(f) / len(f), atol=5e-3)
    assert torch.allclose(tanh, tanh.T, atol=1e-6)
    X, y, new = made()
    model = DeepKernelMachineRegressor(1, nu=10.0, kernel=ActivationGram(torch.tanh, 12), max_iter=20).fit(X, y)
    assert np.isfinite(model.predict(new)).all()
    with pytest.raises(ValueError, match="is code"):
        model.save_pretrained(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(new), model.predict(new))


def test_finite_machines_have_the_kernel_below_as_their_mean_gram_matrix():
    X = torch.tensor([[1.0, 0.2], [-0.5, 1.0], [0.3, 0.3]], dtype=torch.float64)
    first, second = sample_finite_dgp(X, 200_000, 2, generator=torch.Generator().manual_seed(0))
    G = X @ X.T / 2
    for F in (first, second):
        G = relu_gram(G, G.diagonal(), G.diagonal())
        assert torch.allclose(F @ F.T / F.shape[1], G, atol=0.02)


def test_representations_move_with_the_labels_and_nu_is_chosen_by_what_is_left_out():
    random = np.random.default_rng(0)
    X = random.normal(size=(80, 2))
    y = np.sign(X[:, 0]) + 0.05 * random.normal(size=80)
    model = DeepKernelMachineRegressor(1, n_inducing=25, max_iter=80, lr=0.05).fit(X, y)
    assert model.nu_ in (1.0, 10.0, 30.0, 100.0, 300.0)
    free, fixed = (DeepKernelMachineRegressor(1, nu=nu, max_iter=120, lr=0.05).fit(X, y) for nu in (1.0, math.inf))

    def alignment(one):
        sides = np.sign(one.inducing_[:, 0] * one.feature_scale_[0] + one.feature_mean_[0])
        G, alike = one.gram_matrices_[1], np.outer(sides, sides)
        return (G * alike).sum() / np.linalg.norm(G) / np.linalg.norm(alike)

    assert alignment(free) > alignment(fixed) + 0.02
    assert free.objective_[-1] > fixed.objective_[-1]


def test_several_targets_and_constant_ones():
    X, y, new = made(30)
    Y = np.stack([y, 3 - 2 * y, np.full(30, 4.0)], 1)
    model = DeepKernelMachineRegressor(1, nu=10.0, max_iter=30).fit(X, Y)
    mean, std = model.predict(new, return_std=True)
    assert mean.shape == std.shape == (5, 3) and mean[:, 1] == pytest.approx(3 - 2 * mean[:, 0], abs=1e-6)
    assert mean[:, 2] == pytest.approx(4.0, abs=1e-9)
    assert model.sample_y(new, 7).shape == (5, 3, 7) and model.predict_quantiles(new, [0.1, 0.9]).shape == (5, 3, 2)
    assert model.log_predictive_density(new, mean).shape == (5,)
    with pytest.raises(ValueError, match="3 targets"):
        model.log_predictive_density(new, mean[:, :2])
    with pytest.raises(ValueError, match="fit each by itself"):
        model.as_botorch()


def test_as_a_botorch_model():
    X, y, new = made(20)
    model = DeepKernelMachineRegressor(1, nu=10.0, max_iter=30).fit(X, 50 + 9 * y)
    places = torch.from_numpy(np.stack([new, new + 1])).requires_grad_()
    posterior = model.as_botorch().posterior(places, observation_noise=True)
    mean, std = model.predict(new, return_std=True)
    assert posterior.mean[0, :, 0].detach().numpy() == pytest.approx(mean)
    assert posterior.variance[0, :, 0].detach().numpy() == pytest.approx(std**2, rel=1e-6)
    posterior.rsample(torch.Size([3])).sum().backward()
    assert bool(places.grad.isfinite().all())
    drawn = model.sample_y(new, 20_000, random_state=0)
    assert np.corrcoef(drawn[0], drawn[1])[0, 1] == pytest.approx(float(
        posterior.distribution.covariance_matrix[0, 0, 1] / std[0] / std[1]
    ), abs=0.03)  # fmt: skip


def test_a_classifier_learns_and_its_nu_may_be_infinite():
    random = np.random.default_rng(0)
    X = random.normal(size=(90, 2))
    y = (X[:, 0] * X[:, 1] > 0).astype(int)
    options = {"n_layers": 1, "n_inducing": 20, "max_iter": 150, "lr": 0.05}
    for nu in (10.0, math.inf):
        model = DeepKernelMachineClassifier(**options, nu=nu).fit(X, y)
        assert model.objective_[-1] > model.objective_[0] and model.score(X, y) > 0.85
    batched = DeepKernelMachineClassifier(**options, nu=10.0, batch_size=30).fit(X, y)
    assert batched.score(X, y) > 0.8


@pytest.mark.parametrize(("options", "told"), [
    ({"n_layers": 0}, "n_layers"), ({"nu": -1.0}, "nu is"), ({"nu": (1.0, 2.0, 3.0)}, "nu is"), ({"nu": "best"}, "nu is"),
    ({"kernel": "cubic"}, "kernel is"), ({"lr": 0.0}, "lr"), ({"noise": 0.0}, "noise"), ({"batch_size": 0}, "batch_size"),
    ({"n_inducing": 0}, "n_inducing"), ({"n_restarts": 0}, "n_restarts"),
])  # fmt: skip
def test_what_cannot_be_is_refused(options, told):
    X, y, _ = made()
    with pytest.raises(ValueError, match=told):
        DeepKernelMachineRegressor(**options).fit(X, y)


def test_one_nu_is_for_all_layers_however_it_is_given():
    X, y, new = made()
    first = DeepKernelMachineRegressor(2, nu=10.0, max_iter=5).fit(X, y)
    for nu in ([10.0], (10.0, 10.0), np.array([10.0, 10.0])):
        model = DeepKernelMachineRegressor(2, nu=nu, max_iter=5).fit(X, y)
        assert len(model.gram_matrices_) == 3 and np.array_equal(model.predict(new), first.predict(new))
    for options in ({"n_layers": 0}, {"nu": -1.0}, {"n_layers": 2, "nu": (1.0, 2.0, 3.0)}):
        with pytest.raises(ValueError, match="n_layers is at least 1"):
            DeepKernelMachine(2, torch.eye(2, dtype=torch.float64), **options)


def test_nu_is_that_which_predicts_best_what_was_left_out():
    X, y, _ = made(40)
    model = DeepKernelMachineRegressor(1, nus=(1.0, 10.0, 100.0), max_iter=3)
    rows, targets = torch.from_numpy(X), torch.from_numpy(y)[:, None]
    tried = []
    model._best = lambda X, y, nu, random: tried.append((nu, len(X)))
    scores = iter([0.1, 0.9, 0.4])
    chosen = model._chosen(rows, targets, np.random.RandomState(0), lambda X, y: next(scores))
    assert chosen == 10.0 and tried == [(1.0, 36), (10.0, 36), (100.0, 36)]
    # Too few to leave some out: as near to the prior as may be.
    assert model._chosen(rows[:10], targets[:10], np.random.RandomState(0), lambda X, y: 0.0) == 100.0


def test_other_starts_are_representations_at_random_and_the_first_is_none():
    X, y, _ = made()
    model = DeepKernelMachineRegressor(2, nu=5.0)
    first, other = (model._machine(torch.from_numpy(X), np.random.RandomState(0), 5.0, restart) for restart in (0, 1))
    assert all(torch.equal(T, torch.eye(14, dtype=torch.float64)) for T in first.factors())
    assert all(float((T - torch.eye(14)).abs().max()) > 0.1 for T in other.factors())


def test_options_that_are_given_are_kept_to():
    X, y, new = made(30)
    fixed = DeepKernelMachineRegressor(1, nu=10.0, max_iter=10, noise=0.3, learn_noise=False).fit(X, y)
    assert fixed.noise_ == pytest.approx(0.3, abs=1e-5)
    assert DeepKernelMachineRegressor(1, nu=10.0, max_iter=10, noise=0.3).fit(X, y).noise_ != pytest.approx(
        0.3, abs=1e-3
    )
    labels = y > 0
    options = {"n_layers": 1, "nu": 10.0, "n_inducing": 8, "max_iter": 5}
    one, many = (
        DeepKernelMachineClassifier(**options, n_pred_samples=n).fit(X, labels).predict_proba(new) for n in (1, 2000)
    )
    assert np.abs(one - many).max() > 0.01
    with pytest.raises(ValueError, match="10,000 rows"):
        fixed.sample_y(np.zeros((10_001, 3)))
    before = fixed.predict(new, return_std=True)
    fixed.set_params(noise=5.0, nu=1.0, kernel="rbf")
    assert np.array_equal(fixed.predict(new, return_std=True), before)


def test_inducing_rows_begin_at_centres_of_what_lies_together():
    random = np.random.RandomState(0)
    X = torch.from_numpy(np.concatenate([random.normal(size=(50, 2)), 30 + random.normal(size=(50, 2))]))
    found = centres(X, 2, random)
    means = torch.stack([X[:50].mean(0), X[50:].mean(0)])
    assert torch.allclose(found[found[:, 0].argsort()], means, atol=0.5) or len(found.unique(dim=0)) == 2


def test_the_classifiers_objective_is_the_bound_that_it_says():
    random = np.random.default_rng(0)
    X = random.normal(size=(40, 2))
    y = (X[:, 0] > 0).astype(int)
    options = {"n_layers": 1, "nu": 7.0, "n_inducing": 10, "lr": 1e-4, "n_samples": 400}
    for batch, steps in ((None, 30), (10, 200)):
        model = DeepKernelMachineClassifier(**options, batch_size=batch, max_iter=steps).fit(X, y)
        with torch.no_grad():
            # Away from the start, where divergences are none.
            model._values.mean += 0.3 * torch.randn(
                model._values.mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
        rows = model._features(X)
        K, (divergence,) = model._layers(rows)
        mean, variance = model._values.moments(K, model._layers.jitter)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(20_000, 40, 2, generator=generator, dtype=torch.float64)
        fitted = (
            (mean + variance.sqrt()[:, None] * noise)
            .log_softmax(-1)[:, torch.arange(40), torch.from_numpy(y)]
            .mean(0)
            .sum()
        )
        m, S = model._values.mean, model._values.factor() @ model._values.factor().T
        of_values = sum((torch.trace(S) - torch.logdet(S) - 10 + m[:, c] @ m[:, c]) / 2 for c in range(2))
        told = model._objective(
            model._layers, model._values, rows, torch.from_numpy(y), torch.Generator().manual_seed(2)
        )
        every = torch.arange(40)
        halves = [told(part) for part in every.split(20)]
        expected = float(fitted - of_values - 7.0 * divergence)
        assert float(told(every)) == pytest.approx(expected, abs=0.8)
        assert float(sum(halves)) / 2 == pytest.approx(expected, abs=1.2)
