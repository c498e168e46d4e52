"""Closed forms against brute-force minimisation, and the meter against constructed posteriors."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import multivariate_normal
from torch import nn
from torchmetrics import MetricCollection

from paperworks.representation.posterior_collapse import (
    LinearCVAE,
    LinearHVAE2,
    LinearVAE,
    PosteriorCollapse,
    linear_cvae_solution,
    linear_hvae_solution,
    linear_vae_solution,
)

THETA = torch.tensor([2.00, 1.40, 1.00, 0.69], dtype=torch.float64)
SETTING = {"beta": 1.3, "eta_enc": 0.8, "eta_dec": 0.7}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def moment(theta=THETA, seed=0):
    Q = torch.linalg.qr(torch.randn(len(theta), len(theta), generator=seeded(seed), dtype=torch.float64)).Q
    return Q @ torch.diag(theta**2) @ Q.mT


def data(S, n=64, seed=1):
    """Rows with exactly this second moment."""
    Q = torch.linalg.qr(torch.randn(n, len(S), generator=seeded(seed), dtype=torch.float64)).Q
    return math.sqrt(n) * Q @ torch.linalg.cholesky(S).mT


def whitened(W, S):
    values, P = torch.linalg.eigh(S)
    return torch.linalg.svdvals(W @ P * values.sqrt())


def close(found, expected, atol=1e-3):
    torch.testing.assert_close(
        torch.as_tensor(found).detach().double(), torch.as_tensor(expected).double(), atol=atol, rtol=0
    )


def exact(solution, model, names, S):
    """The closed form's weights reach the loss of the fitted ones."""
    with torch.no_grad():
        for name, other in names.items():
            getattr(model, name).copy_(solution.weights[other])
        model.log_var.copy_(2 * solution.posterior_std.log())
        return float(model.exact_loss(S))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_minimising_the_exact_loss_of_the_vae_reproduces_the_closed_form(seed):
    S = moment()
    model = LinearVAE(4, 4, generator=seeded(seed), **SETTING)
    loss = model.fit(S)
    solution = linear_vae_solution(S, 4, moments=True, **SETTING)
    close(torch.linalg.svdvals(model.U1), solution.decoder)
    close(whitened(model.W2, S), solution.encoder)
    close(model.log_var.exp().sqrt().sort().values, solution.posterior_std)
    assert solution.n_collapsed == 1
    assert exact(solution, model, {"U1": "U", "W2": "W"}, S) == pytest.approx(loss, abs=1e-8)


def test_adam_on_the_exact_loss_ends_at_the_closed_form_too():
    S = moment()
    model = LinearVAE(4, 4, generator=seeded(5), **SETTING)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.numel()], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 1500)
    for _ in range(1500):
        optimizer.zero_grad()
        model.exact_loss(S).backward()
        optimizer.step()
        schedule.step()
    solution = linear_vae_solution(S, 4, moments=True, **SETTING)
    close(torch.linalg.svdvals(model.U1), solution.decoder)
    close(model.log_var.exp().sqrt().sort().values, solution.posterior_std)


@pytest.mark.parametrize("sigma", [0.3, 0.9, [0.2, 0.4, 0.7, 0.9]])
def test_minimising_with_fixed_variance_reproduces_the_closed_form(sigma):
    S = moment()
    model = LinearVAE(4, 4, sigma=0.5, generator=seeded(2), **SETTING)
    with torch.no_grad():
        model.log_var.copy_(2 * torch.as_tensor(sigma, dtype=torch.float64).expand(4).log())
    loss = model.fit(S)
    solution = linear_vae_solution(S, 4, sigma=sigma, moments=True, **SETTING)
    close(torch.linalg.svdvals(model.U1), solution.decoder)
    close(whitened(model.W2, S), solution.encoder.sort(descending=True).values)
    assert exact(solution, model, {"U1": "U", "W2": "W"}, S) == pytest.approx(loss, abs=1e-8)


def conditional(seed=0):
    """Samples (x, y) whose residual has the eigenvalues of theta squared."""
    own = seeded(seed)
    joint = data(torch.eye(7, dtype=torch.float64), seed=seed)
    x, noise = joint[:, :3], joint[:, 3:] @ torch.linalg.cholesky(moment()).mT
    B = torch.randn(4, 3, generator=own, dtype=torch.float64)
    return x, x @ B.mT + noise, B


@pytest.mark.parametrize("seed", [0, 1])
def test_minimising_the_exact_loss_of_the_cvae_reproduces_the_closed_form(seed):
    x, y, B = conditional()
    joint = torch.cat([x, y], 1)
    S = joint.mT @ joint / len(x)
    model = LinearCVAE(3, 4, 4, generator=seeded(seed), **SETTING)
    loss = model.fit(S)
    solution = linear_cvae_solution(x, y, 4, **SETTING)
    close(solution.spectrum, THETA**2, 1e-9)
    close(torch.linalg.svdvals(model.U1), solution.decoder)
    close(model.log_var.exp().sqrt().sort().values, solution.posterior_std)
    close(model.U2, B)
    names = {"U1": "U1", "U2": "U2", "W1": "W1", "W2": "W2"}
    assert exact(solution, model, names, S) == pytest.approx(loss, abs=1e-8)
    # What the meter measures on the data is what the closed form says of each variable.
    fitted = LinearCVAE(3, 4, 4, generator=seeded(seed), **SETTING)
    fitted.fit(S)
    report = PosteriorCollapse.from_encoder(
        lambda rows: tuple((v if i == 0 else v.log()) for i, v in enumerate(fitted.encode(rows[:, 3:], rows[:, :3]))),
        [joint[:20], joint[20:]],
        prior_std=0.8,
    ).compute()
    close(sorted(report.kl, reverse=True), solution.kl)


def test_cvae_threshold_is_beta_eta_dec_squared_and_sigma_is_continuous():
    def std(variance):
        y = data(torch.tensor([[variance]], dtype=torch.float64))
        return float(linear_cvae_solution(torch.zeros_like(y), y, 1, **SETTING).posterior_std)

    # Between beta eta_dec^2 = 0.637 and sqrt(beta) eta_dec = 0.798.
    assert std(0.7956) == pytest.approx(0.7158, abs=1e-4)
    assert std(0.6369) == pytest.approx(0.8) and std(0.6371) == pytest.approx(0.8, abs=1e-4)


def test_cvae_regresses_and_codes_the_residual():
    x, y, _ = conditional()
    solution = linear_cvae_solution(x, y, 4, **SETTING)
    weights = solution.weights
    close(weights["U2"], (y.mT @ x) @ torch.linalg.inv(x.mT @ x), 1e-6)
    close(weights["W1"] + weights["W2"] @ weights["U2"], torch.zeros(4, 3), 1e-6)
    model = LinearCVAE(3, 4, 4, generator=seeded(3), **SETTING)
    joint = torch.cat([x, y], 1)
    model.fit(joint.mT @ joint / len(x))
    close(model.W1 + model.W2 @ model.U2, torch.zeros(4, 3), 1e-5)
    same = linear_cvae_solution(y, y, 3, **SETTING)
    assert same.n_collapsed == 3 and not same.weights["U1"].any() and (same.posterior_std == 0.8).all()
    both = data(torch.block_diag(torch.eye(3, dtype=torch.float64), moment()))
    apart = linear_cvae_solution(both[:, :3], both[:, 3:], 4, **SETTING)
    plain = linear_vae_solution(both[:, 3:], 4, **SETTING)
    for name in ("spectrum", "decoder", "posterior_std", "kl"):
        close(getattr(apart, name), getattr(plain, name), 1e-9)


def test_correlated_condition_leaves_one_minus_rho_squared():
    joint = data(torch.eye(6, dtype=torch.float64))
    y, noise = joint[:, :3], joint[:, 3:]
    solution = linear_cvae_solution(0.6 * y + 0.8 * noise, y, 3, eta_dec=0.5)
    close(solution.spectrum, torch.full((3,), 0.64), 1e-7)


def test_unit_setting_is_probabilistic_pca():
    S = moment(torch.tensor([2.0, 1.5, 1.0, 0.8, 0.5], dtype=torch.float64))
    values = torch.linalg.eigvalsh(S).flip(0)
    noise = float(values[2:].mean())
    U = linear_vae_solution(S, 2, eta_dec=math.sqrt(noise), moments=True).weights["U"]
    model = U @ U.mT + noise * torch.eye(5, dtype=torch.float64)
    X = data(S)
    from sklearn.decomposition import PCA

    X = X - X.mean(0)
    S = X.mT @ X / (len(X) - 1)
    values = torch.linalg.eigvalsh(S).flip(0)
    noise = float(values[2:].mean())
    U = linear_vae_solution(S, 2, eta_dec=math.sqrt(noise), moments=True).weights["U"]
    expected = PCA(2).fit(X.numpy()).get_covariance()
    close(U @ U.mT + noise * torch.eye(5, dtype=torch.float64), expected, 1e-9)
    likelihood = multivariate_normal(cov=expected).logpdf(X.numpy()).sum()
    assert likelihood > multivariate_normal(cov=model.numpy() * 1.1).logpdf(X.numpy()).sum()


def test_fixed_variance_loses_rank_without_collapse_and_learnt_variance_collapses():
    S = moment()
    fixed = LinearVAE(4, 4, sigma=0.9, generator=seeded(1), **SETTING)
    fixed.fit(S)
    solution = linear_vae_solution(S, 4, sigma=0.9, moments=True, **SETTING)
    assert solution.rank < 4 and solution.n_collapsed == 0
    assert int((torch.linalg.svdvals(fixed.W2.detach()) > 1e-3).sum()) == solution.rank
    assert (fixed.W2.norm(dim=1) > 0.01).all()
    learnt = LinearVAE(4, 4, generator=seeded(1), **SETTING)
    learnt.fit(S)
    assert int((learnt.W2.norm(dim=1) < 1e-3).sum()) == linear_vae_solution(S, 4, moments=True, **SETTING).n_collapsed


def hvae(theta, sigma1, beta1, beta2, sigma2=None, d2=None, seeds=(0, 1)):
    S, d2 = moment(theta), d2 or len(theta)
    options = {"beta1": beta1, "beta2": beta2, "eta_enc": 0.8, "eta_dec": 0.7, "sigma1": sigma1, "sigma2": sigma2}
    models = [LinearHVAE2(4, 4, d2, generator=seeded(seed), **options) for seed in seeds]
    losses = [model.fit(S) for model in models]
    best = min(range(len(models)), key=losses.__getitem__)
    return S, models[best], losses[best], linear_hvae_solution(S, 4, d2, moments=True, **options)


@pytest.mark.parametrize("case", [(0.9, 1, 1), (0.5, 1, 1), (0.5, 2, 1), (0.5, 1, 2), (0.9, 3, 1.5)])
def test_hvae_cases_of_every_branch_match(case):
    S, model, loss, solution = hvae(THETA, *map(float, case))
    close(whitened(model.W1, S), solution.encoder.sort(descending=True).values)
    close(torch.linalg.svdvals(model.U2), solution.top_decoder.sort(descending=True).values)
    close(model.log_var.exp().sqrt().sort().values, solution.posterior_std.sort().values)
    names = {name: name for name in ("U1", "U2", "W1", "W2")}
    meter = PosteriorCollapse(4, prior_std=0.8)
    meter.update(*model.encode(data(S)))
    close(sorted(meter.compute().kl, reverse=True), solution.kl.sort(descending=True).values)
    assert exact(solution, model, names, S) == pytest.approx(loss, abs=1e-7)


def test_hvae_with_both_variances_fixed():
    S, model, loss, solution = hvae(THETA, 0.5, 2.0, 0.7, sigma2=1.0)
    # The reference's theta is given to two decimals.
    close(solution.top_decoder, torch.tensor([0.4938, 0.3669, 0.2344, 0.0]), 2e-3)
    close(torch.linalg.svdvals(model.U2), solution.top_decoder)
    close(whitened(model.W1, S), solution.encoder)
    names = {name: name for name in ("U1", "U2", "W1", "W2")}
    assert exact(solution, model, names, S) == pytest.approx(loss, abs=1e-7)


@pytest.mark.parametrize("sigma2", [None, 0.3])
def test_hvae_with_fewer_variables_above(sigma2):
    S, model, loss, solution = hvae(THETA, 0.9, 1.5, 1.0, sigma2=sigma2, d2=2)
    close(torch.linalg.svdvals(model.U2), solution.top_decoder)
    names = {name: name for name in ("U1", "U2", "W1", "W2")}
    assert exact(solution, model, names, S) == pytest.approx(loss, abs=1e-7)


def loss_of(solution, model, S):
    return exact(solution, model, {name: name for name in ("U1", "U2", "W1", "W2")}, S)


def test_hvae_at_the_edge_of_its_threshold_is_still_used():
    S = torch.diag(torch.tensor([4.0, 2.0]))
    solution = linear_hvae_solution(S, 2, 2, sigma1=1.0, moments=True)
    for values in (solution.encoder, solution.top_decoder):
        assert values.tolist() == pytest.approx([3**0.5, 1.0], rel=1e-12)
    assert solution.n_collapsed == 0 and solution.rank == 2
    assert loss_of(solution, LinearHVAE2(2, 2, 2, sigma1=1.0), S) == pytest.approx(8.0794, abs=1e-4)


# Sizes; beta1, beta2, eta_enc, eta_dec, sigma1, sigma2; those of None, None are at the edge, sigma1^2 = beta2 s^2 / beta1.
HVAES = [
    ((2, 2, 2), (1.0, 1.0, 1.0, 0.7, 0.7, None)),
    ((3, 3, 2), (2.0, 0.5, 0.8, 1.0, 0.5, None)),
    ((2, 3, 3), (0.5, 2.0, 1.5, 0.7, 1.4, None)),
    ((3, 2, 3), (1.0, 1.0, 0.8, 0.4, 0.3, 0.6)),
    ((2, 2, 2), (1.5, 0.7, 1.0, 1.0, (0.7 / 1.5) ** 0.5 * 0.6, 0.6)),
    ((3, 4, 2), (2.0, 0.6, 1.5, 1.3, 0.5, 0.3)),
    ((3, 3, 3), (0.6, 1.8, 1.0, 0.7, 0.5, 1.0)),
    ((2, 2, 1), (1.7, 1.1, 0.8, 0.7, 1.0, 1.0)),
]


@pytest.mark.parametrize("sizes, values", HVAES)
def test_hvae_is_no_worse_than_random_restarts(sizes, values):
    options = dict(zip(("beta1", "beta2", "eta_enc", "eta_dec", "sigma1", "sigma2"), values, strict=True))
    S = moment(torch.tensor([2.1, 1.1, 0.4], dtype=torch.float64)[: sizes[0]])
    found = min(LinearHVAE2(*sizes, generator=seeded(seed), **options).fit(S, 1000) for seed in range(4))
    solution = linear_hvae_solution(S, *sizes[1:], moments=True, **options)
    assert loss_of(solution, LinearHVAE2(*sizes, **options), S) == pytest.approx(found, abs=1e-6)


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_single_precision_cuts_no_spectrum(sigma):
    variances = torch.tensor([1e4, 4e-4, 1e-6], dtype=torch.float64)
    S = torch.diag(variances).float()
    solution = linear_vae_solution(S, 3, eta_dec=1e-2, sigma=sigma, moments=True)
    close(solution.spectrum, variances, 1e-9)
    two = linear_hvae_solution(S, 3, 3, eta_dec=1e-2, sigma1=1e-2, moments=True)
    close(two.spectrum, variances, 1e-9)
    if sigma is None:
        assert solution.decoder.tolist() == pytest.approx([(1e4 - 1e-4) ** 0.5, (4e-4 - 1e-4) ** 0.5, 0.0], rel=1e-6)
        assert solution.n_collapsed == 1
    X = data(torch.diag(variances))
    close(linear_vae_solution(X.float(), 3, eta_dec=1e-2).spectrum[1:], variances[1:], 1e-8)
    y = torch.cat([X, X[:, :1] * 1e-3], 1).float()
    assert linear_cvae_solution(torch.zeros(len(X), 1), y, 4, eta_dec=1e-2).n_collapsed == 2


def test_columns_of_very_different_scales_keep_their_digits():
    scales = torch.tensor([1e3, 1.0, 1e-3], dtype=torch.float64)
    X = math.sqrt(64) * torch.linalg.qr(torch.randn(64, 3, generator=seeded(), dtype=torch.float64)).Q * scales
    for solution in (
        linear_vae_solution(X, 3, eta_dec=1e-4),
        linear_cvae_solution(torch.ones(64, 1) * 0, X, 3, eta_dec=1e-4),
    ):
        torch.testing.assert_close(solution.spectrum, scales**2, rtol=1e-9, atol=0)
    # A condition that is the output leaves nothing, whatever its scale and offset.
    shifted = X + 1e5
    solution = linear_cvae_solution(shifted, shifted, 3, eta_dec=1e-6)
    assert solution.n_collapsed == 3 and not solution.spectrum.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_rounded_in_the_data_alone(dtype):
    X = (300 * data(moment())).to(dtype)
    x, y = X[:, :2], X[:, 2:]
    for half, full in (
        (linear_vae_solution(X, 4), linear_vae_solution(X.double(), 4)),
        (linear_cvae_solution(x, y, 2), linear_cvae_solution(x.double(), y.double(), 2)),
        (linear_hvae_solution(X, 3, 2), linear_hvae_solution(X.double(), 3, 2)),
    ):
        assert torch.equal(half.kl, full.kl) and torch.equal(half.spectrum, full.spectrum)
    vae = LinearVAE(4, 2, generator=seeded())
    assert torch.equal(vae.loss(X, generator=seeded(1)), vae.loss(X.double(), generator=seeded(1)))
    two = LinearHVAE2(4, 2, 2, generator=seeded())
    assert torch.equal(two.loss(X, generator=seeded(1)), two.loss(X.double(), generator=seeded(1)))
    assert torch.equal(two.encode(X)[0], two.encode(X.double())[0])


def test_data_frames_lists_and_numpys_whole_numbers_are_taken():
    X = data(moment())
    for other in (X.numpy(), pd.DataFrame(X.numpy()), X.tolist()):
        assert torch.equal(linear_vae_solution(other, np.int64(3)).kl, linear_vae_solution(X, 3).kl)
    meter = PosteriorCollapse(np.int64(2))
    meter.update(np.zeros((3, 2)), np.ones((3, 2)))
    assert meter.compute().active_units == 0


def test_a_sure_encoder_in_half_precision_has_not_collapsed():
    encoder = nn.Linear(2, 2).half()
    with torch.no_grad():
        encoder.weight.zero_()

    def encode(x):
        return encoder(x.half()), torch.full((len(x), 2), -20.0, dtype=torch.float16)

    report = PosteriorCollapse.from_encoder(encode, [torch.ones(5, 2)]).compute()
    assert report.active_units == 1 and (report.kl > 9).all()


def test_an_encoder_keeps_its_modes_and_its_devices_batches():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.drop = nn.BatchNorm1d(2), nn.Dropout(0.5)

        def encode(self, x):
            assert not self.training and not self.norm.training
            return self.drop(self.norm(x)), torch.zeros_like(x)

    encoder = Encoder().train()
    encoder.norm.eval()
    PosteriorCollapse.from_encoder(encoder.encode, [torch.ones(5, 2)])
    assert [module.training for module in encoder.modules()] == [True, False, True]
    with pytest.raises(TypeError, match="gives a Tensor: two tensors, means and log-variances"):
        PosteriorCollapse.from_encoder(lambda x: x, [torch.ones(5, 2)])


def test_a_unit_is_active_from_a_hundredth_of_a_nat():
    # Divergences of 0.009, 0.011 and 0.09: mu^2 / 2 where the variance is the prior's.
    mu = torch.tensor([0.009, 0.011, 0.09]).mul(2).sqrt().expand(8, 3)
    meter = PosteriorCollapse(3)
    meter.update(mu, torch.ones(8, 3))
    report = meter.compute()
    assert report.active_units == pytest.approx(2 / 3)
    assert report.collapsed().tolist() == [True, False, False] and report.collapsed(0.1).all()
    assert report.epsilons.tolist() == pytest.approx([0.01, *(0.1 * number for number in range(1, 61))])


def test_two_meters_of_one_collection_keep_their_own_levels():
    collected = MetricCollection({f"at {level}": PosteriorCollapse(1, epsilons=[level]) for level in (1, 2)})
    for mean in (9.0, 1.7):
        collected.update(torch.full((4, 1), mean), torch.ones(4, 1))
    told = collected.compute()
    assert told["at 1"].below[1].tolist() == [0.0] and told["at 2"].below[1].tolist() == [0.5]


def test_meter_and_closed_form_take_the_priors_scale():
    meter = PosteriorCollapse(1, prior_std=2.0)
    meter.update(torch.full((3, 1), 1.0), torch.full((3, 1), 0.5))
    ratio = 0.5 / 4
    assert meter.compute().kl[0] == pytest.approx(0.5 * (1 / 4 + ratio - math.log(ratio) - 1))
    # Whatever the prior's scale, the divergence of a linear VAE is the same.
    one, other = (linear_vae_solution(moment(), 4, eta_enc=eta, moments=True) for eta in (0.5, 3.0))
    close(one.kl, other.kl, 1e-12)
    close(one.posterior_std / 0.5, other.posterior_std / 3.0, 1e-12)


def test_sizes_and_spectra_out_of_range_are_one_sentence():
    S = moment()
    for call, words in [
        (lambda: linear_vae_solution(torch.diag(torch.tensor([1.0, -0.5])), 1, moments=True), "the eigenvalue -0.5"),
        (lambda: linear_vae_solution(S, 2.5, moments=True), "d is 2.5"),
        (lambda: linear_vae_solution(S, 4, sigma=[0.1, 0.2], moments=True), "one for each of 4"),
        (lambda: LinearVAE(4, 2, sigma=0.0), "sigma is 0"),
        (lambda: LinearHVAE2(4, 2, 2, sigma2=0.0), "sigma2 is 0"),
        (lambda: LinearHVAE2(0, 2, 2), "dim is 0"),
        (lambda: LinearCVAE(-1, 2, 2), "x_dim is -1"),
        (lambda: LinearVAE(4, 2).fit(S[:3, :3]), r"has shape \(3, 3\): give \(4, 4\)"),
        (lambda: LinearHVAE2(4, 2, 2).exact_loss(S[:3, :3]), r"has shape \(3, 3\): give \(4, 4\)"),
        (lambda: LinearVAE(4, 2).loss(torch.ones(5, 3)), r"the model takes \(n, 4\) given \(n, 0\)"),
        (lambda: LinearCVAE(2, 4, 2).loss(torch.ones(5, 4)), r"the model takes \(n, 4\) given \(n, 2\)"),
        (lambda: LinearHVAE2(4, 2, 2).loss(torch.ones(5, 3)), r"the model takes \(n, 4\)"),
        (lambda: PosteriorCollapse(2).update(torch.ones(3), torch.ones(3)), "give both"),
        (lambda: LinearCVAE(2, 0, 2), "y_dim 0"),
        (lambda: LinearVAE(4, 0), "d is 0"),
        (lambda: LinearHVAE2(4, 2, 2, beta2=0.0), "beta2 is 0"),
        (lambda: linear_hvae_solution(S, 2, 2, sigma2=-1.0, moments=True), "sigma2 is -1"),
        (lambda: linear_cvae_solution(S, S, 0), "d is 0"),
        (lambda: linear_vae_solution(S, 4, eta_enc=math.inf, moments=True), "eta_enc is inf"),
        (lambda: linear_vae_solution(S, 4, sigma=math.inf, moments=True), "sigma is inf"),
        (lambda: linear_vae_solution(S[0], 4), "samples as rows"),
        (lambda: PosteriorCollapse(0), "dims is 0"),
        (lambda: PosteriorCollapse(2, prior_std=0.0), "prior_std is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()
    for call in (
        lambda: linear_vae_solution([["a"]], 1),
        lambda: linear_vae_solution(S, 4, sigma="wide", moments=True),
        lambda: PosteriorCollapse(2).update("mu", "var"),
    ):
        with pytest.raises(TypeError, match="give real numbers"):
            call()


def test_meter_of_the_prior_and_of_sharp_posteriors():
    meter = PosteriorCollapse(3, prior_std=2.0)
    meter.update(torch.zeros(10, 3), torch.full((10, 3), 4.0))
    report = meter.compute()
    assert report.active_units == 0 and report.collapsed().all() and not report.kl.any()
    meter = PosteriorCollapse(3)
    signs = torch.tensor([3.0, -3.0]).repeat(5)[:, None].expand(10, 3)
    meter.update(signs, torch.full((10, 3), 0.01))
    report = meter.compute()
    assert report.active_units == 1 and not report.collapsed(6.0).any()
    assert report.kl[0] == pytest.approx(0.5 * (9 + 0.01 - math.log(0.01) - 1))


def test_collapse_is_counted_over_samples():
    mu = torch.zeros(100, 2)
    mu[:6, 0] = 1.0  # a divergence of one half on 6 % of the samples
    mu[:5, 1] = 1.0
    meter = PosteriorCollapse(2)
    meter.update(mu, torch.ones(100, 2))
    assert meter.compute().collapsed().tolist() == [False, True]
    assert meter.compute().collapsed(1.0).all()


def test_batches_and_their_order_do_not_matter():
    mu, var = torch.randn(50, 3, generator=seeded()).double(), torch.rand(50, 3, generator=seeded()).double() + 0.1
    whole, parts, other = (PosteriorCollapse(3) for _ in range(3))
    whole.update(mu, var)
    for part in reversed(torch.arange(50).split(7)):
        parts.update(mu[part], var[part])
    close(parts.compute().kl, whole.compute().kl, 1e-12)
    assert (parts.compute().below == whole.compute().below).all()
    # States add up over processes.
    other.update(mu, var)
    other.total += whole.total
    other.count += whole.count
    other.below += whole.below
    close(other.compute().kl, whole.compute().kl, 1e-12)
    parts.reset()
    with pytest.raises(ValueError, match="no sample"):
        parts.compute()


def test_recommended_bounds_are_where_a_variable_collapses():
    S, options = moment(), {"eta_enc": 0.8, "sigma1": 0.5}
    for keep in (1, 2, 4):
        bounds = linear_vae_solution(S, 4, moments=True, **SETTING).recommend(keep)
        for name, bound in bounds.items():
            active = [
                4 - linear_vae_solution(S, 4, moments=True, **{**SETTING, name: f * bound}).n_collapsed
                for f in (0.999, 1.001)
            ]
            assert active == [keep, keep - 1]
        for fixed in ({}, {"sigma2": 0.6}):
            given = {"beta1": 1.2, "beta2": 0.9, "eta_dec": 0.7, **options, **fixed}
            bounds = linear_hvae_solution(S, 4, 4, moments=True, **given).recommend(keep)
            for name, bound in bounds.items():
                ranks = [
                    linear_hvae_solution(S, 4, 4, moments=True, **{**given, name: f * bound}).rank
                    for f in (0.999, 1.001)
                ]
                assert (
                    (ranks if name != "beta1" else ranks[::-1])[0]
                    >= keep
                    > (ranks if name != "beta1" else ranks[::-1])[1]
                )


def test_sampled_losses_average_to_the_exact_ones():
    S, own = moment(), seeded()
    X = data(S, 512).repeat(60, 1)
    vae, two = LinearVAE(4, 3, generator=own), LinearHVAE2(4, 3, 2, generator=own)
    assert float(vae.loss(X, generator=own)) == pytest.approx(float(vae.exact_loss(S)), rel=1e-2)
    assert float(two.loss(X, generator=own)) == pytest.approx(float(two.exact_loss(S)), rel=1e-2)


def test_rotating_the_data_changes_no_prediction_and_null_directions_are_dropped():
    theta = torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64)
    one, other = (linear_vae_solution(moment(theta, seed), 5, beta=0.5, moments=True) for seed in (1, 2))
    for name in ("spectrum", "decoder", "encoder", "posterior_std", "kl"):
        close(getattr(one, name), getattr(other, name), 1e-9)
    assert one.n_collapsed == 3 and all(weight.isfinite().all() for weight in one.weights.values())


def test_bad_input_is_one_sentence():
    good = torch.randn(5, 2)
    for call, words in [
        (lambda: linear_vae_solution(torch.zeros(0, 2), 1), "at least one"),
        (lambda: linear_vae_solution(good * torch.nan, 1), "NaN"),
        (lambda: linear_vae_solution(good, 0), "d is 0"),
        (lambda: linear_vae_solution(good, 1, beta=-1.0), "beta is -1"),
        (lambda: linear_vae_solution(good, 2, sigma=[1.0, -1.0]), "sigma"),
        (lambda: linear_vae_solution(good, 1, moments=True), "no second moment"),
        (lambda: linear_cvae_solution(good[:3], good, 1), "3 rows"),
        (lambda: linear_hvae_solution(good, 1, 1, sigma1=0.0), "sigma1"),
        (lambda: linear_vae_solution(good, 1).recommend(2), "active is 2"),
        (lambda: linear_vae_solution(good, 1).recommend(0), "active is 0"),
        (lambda: linear_hvae_solution(good, 2, 1).recommend(3), "active is 3"),
        (lambda: PosteriorCollapse(2, delta=1.0), "delta"),
        (lambda: PosteriorCollapse(2, delta=-0.1), "delta"),
        *((lambda level=level: PosteriorCollapse(2, epsilons=[1.0, level]), "epsilons")
          for level in (-1.0, 0.0, math.inf, math.nan)),
        (lambda: PosteriorCollapse(2).update(good, good.abs() * math.inf), "diverged"),
        (lambda: PosteriorCollapse(2).update(good, good * 0), "not log-variances"),
        (lambda: PosteriorCollapse(2).update(good, good[:, :1]), "give both"),
        (lambda: PosteriorCollapse(2).update(good * torch.nan, good), "diverged"),
        (lambda: PosteriorCollapse(2).update(good, -good.abs()), "not log-variances"),
        (lambda: PosteriorCollapse.from_encoder(lambda x: (x, x), []), "empty"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()


def test_reports_say_and_draw_what_was_found():
    meter = PosteriorCollapse(4)
    meter.update(torch.zeros(10, 4), torch.ones(10, 4))
    report = meter.compute()
    with pytest.raises(ValueError, match="not counted"):
        report.collapsed(0.123)
    solution = linear_vae_solution(moment(), 4, eta_dec=3.0, moments=True)
    assert "4 of 4" in report.advise() and f"beta below {0.69**2 / 9:.3g}" in report.advise(solution)
    nothing = linear_vae_solution(torch.zeros(3, 2), 2)
    assert report.advise(nothing).endswith("finds nothing that the variables could code in such data.")
    for figure in (report.plot(), solution.plot()):
        assert len(figure.axes) == 2


def test_solution_holds_its_options_thresholds_and_the_divergence_of_its_weights():
    S = moment()
    learnt = linear_vae_solution(S, 4, moments=True, **SETTING)
    assert (learnt.beta, learnt.eta_enc, learnt.eta_dec) == (1.3, 0.8, 0.7) and set(learnt.weights) == {"U", "W"}
    assert "weights" not in repr(learnt)
    assert learnt.threshold.tolist() == pytest.approx([1.3 * 0.49] * 4, rel=1e-12)
    assert learnt.collapsed.tolist() == [False, False, False, True] and learnt.rank == 3
    # (1 - t / v + t / v - log(t / v) - 1) / 2 for the variances v above the threshold t.
    close(learnt.kl, (THETA**2 / (1.3 * 0.49)).log().clamp(min=0) / 2, 1e-12)
    fixed = linear_vae_solution(S, 4, sigma=[0.9, 0.2, 0.4, 0.7], moments=True, **SETTING)
    assert fixed.posterior_std.tolist() == [0.2, 0.4, 0.7, 0.9]
    close(fixed.threshold, 1.3 * 0.49 / 0.64 * fixed.posterior_std**2, 1e-12)
    assert [int(one) for one in fixed.decoder > 0] == [int(one) for one in fixed.spectrum > fixed.threshold]
    ratio = (fixed.posterior_std / 0.8) ** 2
    means = (fixed.weights["W"] @ S @ fixed.weights["W"].mT).diagonal() / 0.64
    close(fixed.kl, (means + ratio - ratio.log() - 1) / 2, 1e-9)
    x, y, _ = conditional()
    assert set(linear_cvae_solution(x, y, 4).weights) == {"U1", "U2", "W1", "W2"}


def test_options_are_1_and_the_spread_of_z1_is_one_half_by_default():
    S, (x, y, _) = 2 * moment(), conditional()
    for plain, told in (
        (linear_vae_solution(S, 3, moments=True), linear_vae_solution(S, 3, 1.0, 1.0, 1.0, None, moments=True)),
        (linear_cvae_solution(x, y, 3), linear_cvae_solution(x, y, 3, 1.0, 1.0, 1.0)),
        (
            linear_hvae_solution(S, 3, 2, moments=True),
            linear_hvae_solution(S, 3, 2, 1.0, 1.0, 1.0, 1.0, 0.5, None, moments=True),
        ),
    ):
        assert torch.equal(plain.kl, told.kl) and torch.equal(plain.decoder, told.decoder)
        assert torch.equal(plain.threshold, told.threshold) and plain.eta_enc == plain.eta_dec == plain.beta == 1
    close(linear_vae_solution(data(S), 3).spectrum, linear_vae_solution(S, 3, moments=True).spectrum, 1e-9)


@pytest.mark.parametrize("sigma2, effective", [(None, 0.7), (0.6, 0.7 / 0.8 * 0.6)])
def test_upper_variables_are_used_above_the_threshold_alone(sigma2, effective):
    options = {"beta1": 1.2, "beta2": 1.7, "eta_enc": 0.8, "eta_dec": 0.7, "sigma1": 0.4, "sigma2": sigma2}
    threshold = (1.7 * effective**2) ** 2 / (1.2 * 0.16)
    S = torch.diag(torch.tensor([1.01 * threshold, 0.99 * threshold], dtype=torch.float64))
    found = linear_hvae_solution(S, 2, 2, moments=True, **options)
    assert found.threshold.tolist() == pytest.approx([threshold] * 2, rel=1e-12)
    assert [bool(one) for one in found.top_decoder > 0] == [True, False] and found.rank == 1
    assert (found.beta, found.beta1, found.sigma1) == (1.7, 1.2, 0.4)
    assert found.effective_std == pytest.approx(effective) and (found.eta_enc, found.eta_dec) == (0.8, 0.7)
    assert set(found.weights) == {"U1", "U2", "W1", "W2"}
    # Where z1 is noisier than the decoder of z2, noise alone keeps every variable in use.
    loud = linear_hvae_solution(S, 2, 2, moments=True, **{**options, "sigma1": 1.0})
    assert not loud.threshold.any() and loud.rank == 2


@pytest.mark.parametrize("variance", [0.2, 0.0])
def test_a_weak_variable_is_kept_by_the_noise_of_z1_alone(variance):
    """Below beta2 times the decoder's variance, from where z1's own spread is more than z2 costs."""
    S, given = torch.diag(torch.tensor([2.0, variance]).double()), {"beta2": 0.9, "eta_dec": 0.7, "sigma1": 0.6}
    bound = linear_hvae_solution(S, 2, 2, moments=True, **given).recommend(2)["beta1"]
    assert bound == pytest.approx(0.9 * 0.49 / 0.36)
    ranks = [linear_hvae_solution(S, 2, 2, moments=True, beta1=f * bound, **given).rank for f in (0.999, 1.001)]
    assert ranks == [1, 2]


def test_second_moments_are_symmetric_and_have_no_negative_eigenvalues_but_for_rounding():
    def tilted(by):
        return torch.tensor([[1.0, 0.2 + by], [0.2, 1.0]], dtype=torch.float64)

    assert linear_vae_solution(tilted(1e-6), 2, moments=True).spectrum.tolist() == pytest.approx([1.2, 0.8], rel=1e-5)
    with pytest.raises(ValueError, match="no second moment"):
        linear_vae_solution(tilted(1e-4), 2, moments=True)
    for least, scale in ((-1e-6, 1.0), (-1e-6, 1e6)):
        found = linear_vae_solution(scale * torch.diag(torch.tensor([1.0, least]).double()), 2, moments=True)
        assert found.spectrum.tolist() == pytest.approx([scale, 0.0])
    with pytest.raises(ValueError, match=r"the eigenvalue -0\.0001"):
        linear_vae_solution(torch.diag(torch.tensor([1.0, -1e-4]).double()), 2, moments=True)


def test_sampled_loss_of_a_condition_averages_to_the_exact_one():
    x, y, _ = conditional()
    joint = torch.cat([x, y], 1)
    model = LinearCVAE(3, 4, 2, generator=seeded(), **SETTING)
    exactly = float(model.exact_loss(joint.mT @ joint / len(x)).detach())
    found = float(model.loss(y.repeat(500, 1), x.repeat(500, 1), generator=seeded(1)).detach())
    assert found == pytest.approx(exactly, rel=1e-2)
    mean, var = model.encode(y, x)
    close(mean, y @ model.W2.mT + x @ model.W1.mT, 1e-12)
    assert (var == model.log_var.exp()).all() and var.shape == (64, 2)


@pytest.mark.parametrize("make", [lambda **o: LinearVAE(50, 40, **o), lambda **o: LinearHVAE2(50, 40, 40, **o)])
def test_models_begin_with_small_weights_and_half_the_priors_spread(make):
    learnt = make(eta_enc=3.0, generator=seeded())
    assert learnt.log_var.exp().sqrt().tolist() == pytest.approx([1.5] * 40) and learnt.log_var.requires_grad
    assert float(learnt.U1.std()) == pytest.approx(0.3, rel=0.05) and learnt.U1.dtype == torch.float64
    assert torch.equal(make(generator=seeded()).W2, make(generator=seeded()).W2)
    sigma = {"sigma" if isinstance(learnt, LinearVAE) else "sigma2": 0.7}
    fixed = make(**sigma, generator=seeded())
    assert fixed.log_var.exp().sqrt().tolist() == pytest.approx([0.7] * 40) and not fixed.log_var.requires_grad
    betas = ("beta",) if isinstance(learnt, LinearVAE) else ("beta1", "beta2")
    assert [getattr(fixed, name) for name in (*betas, "eta_enc", "eta_dec")] == [1] * (len(betas) + 2)
    assert isinstance(learnt, LinearVAE) or learnt.sigma1 == 0.5


def test_fit_takes_no_more_steps_than_told():
    S = moment()
    losses = [LinearVAE(4, 4, generator=seeded(1)).fit(S, steps) for steps in (1, 5, 200)]
    assert losses[0] > losses[1] + 0.01 > losses[2] + 0.02


def test_report_holds_levels_shares_and_counts():
    mu = torch.tensor([0.5, 1.0, 1.5, 3.0])[:, None]
    meter = PosteriorCollapse(1, epsilons=[2.0, 0.5], delta=0.25)
    meter.update(mu[:3], torch.ones(3, 1))
    meter.update(mu[3:], torch.ones(1, 1))
    report = meter.compute()
    # Divergences of mu^2 / 2, of which one is at a level, and not below it.
    assert report.kl.tolist() == pytest.approx([(0.125 + 0.5 + 1.125 + 4.5) / 4]) and report.samples == 4
    assert report.epsilons.tolist() == [0.01, 0.5, 2.0] and report.below.tolist() == [[0.0], [0.25], [0.75]]
    assert report.delta == 0.25 and report.active_units == 1
    assert report.collapsed(2.0).tolist() == [True] and report.collapsed(0.5).tolist() == [False]
    plain = PosteriorCollapse(1)
    assert (plain.delta, plain.prior_std, plain.dims) == (0.05, 1.0, 1) and PosteriorCollapse(1, delta=0).delta == 0


def test_advice_is_on_as_many_variables_as_the_model_has_and_the_data_fill():
    meter = PosteriorCollapse(2)
    meter.update(torch.zeros(10, 2), torch.ones(10, 2))
    report, S = meter.compute(), moment()
    wide = linear_vae_solution(S, 4, eta_dec=3.0, moments=True)
    bounds = wide.recommend(2)
    assert f"2 of 2 latent variables are collapsed, the linear theory predicts 4; to keep 2 take one of: beta below {bounds['beta']:.3g}, eta_dec below {bounds['eta_dec']:.3g}." == report.advise(wide)  # fmt: skip
    narrow = linear_vae_solution(S, 1, eta_dec=3.0, moments=True)
    assert f"to keep 1 take one of: beta below {narrow.recommend(1)['beta']:.3g}" in report.advise(narrow)
    two = linear_hvae_solution(S, 4, 2, eta_dec=3.0, moments=True)
    assert f"beta1 above {two.recommend(2)['beta1']:.3g}" in report.advise(two)
    active = PosteriorCollapse(1)
    active.update(torch.full((4, 1), 3.0), torch.ones(4, 1))
    assert active.compute().advise() == "0 of 1 latent variables are collapsed."
    assert report.advise().endswith("lower beta or eta_dec, or fix the encoder's variance.")
