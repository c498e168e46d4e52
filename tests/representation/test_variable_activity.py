"""Types of latent variables on constructed posteriors, and the measures against closed forms."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import parametrize_with_checks
from torchmetrics import MetricCollection

from paperworks.representation.posterior_collapse import LinearVAE, linear_vae_solution
from paperworks.representation.variable_activity import (
    ActivityReport,
    PassiveFilter,
    VariableActivity,
    averaged_mutual_information,
    effective_rank,
    gaussian_total_correlation,
    gaussian_wasserstein_correlation,
    representation_report,
)


def types_of(var, mu=None, **options):
    activity = VariableActivity(var.shape[1], **options)
    activity.update(torch.zeros_like(var) if mu is None else mu, var)
    return activity.compute().types.tolist()


def constant(*values, n=50):
    return torch.tensor(values, dtype=torch.float64).expand(n, -1)


def synthetic(active=5, d=12, n=10_000, seed=0):
    """The paper's model: active factors with covariance 0.2, others small, correlated and near the prior."""
    rng = np.random.default_rng(seed)
    C = np.full((d, d), 0.01)
    C[:active, :active] = 0.2
    np.fill_diagonal(C, np.where(np.arange(d) < active, 1.0, 0.02))
    mu = rng.multivariate_normal(np.zeros(d), C, n)
    return mu, np.tile(np.where(np.arange(d) < active, 0.02**2, 1.0), (n, 1))


def test_constructed_variances_give_their_types():
    var = constant(0.01, 1.0, 0.01, 0.5).clone()
    var[::2, 2] = 1.0
    assert types_of(var) == ["active", "passive", "mixed", "mixed"]
    assert types_of(4 * var, prior_std=2.0) == ["active", "passive", "mixed", "mixed"]


def test_boundaries_and_partition():
    assert types_of(constant(0.1, 0.9, 1.1, 1.11, 0.11, 0.89)) == ["active", "passive", "passive", *["mixed"] * 3]
    for d in (1, 2, 9):
        activity = VariableActivity(d)
        activity.update(torch.randn(30, d), 2 * torch.rand(30, d, generator=torch.Generator().manual_seed(d)) + 1e-3)
        report = activity.compute()
        found = np.concatenate([report.indices(kind) for kind in ("active", "mixed", "passive")])
        assert sorted(found) == list(range(d))


def test_total_and_wasserstein_correlation_equal_their_closed_forms():
    r, scale = 0.7, np.diag([3.0, 0.2])
    C = np.array([[1, r], [r, 1]])
    assert gaussian_total_correlation(np.diag([2.0, 0.1])) == pytest.approx(0, abs=1e-12)
    assert gaussian_total_correlation(C) == pytest.approx(-0.5 * math.log(1 - r**2))
    assert gaussian_total_correlation(scale @ C @ scale) == pytest.approx(gaussian_total_correlation(C))
    assert gaussian_wasserstein_correlation(np.diag([2.0, 0.1])) == pytest.approx(0, abs=1e-12)
    expected = 4 - 2 * (math.sqrt(1 + r) + math.sqrt(1 - r))
    assert gaussian_wasserstein_correlation(C) == pytest.approx(expected)
    assert gaussian_wasserstein_correlation(C, normalised=True) == pytest.approx(expected / 2)
    with pytest.warns(RuntimeWarning, match="singular"):
        assert gaussian_total_correlation(np.ones((2, 2))) == math.inf


def test_batches_and_their_order_do_not_matter():
    mu, var = torch.randn(50, 3).double(), torch.rand(50, 3).double() + 0.1
    whole, parts = VariableActivity(3), VariableActivity(3)
    whole.update(mu, var)
    for rows in reversed(torch.arange(50).split(7)):
        parts.update(mu[rows], var[rows])
    one, other = whole.compute(), parts.compute()
    for name in ("mean_variance", "variance_variance", "covariance"):
        np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-9)
    np.testing.assert_allclose(one.covariance, np.cov(mu.numpy(), rowvar=False))
    np.testing.assert_allclose(one.variance_variance, var.numpy().var(0))


def test_mutual_information_leaves_out_a_variable_with_itself_and_permutes():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((20_000, 3))
    assert averaged_mutual_information(Z) < 19**2 / 40_000 * 1.5
    Z[:, 1] += Z[:, 0]
    assert averaged_mutual_information(Z[:, [2, 0, 1]]) == pytest.approx(averaged_mutual_information(Z))
    assert averaged_mutual_information(np.c_[Z[:, 0], np.ones(len(Z))]) == pytest.approx(0, abs=1e-9)
    assert effective_rank(np.diag([1.0, 1.0, 0.0])) == pytest.approx(2)


def test_synthetic_model_correlates_in_the_mean_code_only():
    mu, var = synthetic()
    activity = VariableActivity(12)
    activity.update(torch.tensor(mu), torch.tensor(var))
    report = activity.compute()
    assert report.types.tolist() == ["active"] * 5 + ["passive"] * 7
    table = representation_report(mu, var, random_state=1)
    assert table["full", "mean"]["total_correlation"] > 3 * table["full", "sampled"]["total_correlation"]
    tc = [table["active", code]["total_correlation"] for code in ("mean", "sampled")]
    assert tc[0] == pytest.approx(tc[1], rel=0.05)
    sampled = mu + np.sqrt(var) * np.random.default_rng(2).standard_normal(mu.shape)
    R = np.corrcoef(sampled, rowvar=False)
    assert R[5, 6] == pytest.approx(0.01 / 1.02, abs=4 / math.sqrt(len(mu)))
    C = report.sampled_covariance
    predicted = C / np.sqrt(np.outer(C.diagonal(), C.diagonal()))
    # The largest of 66 sampling errors of 0.01 each.
    assert np.abs(R - predicted).max() < 0.045 and np.sqrt(((R - predicted) ** 2).mean()) < 0.03
    assert set(report.disagreement) == set(range(5, 12))


def test_filter_drops_passive_variables_only():
    mu, var = synthetic(n=200)
    chosen = PassiveFilter().fit(mu, var)
    np.testing.assert_array_equal(chosen.transform(mu), mu[:, :5])
    assert chosen.get_support().sum() == 5 and chosen.get_feature_names_out().tolist() == [f"x{i}" for i in range(5)]
    none = PassiveFilter().fit(mu[:, :5], var[:, :5])
    np.testing.assert_array_equal(none.transform(mu[:, :5]), mu[:, :5])
    with pytest.raises(ValueError, match="allow_empty"):
        PassiveFilter().fit(mu[:, 5:], var[:, 5:])
    assert not PassiveFilter(allow_empty=True).fit(mu[:, 5:], var[:, 5:]).get_support().any()


def test_collapsed_variables_of_a_linear_vae_are_the_passive_ones():
    S = torch.diag(torch.tensor([30.0, 20.0, 0.5, 0.3], dtype=torch.float64))
    model = LinearVAE(4, 4, generator=torch.Generator().manual_seed(0))
    model.fit(S)
    X = torch.randn(200, 4, dtype=torch.float64) * S.diagonal().sqrt()
    activity = VariableActivity.from_encoder(
        lambda x: (model.encode(x)[0], model.log_var.expand(len(x), -1)), [X[:90], X[90:]]
    )
    report = activity.compute()
    passive = report.indices("passive")
    assert len(passive) == linear_vae_solution(S, 4, moments=True).n_collapsed == 2
    np.testing.assert_allclose(report.mean_variance[passive], 1, atol=1e-6)
    np.testing.assert_allclose(report.variance_variance, 0, atol=1e-9)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_means_far_from_zero_lose_no_digits(scale, offset):
    mu = scale * torch.randn(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset
    var = 0.5 + 1e-6 * torch.rand(60, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    activity = VariableActivity(3)
    for rows in torch.arange(60).split(13):
        activity.update(mu[rows], var[rows])
    report, centred = activity.compute(), (mu - offset).numpy()
    # What the offset leaves of the numbers themselves.
    given = 1e-9 + 2 * offset * np.finfo(float).eps / scale
    np.testing.assert_allclose(report.covariance, np.cov(centred, rowvar=False), rtol=0, atol=3 * given * scale**2)
    np.testing.assert_allclose(report.variance_variance, (var - 0.5).numpy().var(0), rtol=1e-4)
    np.testing.assert_allclose(report.mean_variance, var.numpy().mean(0), rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float64(dtype):
    mu, var = (3 * torch.randn(3000, 2)).to(dtype), (torch.rand(3000, 2) + 0.01).to(dtype)
    found, expected = VariableActivity(2), VariableActivity(2)
    found.half().update(mu, var)
    expected.update(mu.double(), var.double())
    one, other = found.compute(), expected.compute()
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True)) and one.covariance.dtype == np.float64
    table = [representation_report(*given) for given in ((mu, var), (mu.double().numpy(), var.double().numpy()))]
    assert table[0] == table[1]


def test_a_batch_by_itself_and_metrics_in_a_collection():
    mu, var = torch.randn(40, 3), constant(0.01, 1.0, 0.5, n=40)
    both = MetricCollection({"plain": VariableActivity(3), "wide": VariableActivity(3, prior_std=2.0, t_mean=0.2)})
    reports = both(mu[:30], var[:30])
    assert reports["plain"].types.tolist() == ["active", "passive", "mixed"]
    np.testing.assert_allclose(reports["plain"].covariance, np.cov(mu[:30].double().numpy(), rowvar=False))
    # One sample has no covariance; it counts nevertheless.
    alone = both(mu[30:31], var[30:31])["plain"]
    assert np.isnan(alone.covariance).all() and alone.mean_variance.tolist() == [0.01, 1.0, 0.5]
    both.update(mu[31:], var[31:])
    both.update(mu[:0], var[:0])
    copied = pickle.loads(pickle.dumps(both))
    for collection in (both, copied):
        found = collection.compute()
        np.testing.assert_allclose(found["plain"].covariance, np.cov(mu.double().numpy(), rowvar=False))
        assert found["wide"].types.tolist() == ["active", "mixed", "active"]
        assert isinstance(found["wide"].plot().axes, list)
    both.reset()
    both.update(mu[:5], var[:5])
    np.testing.assert_allclose(both.compute()["plain"].covariance, np.cov(mu[:5].double().numpy(), rowvar=False))


class _AllActive(PassiveFilter):
    """Variances of 0.01 whatever scikit-learn's checks give for targets."""

    def fit(self, X, y=None):
        shape = getattr(X, "shape", None) or np.asarray(X).shape
        return super().fit(X, np.full(shape, 0.01) if len(shape) == 2 and min(shape) else X)


@parametrize_with_checks([_AllActive()])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_columns_in_another_order_are_refused():
    pd = pytest.importorskip("pandas")
    mu, var = (pd.DataFrame(one[:, [0, 1, 5]], columns=["a", "b", "c"]) for one in synthetic(n=50))
    moved = ["c", "a", "b"]
    fitted = PassiveFilter().fit(mu, var)
    assert fitted.get_feature_names_out().tolist() == ["a", "b"]
    for call in (
        lambda: PassiveFilter().fit(mu, var[moved]),
        lambda: fitted.transform(mu[moved]),
        lambda: representation_report(mu, var[moved]),
    ):
        with pytest.raises(ValueError, match="feature names"):
            call()
    assert representation_report(mu, var) == representation_report(mu.to_numpy(), var.to_numpy())


def test_collinear_and_constant_variables():
    z = np.random.default_rng(0).standard_normal((100, 3))
    for code in (z[:, [0, 1, 0]], np.c_[z[:, :2], z[:, 0] + z[:, 1]], 1e5 + 1e-3 * z[:, [0, 1, 0]]):
        with pytest.warns(RuntimeWarning, match="singular"):
            assert gaussian_total_correlation(np.cov(code, rowvar=False)) == math.inf
    C = np.cov(z, rowvar=False)
    with_constant = np.pad(C, ((0, 1), (0, 1)))
    assert gaussian_total_correlation(with_constant) == pytest.approx(gaussian_total_correlation(C), rel=1e-9)
    assert gaussian_wasserstein_correlation(with_constant, normalised=True) == pytest.approx(
        gaussian_wasserstein_correlation(C, normalised=True), rel=1e-6
    )
    assert (
        gaussian_total_correlation(np.zeros((2, 2)))
        == gaussian_wasserstein_correlation(np.zeros((2, 2)), normalised=True)
        == 0
    )
    # By their correlation, 1e-7 from singular, in any unit.
    for scale in (1e-8, 1.0, 1e8):
        near = scale * np.array([[1, 1 - 1e-7], [1 - 1e-7, 1]])
        assert gaussian_total_correlation(near) == pytest.approx(-0.5 * math.log(2e-7 - 1e-14), rel=1e-6)
    table = representation_report(np.zeros((20, 3)), np.full((20, 3), 0.05))
    assert table["full", "mean"] == {"total_correlation": 0, "wasserstein": 0, "mutual_information": pytest.approx(0)}
    assert table["full", "sampled"]["effective_rank"] > 1


def test_bad_input_is_one_sentence():
    good = torch.ones(4, 2)
    for call, words in [
        (lambda: VariableActivity(0), "dims"),
        (lambda: VariableActivity(2, t_mean=0.5), "t_mean"),
        (lambda: VariableActivity(2).update(good, -good), "not log-variances"),
        (lambda: VariableActivity(2).update(good, good * torch.nan), "NaN"),
        (lambda: types_of(good[:1]), "at least two"),
        (lambda: PassiveFilter(keep=["busy"]).fit(good, good), "choose among"),
        (lambda: averaged_mutual_information(np.ones((3, 1))), "two columns"),
        (lambda: averaged_mutual_information(np.full((3, 2), np.nan)), "Z holds NaN"),
        (lambda: gaussian_total_correlation(np.ones((3, 2))), "covariance matrix"),
        (lambda: gaussian_total_correlation(np.full((2, 2), np.nan)), "finite numbers"),
        (lambda: gaussian_wasserstein_correlation([[1, 2], [0, 1]]), "not symmetric"),
        (lambda: gaussian_wasserstein_correlation([[-1, 0], [0, 1]]), "negative variances"),
        (lambda: effective_rank(np.zeros((2, 2))), "all zero"),
        (lambda: VariableActivity(2.5), "dims"),
        (lambda: VariableActivity(2, t_mean=0.0), "t_mean"),
        *((lambda name=name, value=value: VariableActivity(2, **{name: value}), name)
          for name in ("prior_std", "t_var") for value in (0.0, -1.0, math.inf)),
        (lambda: PassiveFilter().fit(good[:1], good[:1]), "minimum of 2"),
        (lambda: averaged_mutual_information(np.ones(4)), "two columns"),
        (lambda: averaged_mutual_information(np.ones((0, 2))), "two columns"),
        (lambda: averaged_mutual_information(np.ones((3, 2)), bins=0), "at least one bin"),
        (lambda: averaged_mutual_information([[0, 1], [1, math.inf]]), "Z holds NaN or infinity"),
        (lambda: gaussian_total_correlation(np.ones((2, 2, 2))), "covariance matrix"),
        (lambda: effective_rank(np.ones(3)), "covariance matrix"),
        (lambda: effective_rank(np.zeros((0, 0))), "covariance matrix"),
        (lambda: effective_rank([[1, 0], [0, math.inf]]), "finite numbers"),
        (lambda: gaussian_total_correlation([[1, 0.5], [0.49, 1]]), "not symmetric"),
        (lambda: representation_report(np.ones((4, 2)), np.ones((4, 3))), "expecting 2 features"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_report_draws_every_type():
    activity = VariableActivity(3)
    activity.update(torch.randn(20, 3), constant(0.01, 1.0, 0.5, n=20))
    assert len(activity.compute().plot().axes[0].collections) == 3


def test_variance_of_the_variance_is_small_below_a_tenth():
    # Means of 1 and variances of 0.31^2 = 0.0961 and 0.32^2 = 0.1024 over data.
    var = torch.tensor([[1.31, 1.32], [0.69, 0.68]], dtype=torch.float64).repeat(10, 1)
    assert types_of(var) == ["passive", "mixed"] and types_of(var, t_var=0.11) == ["passive", "passive"]
    assert types_of(var, t_var=0.09) == ["mixed", "mixed"]
    assert types_of(constant(0.3, 0.35, 0.65, 0.7, 1.3, 1.35), t_mean=0.32) == [
        "active", "mixed", "mixed", "passive", "passive", "mixed",
    ]  # fmt: skip
    # In units of the prior's variance, of 0.25.
    assert types_of(constant(0.025, 0.026, 0.225, 0.275), prior_std=0.5) == ["active", "mixed", "passive", "passive"]


def test_report_holds_the_moments_of_means_and_variances_in_the_priors_units():
    generator = torch.Generator().manual_seed(0)
    mu = torch.randn(30, 3, dtype=torch.float64, generator=generator)
    var = torch.rand(30, 3, dtype=torch.float64, generator=generator) + 0.1
    activity = VariableActivity(3, prior_std=2.0)
    activity.update(mu, var)
    report, C = activity.compute(), np.cov(mu.numpy() / 2, rowvar=False)
    np.testing.assert_allclose(report.mean_variance, var.numpy().mean(0) / 4)
    np.testing.assert_allclose(report.variance_variance, var.numpy().var(0) / 16)
    np.testing.assert_allclose(report.covariance, C)
    np.testing.assert_allclose(report.mu_variance, C.diagonal())
    np.testing.assert_allclose(report.sampled_covariance, C + np.diag(var.numpy().mean(0) / 4))


def test_two_samples_are_enough_and_each_batch_counts_once():
    mu, var = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.2], [0.4]])
    activity = VariableActivity(1)
    for row in range(2):
        activity.update(mu[row : row + 1], var[row : row + 1])
    report = activity.compute()
    assert report.mu_variance == pytest.approx([4.5]) and report.variance_variance == pytest.approx([0.01])
    assert PassiveFilter().fit(torch.tensor([[0.0, 1], [1, 0]]), torch.full((2, 2), 0.01)).get_support().all()


def test_disagreement_is_of_passive_variables_that_vary_and_others_that_do_not():
    types, varied = np.array(["passive", "passive", "active", "mixed", "active"]), [0.011, 0.01, 0.009, 0.011, 0.011]
    report = ActivityReport(types, *[np.zeros(5)] * 2, np.array(varied), *[np.zeros((5, 5))] * 2)
    assert report.disagreement.tolist() == [0, 2]
    assert report.indices("mixed", "passive").tolist() == [0, 1, 3] and report.indices("active").tolist() == [2, 4]


@pytest.mark.parametrize("bins", [None, 1, 7])
def test_mutual_information_is_that_of_a_histogram(bins):
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((300, 3)) @ np.array([[1.0, 0.8, 0], [0, 0.6, 0.5], [0, 0, 1]])
    found = []
    for i, j in ((0, 1), (0, 2), (1, 2)):
        counts = np.histogram2d(Z[:, i], Z[:, j], bins or 20)[0] / len(Z)
        apart = np.outer(counts.sum(1), counts.sum(0))
        found.append((counts[counts > 0] * np.log(counts[counts > 0] / apart[counts > 0])).sum())
    told = averaged_mutual_information(Z, **({} if bins is None else {"bins": bins}))
    assert told == pytest.approx(np.mean(found), rel=1e-9, abs=1e-12)
    # A pair of sample sizes, in any unit and anywhere.
    moved = averaged_mutual_information(1e-3 * Z + 5, **({} if bins is None else {"bins": bins}))
    assert moved == pytest.approx(told, rel=1e-9, abs=1e-12)


def test_effective_rank_is_the_exponential_of_the_entropy_of_eigenvalues():
    values = np.array([3.0, 1.5, 0.5, 0.0])
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    share = values[:3] / 5
    assert effective_rank(Q * values @ Q.T) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-9)
    assert effective_rank(0.2 * np.eye(3)) == pytest.approx(3) and effective_rank([[0.5]]) == 1
    # Symmetric but for rounding of the largest.
    assert effective_rank([[1e3, 1e-5], [0.0, 1e3]]) == pytest.approx(2)


def test_correlations_of_three_variables_equal_determinant_and_matrix_root():
    A = np.random.default_rng(1).standard_normal((3, 3))
    C = A @ A.T
    expected = (np.log(C.diagonal()).sum() - np.linalg.slogdet(C)[1]) / 2
    assert gaussian_total_correlation(torch.tensor(C)) == pytest.approx(expected, rel=1e-9)
    root = np.sqrt(np.diag(C.diagonal()))
    values, vectors = np.linalg.eigh(root @ C @ root)
    distance = 2 * C.trace() - 2 * np.trace(vectors * np.sqrt(values) @ vectors.T)
    assert gaussian_wasserstein_correlation(C) == pytest.approx(distance, rel=1e-9)
    assert gaussian_wasserstein_correlation(0.01 * C) == pytest.approx(0.01 * distance, rel=1e-9)
    assert gaussian_wasserstein_correlation(0.01 * C, normalised=True) == pytest.approx(distance / C.trace(), rel=1e-9)


def test_report_of_dependence_is_that_of_each_groups_own_columns():
    rng = np.random.default_rng(3)
    mu = rng.standard_normal((80, 5)) @ rng.standard_normal((5, 5))
    var = np.tile([0.01, 0.05, 1.0, 0.95, 0.5], (80, 1))
    table = representation_report(mu, var)
    groups = {
        "full": [0, 1, 2, 3, 4], "active": [0, 1], "passive": [2, 3], "active+mixed": [0, 1, 4],
        "active+passive": [0, 1, 2, 3], "mixed+passive": [2, 3, 4],
    }  # fmt: skip
    codes = {"mean": mu, "sampled": mu + np.sqrt(var) * np.random.default_rng(0).standard_normal((80, 5))}
    assert set(table) == {(group, code) for group in groups for code in codes}
    for (group, code), told in table.items():
        Z = codes[code][:, groups[group]]
        C = np.cov(Z, rowvar=False)
        assert told == {
            "total_correlation": pytest.approx((np.log(C.diagonal()).sum() - np.linalg.slogdet(C)[1]) / 2, rel=1e-9),
            "wasserstein": pytest.approx(gaussian_wasserstein_correlation(C) / C.trace(), rel=1e-9),
            "mutual_information": pytest.approx(averaged_mutual_information(Z, 20), rel=1e-9),
            "effective_rank": pytest.approx(effective_rank(C), rel=1e-9),
        }
    other = representation_report(mu, var, random_state=5)
    assert other["full", "mean"] == table["full", "mean"] and other["full", "sampled"] != table["full", "sampled"]


def test_filter_keeps_what_it_is_told_and_takes_tensors():
    mu, var = torch.randn(20, 3, requires_grad=True), torch.tensor([0.01, 1.0, 0.5]).expand(20, 3)
    for keep, kept in (
        (("passive",), [1]),
        (["mixed", "passive"], [1, 2]),
        (("active", "mixed", "passive"), [0, 1, 2]),
    ):
        assert PassiveFilter(keep=keep).fit(mu, var).get_support(indices=True).tolist() == kept
    assert PassiveFilter().fit(mu.bfloat16(), var.bfloat16()).get_support().tolist() == [True, False, True]
    with pytest.raises(NotFittedError):
        PassiveFilter().get_support()
    # Variances take the place of targets, without which a pipeline cannot fit it.
    assert get_tags(PassiveFilter()).target_tags.required
