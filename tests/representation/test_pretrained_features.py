"""Pretraining by maximum likelihood, then empirical risk minimisation (arXiv 2303.01566)."""

from __future__ import annotations

import inspect
import math
import warnings
from itertools import permutations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from scipy.optimize import minimize
from scipy.stats import multivariate_normal, norm, ortho_group
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.dummy import DummyRegressor
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import mean_squared_error
from sklearn.model_selection import KFold, RepeatedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import nn

from paperworks.representation import (
    ComponentTable,
    ContrastiveModel,
    FactorModel,
    Informativeness,
    MixtureModel,
    PretrainedFeatures,
    PretrainingReport,
    compare_pretraining,
    contrastive_loss,
    informativeness,
    pretraining_gain,
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def factors(random, m, B, beta):
    """Samples (m, d) and targets of the factor model with unit noise."""
    z = random.normal(size=(m, B.shape[1]))
    return z @ B.T + random.normal(size=(m, len(B))), z @ beta + 0.3 * random.normal(size=m)


def clusters(random, m, means):
    """Samples of the mixture, and labels that go by the component's parity."""
    z = random.integers(len(means), size=m)
    return means[z] + random.normal(size=(m, means.shape[1])), np.array(["even", "odd"])[z % 2]


def compared(random, m, theta):
    """Pairs of the contrastive model."""
    x, other = random.normal(size=(2, m, theta.shape[1]))
    chance = 1 / (1 + np.exp(-((x @ theta.T) * (other @ theta.T)).sum(1)))
    return x, other, (random.random(m) < chance).astype(int)


def test_1_factor_likelihood_is_not_below_that_of_a_gradient_fit(random):
    X, _ = factors(random, 80, random.normal(size=(6, 2)), np.ones(2))
    model = FactorModel(2).fit(X)
    data = torch.from_numpy(X - X.mean(0))
    B = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_variance = torch.zeros((), dtype=torch.float64, requires_grad=True)

    def likelihood():
        covariance = B @ B.T + log_variance.exp() * torch.eye(6, dtype=torch.float64)
        return (
            torch.distributions.MultivariateNormal(torch.zeros(6, dtype=torch.float64), covariance)
            .log_prob(data)
            .mean()
        )

    optimiser = torch.optim.LBFGS(
        [B, log_variance], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        (-likelihood()).backward()
        return -likelihood()

    optimiser.step(closure)
    reached = float(likelihood().detach())
    assert reached - 1e-6 <= model.score(X) <= reached + 1e-6
    assert model.noise_variance_ == pytest.approx(float(log_variance.detach().exp()), rel=1e-4)
    outer = (B @ B.T).detach().numpy()
    assert np.allclose(model.loadings_ @ model.loadings_.T, outer, atol=1e-3)
    assert not np.allclose(model.loadings_, B.detach().numpy(), atol=0.1)
    assert model.score(X) >= PCA(2).fit(X).score(X)


def test_1_factor_density_and_posterior_are_those_of_the_gaussian(random):
    X, _ = factors(random, 40, random.normal(size=(5, 2)), np.ones(2))
    model = FactorModel(2, noise_variance=0.7).fit(X)
    covariance = model.loadings_ @ model.loadings_.T + 0.7 * np.eye(5)
    assert np.allclose(model.score_samples(X), multivariate_normal(model.mean_, covariance).logpdf(X))
    expected = (X - X.mean(0)) @ np.linalg.solve(covariance, model.loadings_)
    assert np.allclose(model.transform(X), expected)


def test_1_more_features_than_samples_counts_the_zeros(random):
    X = random.normal(size=(10, 40))
    eigenvalues = np.linalg.eigvalsh(np.cov(X.T, bias=True))[::-1]
    model = FactorModel(3).fit(X)
    assert model.noise_variance_ == pytest.approx(eigenvalues[3:].mean())
    assert np.allclose((model.loadings_**2).sum(0), eigenvalues[:3] - eigenvalues[3:].mean())
    loud = FactorModel(3, noise_variance=1e3).fit(X)
    assert not loud.loadings_.any() and not loud.transform(X).any()


def test_2_a_rotation_of_the_factors_changes_no_prediction(random):
    X, y = factors(random, 300, random.normal(size=(8, 3)), np.ones(3))
    plain = PretrainedFeatures(FactorModel(3)).fit(X[:20], y[:20], X_unlabeled=X[20:])
    rotated = FactorModel(3).fit(np.concatenate([X[20:], X[:20]]))
    rotated.loadings_ = rotated.loadings_ @ ortho_group(3, seed=1).rvs()
    turned = PretrainedFeatures(FrozenEstimator(rotated)).fit(X[:20], y[:20])
    assert np.allclose(turned.predict(X), plain.predict(X), rtol=0, atol=1e-8)
    assert not np.allclose(turned.transform(X), plain.transform(X), atol=0.1)


def test_2_a_permutation_of_the_components_changes_no_prediction(random):
    X, y = clusters(random, 300, 4 * random.normal(size=(5, 3)))
    plain = PretrainedFeatures(MixtureModel(5, random_state=0)).fit(X[:30], y[:30], X_unlabeled=X[30:])
    permuted = MixtureModel(5, random_state=0).fit(np.concatenate([X[30:], X[:30]]))
    permuted.means_, permuted.weights_ = permuted.means_[[3, 0, 4, 1, 2]], permuted.weights_[[3, 0, 4, 1, 2]]
    turned = PretrainedFeatures(FrozenEstimator(permuted)).fit(X[:30], y[:30])
    assert (turned.predict(X) == plain.predict(X)).all()
    assert np.allclose(turned.predict_proba(X), plain.predict_proba(X), rtol=0, atol=1e-8)


def test_2_a_rotation_of_the_embedding_changes_no_prediction(random):
    theta = random.normal(size=(2, 6))
    pairs, X = compared(random, 800, theta), random.normal(size=(30, 6))
    y = X @ theta.T @ [1.0, -2.0]
    plain = PretrainedFeatures(ContrastiveModel(2, random_state=0)).fit(X, y, pairs=pairs)
    turned = ContrastiveModel(2, random_state=0).fit(pairs)
    turned.theta_ = ortho_group(2, seed=1).rvs() @ turned.theta_
    other = PretrainedFeatures(FrozenEstimator(turned)).fit(X, y)
    assert np.allclose(other.predict(X), plain.predict(X), rtol=0, atol=1e-8)
    assert turned.score(pairs) == pytest.approx(plain.model_.score(pairs))


def test_3_with_the_true_model_the_excess_is_that_of_least_squares_on_r_features(random):
    d, r, n = 12, 3, 20
    B, beta = random.normal(size=(d, r)), np.array([1.0, -0.5, 2.0])
    true = FactorModel(r)
    true.mean_, true.loadings_, true.noise_variance_ = np.zeros(d), B, 1.0
    posterior = np.linalg.inv(np.eye(r) + B.T @ B)
    spread, residual = np.eye(r) - posterior, beta @ posterior @ beta + 0.09
    learner, excess = PretrainedFeatures(FrozenEstimator(true), LinearRegression(fit_intercept=False)), []
    for _ in range(400):
        error = learner.fit(*factors(random, n, B, beta)).predictor_.coef_ - beta
        excess.append(error @ spread @ error)
    expected = residual * r / (n - r - 1)
    assert abs(np.mean(excess) - expected) < 3 * np.std(excess) / math.sqrt(len(excess))
    assert np.std(excess) / math.sqrt(len(excess)) < 0.1 * expected


def test_4_with_much_data_it_is_the_bayes_predictor(random):
    B, beta = random.normal(size=(7, 2)), np.array([1.0, -2.0])
    X, y = factors(random, 200_000, B, beta)
    fitted = PretrainedFeatures(FactorModel(2)).fit(X, y)
    weights = np.linalg.solve(B @ B.T + np.eye(7), B @ beta)
    assert np.allclose(fitted.predict(np.eye(7)) - fitted.predict(np.zeros((1, 7))), weights, atol=0.02)


def test_5_all_factors_without_noise_are_ordinary_least_squares(random):
    X, y = factors(random, 60, random.normal(size=(5, 2)), np.ones(2))
    fitted = PretrainedFeatures(FactorModel(5)).fit(X, y)
    assert fitted.model_.noise_variance_ == 0
    assert np.allclose(fitted.predict(X), LinearRegression().fit(X, y).predict(X), atol=1e-8)


def test_5_one_component_is_the_majority_class(random):
    X, y = random.normal(size=(40, 3)), np.array(["a"] * 15 + ["b"] * 25)
    fitted = PretrainedFeatures(MixtureModel(1)).fit(X, y)
    assert (fitted.predict(X) == "b").all() and np.allclose(fitted.predict_proba(X), [0, 1])
    assert np.allclose(fitted.model_.means_, X.mean(0)) and fitted.score(X, y) == 25 / 40


def test_5_too_few_labels_are_an_error_or_ridge(random):
    X, y = factors(random, 60, random.normal(size=(9, 4)), np.ones(4))
    with pytest.raises(ValueError, match="least squares on 4 features is not determined by n_samples=4"):
        PretrainedFeatures(FactorModel(4)).fit(X[:4], y[:4], X_unlabeled=X)
    assert PretrainedFeatures(FactorModel(4)).fit(X[:5], y[:5], X_unlabeled=X).predict(X).shape == (60,)
    assert np.isfinite(PretrainedFeatures(FactorModel(4), Ridge()).fit(X[:3], y[:3], X_unlabeled=X).predict(X)).all()


@pytest.mark.parametrize("m", [200, 20_000])
def test_6_without_information_the_excess_stays_and_the_baseline_is_chosen(random, m):
    d, r, n = 10, 2, 60
    B = np.zeros((d, r))
    B[:r] = 2 * np.eye(r)

    def draw(size):
        X, _ = factors(random, size, B, np.ones(r))
        X[:, -1] *= 0.5
        return X, 4 * X[:, -1] + 0.3 * random.normal(size=size)

    (X, y), unlabeled, (X_test, y_test) = draw(n), draw(m)[0], draw(5000)
    fitted = PretrainedFeatures(FactorModel(r)).fit(X, y, X_unlabeled=unlabeled)
    # Var(4 x_d) = 4, and what least squares on two useless features adds.
    assert np.mean((fitted.predict(X_test) - y_test) ** 2) - 0.09 == pytest.approx(4, rel=0.15)
    report = compare_pretraining(
        X, y, [FactorModel(k) for k in (1, 2, 3)], X_unlabeled=unlabeled, repeats=2, random_state=0
    )
    assert report.choice == "supervised" and report.risks["supervised"].mean() < 0.2
    assert report.plot().axes and "Take supervised" in str(report)


def test_6_with_information_pretraining_and_the_right_size_are_chosen(random):
    B, beta = 0.25 * random.normal(size=(100, 3)), np.ones(3)
    (X, y), (unlabeled, _) = factors(random, 40, B, beta), factors(random, 2000, B, beta)
    report = compare_pretraining(
        X, y, [FactorModel(k) for k in (1, 3, 9)], X_unlabeled=unlabeled, repeats=2, random_state=0
    )
    assert report.model.n_components == 3 and report.choice == "pretrained"
    means = 1.5 * random.normal(size=(6, 10))
    (X, y), (unlabeled, _) = clusters(random, 40, means), clusters(random, 600, means)
    named = {"few": MixtureModel(2, random_state=0), "right": MixtureModel(6, random_state=0)}
    report = compare_pretraining(X, y, named, X_unlabeled=unlabeled, repeats=2, random_state=0)
    assert report.likelihoods["right"] > report.likelihoods["few"] and report.choice == "pretrained"
    theta = random.normal(size=(2, 8))
    pairs, X = compared(random, 2000, theta), random.normal(size=(20, 8))
    y = X @ theta.T @ np.ones(2) + 0.5 * random.normal(size=20)
    report = compare_pretraining(X, y, [ContrastiveModel(2, random_state=0)], pairs=pairs, folds=3, random_state=0)
    assert report.choice == "pretrained"


def test_7_zero_is_a_saddle_of_the_contrastive_likelihood(random):
    pairs = compared(random, 2000, random.normal(size=(2, 5)))
    x, other, similar = map(torch.from_numpy, pairs)
    zero = torch.zeros(2, 5, dtype=torch.float64, requires_grad=True)
    loss = contrastive_loss(x @ zero.T, other @ zero.T, similar)
    assert not torch.autograd.grad(loss, zero)[0].any() and float(loss.detach()) == pytest.approx(math.log(2))
    fitted = ContrastiveModel(2, random_state=0).fit(pairs)
    assert -fitted.score(pairs) < math.log(2) - 0.05


def test_7_contrastive_loss_is_the_logistic_loss_of_inner_products(random):
    theta = random.normal(size=(2, 5))
    x, other, similar = compared(random, 50, theta)
    inner = np.einsum("ij,ij->i", x @ theta.T, other @ theta.T)
    expected = np.log1p(np.exp(-(2 * similar - 1) * inner)).mean()
    embedded = torch.from_numpy(x @ theta.T), torch.from_numpy(other @ theta.T)
    assert float(contrastive_loss(*embedded, torch.from_numpy(similar))) == pytest.approx(expected)
    model = ContrastiveModel(2)
    model.theta_ = theta
    assert model.score((x, other, similar)) == pytest.approx(-expected)


def test_contrastive_fit_finds_theta_up_to_rotation_and_takes_either_sign_of_s(random):
    theta = random.normal(size=(2, 4))
    x, other, similar = compared(random, 30_000, theta)
    fitted = ContrastiveModel(2, random_state=0).fit((x, other, similar))
    assert np.allclose(fitted.theta_.T @ fitted.theta_, theta.T @ theta, atol=0.25)
    assert np.allclose(ContrastiveModel(2, random_state=0).fit((x, other, 2 * similar - 1)).theta_, fitted.theta_)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    before = encoder[0].weight.detach().clone()
    deep = ContrastiveModel(2, encoder=encoder, max_iter=40).fit((x[:2000], other[:2000], similar[:2000]))
    assert torch.equal(encoder[0].weight, before) and deep.transform(x).shape == (30_000, 2)
    assert deep.score((x, other, similar)) > -math.log(2) + 0.02


@pytest.mark.parametrize("options", [{}, {"uniform": True}, {"variance": 1.0}, {"variance": 1.0, "uniform": True}])
def test_mixture_fit_is_stationary_and_its_density_right(random, options):
    X, _ = clusters(random, 200, 2 * random.normal(size=(3, 2)))
    model = MixtureModel(3, random_state=0, tol=1e-13, max_iter=5000, **options).fit(X)
    expected = sum(
        weight * multivariate_normal(mean, model.variance_ * np.eye(2)).pdf(X)
        for weight, mean in zip(model.weights_, model.means_, strict=True)
    )
    assert np.allclose(model.score_samples(X), np.log(expected))
    means, logits, variance = (
        torch.tensor(one, requires_grad=True) for one in (model.means_, np.log(model.weights_), model.variance_)
    )
    joint = torch.log_softmax(logits, 0) + torch.stack([
        torch.distributions.Normal(mean, variance.sqrt()).log_prob(torch.from_numpy(X)).sum(1) for mean in means
    ], 1)  # fmt: skip
    likelihood = joint.logsumexp(1).mean()
    assert float(likelihood.detach()) == pytest.approx(model.score(X))
    of_means, of_logits, of_variance = torch.autograd.grad(likelihood, (means, logits, variance))
    assert of_means.abs().max() < 1e-4
    assert ("uniform" in options and np.allclose(model.weights_, 1 / 3)) or of_logits.abs().max() < 1e-4
    assert ("variance" in options and model.variance_ == 1) or of_variance.abs() < 1e-4


def test_mixture_keeps_the_likeliest_start(random):
    X, _ = clusters(random, 300, 3 * random.normal(size=(8, 2)))
    best = MixtureModel(8, n_init=10, random_state=0).fit(X).score(X)
    assert all(best >= MixtureModel(8, n_init=k, random_state=0).fit(X).score(X) for k in (1, 3, 9))


def test_table_is_the_least_0_1_loss_and_ties_take_the_commonest(random):
    Z, y = np.eye(4)[[0, 0, 0, 1, 1, 2, 2]], np.array(list("bbbabaa"))
    table = ComponentTable().fit(Z, y)
    # Component 1 is tied and 3 empty.
    assert table.classes_[table.table_].tolist() == ["b", "b", "a", "b"]
    Z, y = random.dirichlet(np.ones(3), size=25), random.integers(2, size=25)
    chosen = [np.array(one)[Z.argmax(1)] for one in np.ndindex(2, 2, 2)]
    assert (ComponentTable().fit(Z, y).predict(Z) != y).sum() == min((one != y).sum() for one in chosen)


@pytest.mark.parametrize("rotated", [False, True])
def test_factor_divergences_are_those_of_the_joint_and_marginal_gaussians(random, rotated):
    X, _ = factors(random, 100, random.normal(size=(4, 2)), np.ones(2))
    one, true = FactorModel(2).fit(X[:50]), FactorModel(2).fit(X)
    if rotated:
        one.loadings_ = one.loadings_ @ ortho_group(2, seed=3).rvs()

    def kl(mean, ours, theirs):
        ratio = np.linalg.solve(theirs, ours)
        return (np.trace(ratio) - len(ours) - np.linalg.slogdet(ratio)[1] + mean @ np.linalg.solve(theirs, mean)) / 2

    def joint(model, Q):
        B = model.loadings_ @ Q
        covariance = B @ B.T + model.noise_variance_ * np.eye(4)
        return np.block([[covariance, B], [B.T, np.eye(2)]])

    def turned(angle, sign):
        c, s = np.cos(angle), np.sin(angle)
        Q = np.array([[c, -s], [s, c]]) * [1, sign]
        shift = np.concatenate([one.mean_ - true.mean_, np.zeros(2)])
        return kl(shift, joint(one, Q), joint(true, np.eye(2)))

    least = min(minimize(lambda a, s=s: turned(a[0], s), [b]).fun for s in (-1, 1) for b in (0, 1.5, 3, 4.5))
    found = one.divergences(true, np.random.RandomState(0))
    covariances = [joint(model, np.eye(2))[:4, :4] for model in (one, true)]
    assert found == pytest.approx((least, kl(one.mean_ - true.mean_, *covariances)), rel=1e-6)


@pytest.mark.parametrize("near", [1.0, 1e-4])
def test_mixture_divergences_are_those_of_brute_force(near):
    one, true = MixtureModel(3), MixtureModel(3)
    true.means_, true.weights_, true.variance_ = np.array([[-2.0], [0.0], [2.1]]), np.array([0.4, 0.4, 0.2]), 0.6
    order = [2, 0, 1]
    one.means_ = (true.means_ + near * np.array([[0.2], [0.3], [-0.1]]))[order]
    one.weights_, one.variance_ = (true.weights_ + near * np.array([0.1, -0.1, 0]))[order], 0.6 - near * 0.1
    grid = np.linspace(-12, 12, 20_001)
    p, q = (model.weights_[:, None] * norm(model.means_, math.sqrt(model.variance_)).pdf(grid) for model in (one, true))
    step = grid[1] - grid[0]
    floor = 1e-300
    least = min((p * np.log((p + floor) / (q[list(order)] + floor))).sum() * step for order in permutations(range(3)))
    marginal = (p.sum(0) * np.log(p.sum(0) / q.sum(0))).sum() * step
    joint, drawn = one.divergences(true, np.random.RandomState(0))
    assert joint == pytest.approx(least, rel=1e-6) and drawn == pytest.approx(marginal, rel=0.1)


def test_kappa_grows_where_factors_are_weak(random):
    strong, weak = (
        informativeness(
            FactorModel(2), factors(random, 400, size * np.eye(8, 2), np.ones(2))[0], draws=8, random_state=0
        )
        for size in (3.0, 0.5)
    )
    assert (strong.joint >= strong.marginal).all() and 1 <= strong.kappa < weak.kappa
    assert strong.plot().axes
    X, _ = clusters(random, 300, 6 * random.normal(size=(3, 2)))
    assert informativeness(MixtureModel(3, random_state=0), X, draws=3, random_state=0).kappa == pytest.approx(
        1, abs=0.3
    )
    with pytest.raises(TypeError, match="FactorModel or MixtureModel"):
        informativeness(ContrastiveModel(2), X)


def test_gain_is_the_ratio_of_the_two_bounds():
    gain = pretraining_gain(100, 25, C_phi=400, C_psi=4, C_joint=100, kappa=0.5)
    assert gain == (0.5 * 2 + 0.4, 2.0) and gain.ratio == pytest.approx(2 / 1.4)
    with pytest.raises(ValueError, match="above 0"):
        pretraining_gain(0, 25, C_phi=400, C_psi=4, C_joint=100)


def test_order_of_samples_and_rotation_of_features_change_nothing(random):
    X, y = factors(random, 200, random.normal(size=(6, 2)), np.ones(2))
    rotation, order = ortho_group(6, seed=0).rvs(), random.permutation(180)
    plain = PretrainedFeatures(FactorModel(2)).fit(X[:20], y[:20], X_unlabeled=X[20:])
    shuffled = PretrainedFeatures(FactorModel(2)).fit(X[:20], y[:20], X_unlabeled=X[20:][order])
    turned = PretrainedFeatures(FactorModel(2)).fit(X[:20] @ rotation, y[:20], X_unlabeled=X[20:] @ rotation)
    assert np.allclose(shuffled.predict(X), plain.predict(X), atol=1e-8)
    assert np.allclose(turned.predict(X @ rotation), plain.predict(X), atol=1e-8)


def test_labels_do_not_reach_the_model_and_any_model_or_predictor_will_do(random):
    X, y = factors(random, 100, random.normal(size=(6, 2)), np.ones(2))
    one, other = (PretrainedFeatures(FactorModel(2)).fit(X, target) for target in (y, -y[::-1]))
    assert np.array_equal(one.model_.loadings_, other.model_.loadings_)
    assert PretrainedFeatures(PCA(3), LogisticRegression()).fit(X, y > 0).score(X, y > 0) > 0.7
    assert PretrainedFeatures(KMeans(5, random_state=0)).fit(X, y).predict(X).shape == y.shape
    clipped = PretrainedFeatures(FactorModel(2), clip=0.5).fit(X, y).predict(X)
    assert np.array_equal(clipped, one.predict(X).clip(-0.5, 0.5)) and abs(clipped).max() == 0.5
    assert not hasattr(one, "predict_proba") and one.predict(X[:1]).shape == (1,)


@pytest.mark.parametrize("kind", ["factors", "mixture", "contrastive", "logistic"])
def test_save_and_load_give_the_same_predictions(random, tmp_path, kind):
    X, y = clusters(random, 60, 3 * random.normal(size=(4, 5)))
    match kind:
        case "factors":
            fitted = PretrainedFeatures(FactorModel(2, noise_variance=0.5), clip=1.0).fit(X, X[:, 0])
        case "mixture":
            fitted = PretrainedFeatures(MixtureModel(4, random_state=np.random.RandomState(0))).fit(X, y)
        case "contrastive":
            pairs = compared(random, 200, np.eye(2, 5))
            fitted = PretrainedFeatures(ContrastiveModel(2, random_state=0), Ridge(2.0)).fit(X, X[:, 0], pairs=pairs)
        case "logistic":
            fitted = PretrainedFeatures(FrozenEstimator(FactorModel(3).fit(X)), LogisticRegression()).fit(X, y)
    fitted.save_pretrained(tmp_path)
    loaded = PretrainedFeatures.from_pretrained(tmp_path)
    assert (loaded.predict(X) == fitted.predict(X)).all() and np.array_equal(loaded.transform(X), fitted.transform(X))
    assert sorted(one.name for one in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert loaded.fit(
        X, y if kind in ("mixture", "logistic") else X[:, 0], pairs=pairs if kind == "contrastive" else None
    )


def test_a_folder_without_a_part_or_damaged_is_refused(random, tmp_path):
    X = random.normal(size=(20, 3))
    PretrainedFeatures(FactorModel(2)).fit(X, X[:, 0]).save_pretrained(tmp_path)
    arrays = load_file(tmp_path / "model.safetensors")
    for missing in arrays:
        save_file({name: value for name, value in arrays.items() if name != missing}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"damaged one: '{missing}'"):
            PretrainedFeatures.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"noise")
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match="holds no saved PretrainedFeatures"):
            PretrainedFeatures.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([
    FactorModel(1),
    MixtureModel(2, n_init=1, random_state=0),
    PretrainedFeatures(PCA()),
    PretrainedFeatures(FactorModel(1), Ridge()),
    # With so small a variance the likeliest component has all of the responsibility, so both ways to predict agree.
    PretrainedFeatures(MixtureModel(8, variance=0.01, n_init=1, random_state=0)),
], expected_failed_checks=lambda estimator: {
    "check_regressors_train": "one factor does not tell a target of ten features",
} if "FactorModel" in str(estimator) else {})  # fmt: skip
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_columns_in_another_order_are_refused_by_every_estimator(random):
    pd = pytest.importorskip("pandas")
    X, y = clusters(random, 60, 3 * random.normal(size=(4, 3)))
    frame = pd.DataFrame(X, columns=["a", "b", "c"])
    moved = frame[["b", "a", "c"]]
    mixture = MixtureModel(4, random_state=0).fit(frame)
    shares = pd.DataFrame(mixture.transform(frame), columns=list("pqrs"))
    contrastive = ContrastiveModel(2, random_state=0).fit((frame, frame[::-1], y == "odd"))
    pretrained = PretrainedFeatures(FactorModel(2)).fit(frame, X[:, 0])
    frozen = PretrainedFeatures(FrozenEstimator(FactorModel(2).fit(frame)))
    report = compare_pretraining(frame, X[:, 0], [FactorModel(2)], folds=2, repeats=1, random_state=0)
    table = ComponentTable().fit(shares, y)
    uses = [
        FactorModel(2).fit(frame).transform, FactorModel(2).fit(frame).score, mixture.transform, mixture.score_samples,
        contrastive.transform, lambda X: contrastive.score((frame, X, y == "odd")), pretrained.predict,
        lambda X: pretrained.score(X, X["a"]), pretrained.transform, frozen.fit(frame, X[:, 0]).predict,
        lambda X: frozen.fit(X, X["a"]),
        lambda X: PretrainedFeatures(FactorModel(2)).fit(frame, y == "odd", X_unlabeled=X),
        lambda X: PretrainedFeatures(ContrastiveModel(2)).fit(frame, frame["a"], pairs=(frame, X, y == "odd")),
        lambda X: compare_pretraining(frame, frame["a"], [FactorModel(1)], X_unlabeled=X, folds=2, repeats=1),
        report.model.transform,
    ]  # fmt: skip
    for use in uses:
        use(frame)
        with pytest.raises(ValueError, match="feature names"):
            use(moved)
    for use in (table.predict, table.predict_proba):
        use(shares)
        with pytest.raises(ValueError, match="feature names"):
            use(shares[list("qprs")])


def test_names_of_columns_are_saved(random, tmp_path):
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(random.normal(size=(30, 3)), columns=["a", "b", "c"])
    for model in (FactorModel(2), FrozenEstimator(FactorModel(2).fit(frame))):
        fitted = PretrainedFeatures(model).fit(frame, frame["a"])
        fitted.save_pretrained(tmp_path)
        loaded = PretrainedFeatures.from_pretrained(tmp_path)
        assert np.array_equal(loaded.predict(frame), fitted.predict(frame))
        with pytest.raises(ValueError, match="feature names"):
            loaded.predict(frame[["c", "a", "b"]])


def test_missing_labels_are_no_class(random):
    pd = pytest.importorskip("pandas")
    X = random.normal(size=(8, 2))
    full = ["a", "b", "a", "b", "a", "b"]
    for gap in (None, np.nan, float("nan")):
        for labels in ([*full, "a", gap], [gap, *full, "a"], np.array([*full, "a", gap], dtype=object)):
            with pytest.raises(ValueError, match="NaN"):
                PretrainedFeatures(MixtureModel(2, random_state=0)).fit(X, labels)
            with pytest.raises(ValueError, match="NaN"):
                ComponentTable().fit(np.eye(2)[[0, 1] * 4], labels)
    for labels in (
        pd.Series([*full, "a", pd.NA], dtype="string"),
        pd.Series([1, 0, 1, 0, 1, 0, 1, pd.NA], dtype="Int64"),
    ):
        with pytest.raises(ValueError, match="NaN"):
            PretrainedFeatures(PCA(1), LogisticRegression()).fit(X, labels)
        with pytest.raises(ValueError, match="NaN"):
            compare_pretraining(X, labels, [MixtureModel(2)])
    with pytest.raises(ValueError, match="NaN"):
        PretrainedFeatures(FactorModel(1)).fit(X, [1.0] * 7 + [np.nan])
    for labels in ([*full, "nan", "nan"], [0, 1] * 4, [True, False] * 4):
        assert len(PretrainedFeatures(MixtureModel(2, random_state=0)).fit(X, labels).classes_) == len(set(labels))


def test_component_table_refuses_what_are_no_responsibilities(random):
    X, y = clusters(random, 40, 3 * random.normal(size=(4, 3)))
    with pytest.raises(ValueError, match="at least 0 and add up to 1"):
        PretrainedFeatures(KMeans(4, random_state=0), ComponentTable()).fit(X, y)
    table = ComponentTable().fit(np.eye(2)[[0, 1]], ["a", "b"])
    for use in (table.predict, table.predict_proba):
        with pytest.raises(ValueError, match="at least 0 and add up to 1"):
            use(np.ones((3, 2)))
    assert np.array_equal(table.predict_proba(np.array([[0.25, 0.75]], dtype=np.float16)), [[0.25, 0.75]])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (1e-4, 0.0), (1e4, 0.0), (1.0, 1e5), (0.25, 100.0)])
def test_fits_are_those_of_the_exact_numbers_at_any_scale(random, dtype, scale, offset):
    """Against the same samples, as they are in the dtype, brought near 0 and to one size beforehand."""
    X, y = clusters(random, 120, 4 * random.normal(size=(3, 4)))
    with np.errstate(over="ignore"):
        far = (scale * X + offset).astype(dtype)
    if not np.isfinite(far).all() or (dtype == np.float16 and scale < 1e-3):
        return
    near = (far.astype(np.float64) - offset) / scale
    for model in (FactorModel(2), MixtureModel(3, random_state=0)):
        found, expected = model.fit(far).transform(far), model.fit(near).transform(near)
        assert np.allclose(np.abs(found), np.abs(expected), atol=1e-6)
        predictor = None if isinstance(model, MixtureModel) else LogisticRegression(C=1e6, max_iter=1000)
        fitted = PretrainedFeatures(model, predictor)
        assert (fitted.fit(far, y).predict(far) == fitted.fit(near, y).predict(near)).all()
    if not offset:
        pairs = (near, near[::-1], y == "odd")
        moved = (far, far[::-1], y == "odd")
        theta, expected = (ContrastiveModel(2, random_state=0).fit(one).theta_ for one in (moved, pairs))
        assert np.allclose(scale * theta, expected, rtol=1e-3, atol=1e-3)


def test_quiet_noise_beside_a_loud_signal_is_kept(random):
    """In the covariance of 1e16 and 1e-6 the noise would be less than rounding."""
    noise = 1e-6 * random.normal(size=(400, 5))
    X = noise + 1e4 * random.normal(size=(400, 1)) * np.array([1, 2, 0, 1, -1.0])
    basis = ortho_group(5, seed=0).rvs()
    found = FactorModel(1).fit(X @ basis).noise_variance_
    assert found == pytest.approx(1e-12, rel=0.1)


def test_columns_of_very_different_means_do_not_end_the_mixture(random):
    """What counts as no variance goes by the columns' own spread, not by how far the columns are apart."""
    X, _ = clusters(random, 90, 3 * random.normal(size=(3, 2)))
    plain, shifted = (MixtureModel(3, random_state=0).fit(X + shift) for shift in ([0, 0], [0, 1e8]))
    assert shifted.variance_ == pytest.approx(plain.variance_, rel=1e-4)


@pytest.mark.filterwarnings("ignore:the likeliest start")
def test_mixture_counts_its_rounds_and_says_when_they_do_not_suffice(random):
    X, _ = clusters(random, 200, random.normal(size=(4, 2)))
    with pytest.warns(ConvergenceWarning, match="max_iter=3"):
        short = MixtureModel(4, max_iter=3, n_init=1, random_state=0).fit(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        full = MixtureModel(4, max_iter=5000, n_init=1, random_state=0).fit(X)
        exact = MixtureModel(4, max_iter=full.n_iter_, n_init=1, random_state=0).fit(X)
    assert short.n_iter_ == 3 < full.n_iter_ < 5000 and np.array_equal(exact.means_, full.means_)
    likelihoods = [
        MixtureModel(4, max_iter=rounds, tol=-1, n_init=1, random_state=0).fit(X).score(X) for rounds in (1, 2, 3)
    ]
    assert likelihoods == sorted(likelihoods) and short.score(X) == likelihoods[2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_worked_out_in_float32(random, dtype):
    theta = random.normal(size=(2, 4))
    x, other, similar = compared(random, 300, theta)
    embedded = [torch.tensor(100 * one @ theta.T, dtype=dtype) for one in (x, other)]
    loss = contrastive_loss(*embedded, torch.tensor(similar))
    expected = contrastive_loss(*(one.double() for one in embedded), torch.tensor(similar))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx(float(expected), rel=1e-5)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).to(dtype)
    model = ContrastiveModel(2, encoder=encoder, max_iter=60).fit((x, other, similar))
    assert next(encoder.parameters()).dtype == dtype and next(model.encoder_.parameters()).dtype == torch.float32
    same = ContrastiveModel(2, encoder=clone(encoder, safe=False).float(), max_iter=60).fit((x, other, similar))
    assert np.array_equal(model.transform(x), same.transform(x)) and model.score((x, other, similar)) > -math.log(2)


def test_dropout_of_an_encoder_does_not_reach_fit_or_features(random):
    x, other, similar = compared(random, 200, random.normal(size=(2, 4)))
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)).train()
    model = ContrastiveModel(2, encoder=encoder, max_iter=40).fit((x, other, similar))
    assert np.array_equal(model.transform(x), model.transform(x)) and encoder.training
    plain = ContrastiveModel(2, encoder=encoder[:1], max_iter=40).fit((x, other, similar))
    assert np.array_equal(model.transform(x), plain.transform(x))


def test_what_cannot_be_saved_is_refused(random, tmp_path):
    X = random.normal(size=(20, 3))
    with pytest.raises(TypeError, match="cannot be saved"):
        PretrainedFeatures(PCA(2)).fit(X, X[:, 0]).save_pretrained(tmp_path)


def test_bad_input_is_one_clear_sentence(random):
    X, y = random.normal(size=(20, 4)), random.normal(size=20)
    pairs = (X, X, np.arange(20) % 2)
    for call, words in (
        (lambda: FactorModel(2).fit(X * np.nan), "NaN"),
        (lambda: FactorModel(2).fit(np.ones((9, 4))), "two or more samples that differ, got n_samples=9"),
        (lambda: FactorModel(1).fit(X[:1]), "two or more samples that differ, got n_samples=1"),
        (lambda: FactorModel(5).fit(X), "n_components is between 1 and 4"),
        (lambda: FactorModel(3).fit(X[:3]), "n_components is between 1 and 2"),
        (lambda: FactorModel(2, noise_variance=-1).fit(X), "noise_variance"),
        (lambda: FactorModel(2, noise_variance=math.inf).fit(X), "noise_variance"),
        (lambda: FactorModel(0).fit(X), "n_components is between 1 and 4"),
        (lambda: FactorModel(2, noise_variance=0).fit(X).score(X), "leaves no density"),
        (lambda: MixtureModel(0).fit(X), "more distinct samples"),
        (lambda: MixtureModel(20).fit(X), "more distinct samples, got 20"),
        (lambda: MixtureModel(21, variance=1.0).fit(X), "more distinct samples, got 20"),
        (lambda: MixtureModel(2, variance=math.inf).fit(X), "variance is above 0"),
        (lambda: MixtureModel(2, max_iter=0).fit(X), "at least 1"),
        (lambda: MixtureModel(2, random_state=0).fit([[0.0], [9.0], [9 + 1e-9]] * 4), "the variance fell to 0 with 2"),
        (lambda: ContrastiveModel(2, max_iter=0).fit(pairs), "at least 1"),
        (lambda: ContrastiveModel(2).fit((X, X, np.ones(20))), "s is of 0 and 1"),
        (lambda: ContrastiveModel(2).fit((X, X[:9], pairs[2])), "inconsistent numbers of samples"),
        (lambda: ContrastiveModel(2).fit((X, X, pairs[2][:9])), "inconsistent numbers of samples"),
        (lambda: ContrastiveModel(2).fit((X, X)), "pairs"),
        (lambda: ContrastiveModel(1, encoder=nn.Linear(4, 1)).fit((1e30 * X, 1e30 * X, pairs[2])), "the fit diverged"),
        (lambda: PretrainedFeatures(FactorModel(2), clip=math.inf).fit(X, y), "clip"),
        (lambda: PretrainedFeatures(FactorModel(4), LinearRegression(fit_intercept=False)).fit(X[:3], y[:3], X), "label"),
        *((lambda name=name, value=value: pretraining_gain(
            **{"m": 9, "n": 9, "C_phi": 1, "C_psi": 1, "C_joint": 1, "kappa": 1, name: value}
        ), "finite and above 0") for name in ("m", "n", "C_phi", "C_psi", "C_joint", "kappa") for value in (0, math.inf)),
        (lambda: FactorModel(2).fit(X[:3]).score(X), "leaves no density"),
        (lambda: FactorModel(2).fit(X).transform(X[:, :3]), "X has 3 features, but FactorModel is expecting 4"),
        (lambda: MixtureModel(3).fit(np.repeat(X[:3], 4, axis=0)), "more distinct samples, got 3"),
        (lambda: MixtureModel(2, variance=0).fit(X), "variance is above 0"),
        (lambda: MixtureModel(2, n_init=0).fit(X), "at least 1"),
        (lambda: MixtureModel(2).fit(np.ones((9, 4))), "two or more samples that differ, got n_samples=9"),
        (lambda: ContrastiveModel(2).fit(X), "pairs"),
        (lambda: ContrastiveModel(2).fit((X, X, np.arange(20))), "s is of 0 and 1"),
        (lambda: ContrastiveModel(2).fit((X, X[:, :2], pairs[2])), "expecting 4 features"),
        (lambda: ContrastiveModel(0).fit(pairs), "at least 1"),
        (lambda: ContrastiveModel(2, encoder=nn.Tanh()).fit(pairs), "no parameters to fit"),
        (lambda: ContrastiveModel(2, encoder=nn.Linear(4, 3)).fit(pairs), r"encoder gives \(m, 2\), got \(m, 3\)"),
        (lambda: ContrastiveModel(2).fit((X, X, [0, 1] * 9 + [0, np.nan])), "s contains NaN"),
        (lambda: contrastive_loss(torch.ones(3, 2), torch.ones(3, 1), torch.ones(3)), "embeddings are two of"),
        (lambda: contrastive_loss(torch.ones(3, 2), torch.ones(3, 2), torch.ones(3, 1)), "embeddings are two of"),
        (lambda: PretrainedFeatures(ContrastiveModel(2)).fit(X, y), "give PretrainedFeatures.fit its pairs"),
        (lambda: PretrainedFeatures(FactorModel(2)).fit(X, y[:5]), "inconsistent numbers of samples"),
        (lambda: PretrainedFeatures(FactorModel(2)).fit(X, y, X_unlabeled=X[:, :3]), "expecting 4 features"),
        (lambda: PretrainedFeatures(FactorModel(2)).fit(X, y, X_unlabeled=X, pairs=pairs), "not both"),
        (lambda: PretrainedFeatures(FactorModel(2), clip=0).fit(X, y), "clip"),
        (lambda: PretrainedFeatures(MixtureModel(2)).fit(X, ["a"] * 20), "two or more classes"),
        (lambda: compare_pretraining(X, y, []), "models is empty"),
        (lambda: informativeness(FactorModel(2), X, draws=0), "draws"),
        (lambda: informativeness(FactorModel(4), X, draws=2), "leaves no density"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_defaults_are_those_that_are_documented(random):
    assert FactorModel(2).get_params() == {"n_components": 2, "noise_variance": None}
    assert MixtureModel(2).get_params() == {
        "n_components": 2, "variance": None, "uniform": False, "n_init": 5, "max_iter": 500, "tol": 1e-7,
        "random_state": None,
    }  # fmt: skip
    plain = {"n_components": 2, "encoder": None, "max_iter": 500, "random_state": None}
    assert ContrastiveModel(2).get_params() == plain
    assert pretraining_gain(100, 25, C_phi=400, C_psi=4, C_joint=100) == (2.4, 2.0)
    X = random.normal(size=(60, 4)) * [3, 1, 1, 1]
    assert informativeness(FactorModel(1), X, random_state=0).joint.shape == (20,)
    defaults = {name: one.default for name, one in inspect.signature(compare_pretraining).parameters.items()}
    assert (defaults["folds"], defaults["repeats"]) == (5, 4)


def test_as_many_factors_as_features_have_the_density_of_the_gaussian(random):
    X = random.normal(size=(50, 3)) @ random.normal(size=(3, 3))
    model = FactorModel(3, noise_variance=0.05).fit(X)
    covariance = model.loadings_ @ model.loadings_.T + 0.05 * np.eye(3)
    assert np.allclose(model.score_samples(X), multivariate_normal(X.mean(0), covariance).logpdf(X))
    assert model.score(X) == pytest.approx(multivariate_normal(X.mean(0), covariance).logpdf(X).mean())
    assert np.allclose(FactorModel(3, noise_variance=0).fit(X).loadings_ @ np.eye(3), FactorModel(3).fit(X).loadings_)


def test_responsibilities_are_bayes_rule_and_sum_to_1(random):
    X, _ = clusters(random, 100, 1.5 * random.normal(size=(3, 2)))
    model = MixtureModel(3, random_state=0).fit(X)
    joint = np.stack([
        weight * multivariate_normal(mean, model.variance_ * np.eye(2)).pdf(X)
        for weight, mean in zip(model.weights_, model.means_, strict=True)
    ], 1)  # fmt: skip
    assert np.allclose(model.transform(X), joint / joint.sum(1, keepdims=True))
    assert model.score(X) == pytest.approx(np.log(joint.sum(1)).mean()) and model.weights_.sum() == pytest.approx(1)
    again = MixtureModel(3, random_state=0).fit(X)
    assert np.array_equal(again.means_, model.means_)
    # As many components as samples, where the variance is known.
    each = MixtureModel(20, variance=1e-6, n_init=1, random_state=0).fit(X[:20])
    assert np.allclose(np.sort(each.means_, 0), np.sort(X[:20], 0))


def test_what_is_not_fitted_says_so(tmp_path):
    X, table, learner = np.eye(3), ComponentTable(), PretrainedFeatures(MixtureModel(2))
    for call in (
        FactorModel(1).transform, FactorModel(1).score, MixtureModel(2).transform, MixtureModel(2).score,
        ContrastiveModel(1).transform, lambda X: ContrastiveModel(1).score((X, X, [0, 1, 0])), table.predict,
        table.predict_proba, learner.transform, learner.predict, learner.predict_proba,
        lambda X: learner.save_pretrained(tmp_path),
    ):  # fmt: skip
        with pytest.raises(NotFittedError):
            call(X)


def test_table_takes_shares_that_add_up_to_1_but_for_rounding():
    table = ComponentTable().fit(np.eye(2)[[0, 1, 1]], ["a", "b", "b"])
    assert table.classes_.tolist() == ["a", "b"] and table.table_.tolist() == [0, 1]
    assert table.predict([[0.5005, 0.4990], [0.4, 0.6005]]).tolist() == ["a", "b"]
    for shares in ([[0.5, 0.4985]], [[0.5, 0.502]], [[1.1, -0.1]]):
        with pytest.raises(ValueError, match="at least 0 and add up to 1"):
            table.predict(shares)


def test_linear_embedding_is_theta_x(random):
    x, other, similar = compared(random, 300, random.normal(size=(2, 4)))
    model = ContrastiveModel(3, random_state=0).fit((x, other, similar))
    assert model.theta_.shape == (3, 4) and np.allclose(model.transform(x), x @ model.theta_.T)
    assert not hasattr(model, "encoder_")
    # Theta is a maximum: by the gradient of the mean log-likelihood.
    theta = torch.tensor(model.theta_, requires_grad=True)
    given = [torch.from_numpy(np.asarray(one, float)) for one in (x, other, similar)]
    (slope,) = torch.autograd.grad(contrastive_loss(given[0] @ theta.T, given[1] @ theta.T, given[2]), theta)
    assert float(slope.abs().max()) < 1e-6
    encoder = nn.Linear(4, 3)
    deep = ContrastiveModel(3, encoder=encoder, max_iter=5).fit((x, other, similar))
    assert not hasattr(deep, "theta_") and deep.transform(x).dtype == np.float64
    with torch.no_grad():
        expected = deep.encoder_(torch.from_numpy(x).float()).double().numpy()
    assert np.array_equal(deep.transform(x), expected)


def test_an_encoders_own_error_is_not_taken_for_a_fit_that_diverges(random):
    class Broken(nn.Linear):
        def forward(self, x):
            if len(x) > 1:
                raise RuntimeError("broken")
            return super().forward(x)

    x = random.normal(size=(20, 4))
    with pytest.raises(RuntimeError, match="broken"):
        ContrastiveModel(1, encoder=Broken(4, 1)).fit((x, x, np.arange(20) % 2))


def test_model_is_fitted_to_labelled_and_unlabelled_samples_together(random):
    X, y = factors(random, 60, random.normal(size=(5, 2)), np.ones(2))
    fitted = PretrainedFeatures(FactorModel(2)).fit(X[:20], y[:20], X_unlabeled=X[20:])
    assert np.allclose(fitted.model_.mean_, X.mean(0))
    assert np.allclose(PretrainedFeatures(FactorModel(2)).fit(X[:20], y[:20]).model_.mean_, X[:20].mean(0))
    ours = LinearRegression().fit(fitted.transform(X[:20]), y[:20])
    assert np.allclose(fitted.predict(X), ours.predict(fitted.transform(X)))
    assert fitted.score(X, y) == pytest.approx(ours.score(fitted.transform(X), y))
    # Without an intercept there is one coefficient less to determine.
    plain = LinearRegression(fit_intercept=False)
    assert PretrainedFeatures(FactorModel(4), plain).fit(X[:4], y[:4], X).predictor_.coef_.shape == (4,)
    labels = np.where(y > 0, "up", "down")
    classifier = PretrainedFeatures(FactorModel(2), LogisticRegression()).fit(X, labels)
    assert classifier.classes_.tolist() == ["down", "up"] and np.allclose(classifier.predict_proba(X).sum(1), 1)
    assert classifier.score(X, labels) == (classifier.predict(X) == labels).mean()


def test_kappa_is_the_largest_ratio_of_distances():
    found = Informativeness(np.array([0.2, 0.9, 0.5]), np.array([0.1, 0.1, 0.5]))
    assert found.kappa == pytest.approx(3)


def test_one_bootstrap_is_a_row_and_a_seed_settles_it(random):
    X = random.normal(size=(80, 4)) * [3, 2, 1, 1]
    one, other = (informativeness(FactorModel(2), X, draws=3, random_state=4) for _ in range(2))
    assert one.joint.shape == one.marginal.shape == (3,) and np.array_equal(one.joint, other.joint)
    # The first by hand.
    rows = np.random.RandomState(4).randint(80, size=80)
    true = FactorModel(2).fit(X)
    joint, marginal = FactorModel(2).fit(X[rows]).divergences(true, np.random.RandomState(0))
    assert (one.joint[0], one.marginal[0]) == pytest.approx((joint, marginal))


@pytest.mark.parametrize(
    "pretrained, supervised, stacked, choice",
    [
        (1.0, 2.0, 1.5, "pretrained"), (2.0, 1.0, 1.5, "supervised"), (1.0, 2.0, 0.99, "pretrained"),
        (1.0, 2.0, 0.9, "stacked"), (2.0, 1.0, 0.9, "stacked"),
    ],
)  # fmt: skip
def test_stacked_is_chosen_where_it_gains_a_standard_error(pretrained, supervised, stacked, choice):
    # The gain of 0.01 or 0.1 has a standard error of sqrt(0.04 / 3) / 2 = 0.0577 over four folds.
    noise = np.array([0.1, -0.1, 0.1, -0.1])
    risks = {"pretrained": pretrained + np.zeros(4), "supervised": supervised + np.zeros(4), "stacked": stacked + noise}
    assert PretrainingReport({}, None, risks).choice == choice
    # Between the errors by n and by n - 1: 0.05 and 0.0577.
    risks["stacked"] = min(pretrained, supervised) - 0.055 + noise
    assert PretrainingReport({}, None, risks).choice != "stacked"


def test_comparison_is_cross_validation_by_hand(random):
    X, y = factors(random, 30, random.normal(size=(6, 2)), np.ones(2))
    unlabeled, _ = factors(random, 50, random.normal(size=(6, 2)), np.ones(2))
    models = {"one": FactorModel(1), "two": FactorModel(2)}
    report = compare_pretraining(
        X, y, models, X_unlabeled=unlabeled, baseline=DummyRegressor(), folds=3, repeats=2, random_state=7
    )
    state, seen = np.random.RandomState(7), np.concatenate([unlabeled, X])
    splits = list(KFold(3, shuffle=True, random_state=state).split(seen))
    for name, model in models.items():
        expected = np.mean([clone(model).fit(seen[kept]).score(seen[out]) for kept, out in splits])
        assert report.likelihoods[name] == pytest.approx(expected)
    chosen = models[max(report.likelihoods, key=report.likelihoods.get)].fit(seen)
    assert np.allclose(report.model.loadings_, chosen.loadings_)
    folds = list(RepeatedKFold(n_splits=3, n_repeats=2, random_state=state).split(X))
    for name, model in (("supervised", DummyRegressor()), ("pretrained", PretrainedFeatures(FrozenEstimator(chosen)))):
        expected = [mean_squared_error(y[out], model.fit(X[kept], y[kept]).predict(X[out])) for kept, out in folds]
        assert report.risks[name] == pytest.approx(expected)
    assert len(report.risks["stacked"]) == 6 and list(report.risks) == ["pretrained", "supervised", "stacked"]


def test_risk_of_classes_is_the_share_of_errors(random):
    X, y = clusters(random, 40, 0.7 * random.normal(size=(4, 3)))
    report = compare_pretraining(X, y, [MixtureModel(3, random_state=0)], folds=2, repeats=2, random_state=0)
    for risks in report.risks.values():
        assert risks.shape == (4,) and np.allclose(20 * risks, np.round(20 * risks)) and 0 < risks.mean() < 1
