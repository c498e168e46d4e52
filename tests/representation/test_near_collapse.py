"""The near-collapse model (arXiv 2210.16658)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.exceptions import ConvergenceWarning

from paperworks.representation import central_path, implied_beta, near_collapse, orthogonal_collapse

LAMBDAS = {"lam_w": 0.3, "lam_h": 0.2}


@pytest.fixture
def given():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(12, 7, dtype=torch.float64, generator=generator), torch.arange(3).repeat(4)


@pytest.mark.parametrize("seed", range(3))
def test_1_central_path_is_monotone(seed):
    H0 = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    within, between = central_path(H0, torch.arange(3).repeat(4), **LAMBDAS).T
    clock = torch.exp(2 * LAMBDAS["lam_h"] * 0.01 * torch.arange(len(within), dtype=torch.float64))
    assert ((within / between).diff() < 0).all()
    assert ((clock * within).diff() < 0).all() and ((clock * between).diff() > 0).all()


def test_1_without_feature_decay_within_falls_and_between_rises(given):
    within, between = central_path(*given, lam_w=0.3, lam_h=0.0).T
    assert (within.diff() < 0).all() and (between.diff() > 0).all()


def test_1_path_follows_the_gradient_of_the_loss_at_the_best_classifier(given):
    H0, y = given
    Y, n = F.one_hot(y).double(), 4

    def loss(H):
        W = torch.linalg.solve(H.T @ H + n * 0.3 * torch.eye(7, dtype=torch.float64), H.T @ Y).T
        return (H @ W.T - Y).square().sum() / 24 + 0.3 / 6 * W.square().sum() + 0.2 / 24 * H.square().sum()

    H = H0.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(H), H)
    stepped = H0 - 0.01 * len(H0) * gradient
    means = torch.stack([stepped[y == k].mean(0) for k in range(3)])
    expected = (stepped - means[y]).square().sum() / 12
    assert float(central_path(H0, y, **LAMBDAS, steps=1)[1, 0]) == pytest.approx(float(expected), rel=1e-12)


def test_2_operator_is_the_derivative_of_the_solver(given):
    H0, y = given
    at = near_collapse(H0, y, **LAMBDAS, beta=20.0)
    change = torch.randn(H0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    told = at.perturbation(change)
    errors = []
    for size in (0.1, 0.01, 0.001):
        moved = near_collapse(H0 + size * change, y, **LAMBDAS, beta=20.0)
        found = (moved.features - at.features) / size
        errors.append(float((found - told).norm() / told.norm()))
        weights = (moved.weight - at.weight) / size
    assert errors[0] < 0.02 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5
    assert torch.allclose(weights, at.perturbation.classifier_response(told), rtol=0.01, atol=1e-3)


def test_2_operator_equals_that_of_the_hessian_by_autograd(given):
    H0, y = given
    at, Y = near_collapse(H0, y, **LAMBDAS, beta=20.0), F.one_hot(given[1]).double()

    def objective(flat):
        W, H = flat[:21].view(3, 7), flat[21:].view(12, 7)
        return (
            ((H @ W.T - Y).square().sum() + 0.2 * H.square().sum() + 20 * (H - H0).square().sum()) / 24
            + 0.3 / 6 * W.square().sum()
        )  # fmt: skip

    hessian = torch.autograd.functional.hessian(objective, torch.cat([at.weight.reshape(-1), at.features.reshape(-1)]))
    ww, wh, hh = hessian[:21, :21], hessian[:21, 21:], hessian[21:, 21:]
    expected = 20 / 12 * torch.linalg.inv(hh - wh.T @ torch.linalg.solve(ww, wh))
    assert torch.allclose(at.perturbation.dense().view(84, 84), expected, atol=1e-8)


def test_3_spectrum_near_collapse():
    H, y, _ = orthogonal_collapse(3, 4, 7, **LAMBDAS, generator=torch.Generator().manual_seed(0))
    at = near_collapse(H, y, **LAMBDAS, beta=1000.0)
    blocks = at.perturbation.dense().view(3, 4, 7, 3, 4, 7)
    same = torch.linalg.svdvals(blocks[0, :, :, 0].reshape(28, 28))
    cross = torch.linalg.svdvals(blocks[0, :, :, 1].reshape(28, 28))
    assert float(1000 * (1 - same.min())) == pytest.approx(math.sqrt(0.2 / 0.3), abs=2e-3)
    assert float(1000 * cross[0]) == pytest.approx(2 * 0.2 * (1 - math.sqrt(0.06)), abs=1e-3) and cross[1] < 1e-12
    at = near_collapse(H, y, **LAMBDAS, beta=10.0)
    least = torch.linalg.svdvals(at.perturbation.dense().view(3, 28, 3, 28)[0, :, 0]).min()
    assert float(least) == pytest.approx(10 / (10 + math.sqrt(0.2 / 0.3)), abs=1e-9)


@pytest.mark.parametrize("beta", [2.0, 50.0])
def test_4_imperfections_within_classes_shrink_by_the_two_factors(beta):
    H, y, W = orthogonal_collapse(3, 4, 7, **LAMBDAS, generator=torch.Generator().manual_seed(0))
    change = torch.randn(3, 4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    change = (change - change.mean(1, keepdim=True)).reshape(12, 7)
    size = 1e-6
    found = (near_collapse(H + size * change, y, **LAMBDAS, beta=beta).features - H) / size
    on = torch.linalg.lstsq(W.T, change.T).solution.T @ W
    along, across = near_collapse(H, y, **LAMBDAS, beta=beta).shrink
    assert torch.allclose(found, along * on + across * (change - on), rtol=1e-4, atol=1e-4)


def test_5_a_minimiser_is_kept_and_limits_are_as_told(given):
    H, y, W = orthogonal_collapse(3, 4, 7, **LAMBDAS, generator=torch.Generator().manual_seed(2))
    at = near_collapse(H, y, **LAMBDAS, beta=3.0)
    assert torch.allclose(at.features, H, atol=1e-8) and torch.allclose(at.weight, W, atol=1e-8)
    far = near_collapse(*given, **LAMBDAS, beta=1e9)
    assert torch.allclose(far.features, given[0], atol=1e-6)
    # Without given features beta is decay, and with too much of it nothing is left.
    small = 1e-3 * given[0]
    free = near_collapse(small, y, lam_w=0.3, lam_h=0.5, beta=0.0)
    gram = free.features @ free.features.T
    expected = (1 - math.sqrt(0.15)) * math.sqrt(0.3 / 0.5) * (y[:, None] == y).double()
    assert torch.allclose(gram, expected, atol=1e-6)
    gone = near_collapse(given[0], y, lam_w=2.0, lam_h=1.0, beta=0.0)
    assert float(gone.features.norm()) < 1e-6


@pytest.mark.parametrize("beta", [0.1, 1.0, 10.0, 100.0])
def test_6_objective_never_rises_and_variability_falls(given, beta):
    found = near_collapse(*given, **LAMBDAS, beta=beta)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(found.losses, found.losses[1:], strict=False))
    assert found.variability_after < found.variability_before
    assert found.plot().axes


def test_7_rotating_the_features_rotates_the_result(given):
    H0, y = given
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))).Q
    plain, turned = (near_collapse(H, y, **LAMBDAS, beta=2.0) for H in (H0, H0 @ rotation))
    assert torch.allclose(turned.features, plain.features @ rotation, atol=1e-8)
    assert torch.allclose(turned.weight, plain.weight @ rotation, atol=1e-8)


def test_bad_input_is_one_clear_sentence(given):
    H0, y = given
    for features, labels, options, words in (
        (H0, y[:5], {}, "12 whole numbers"),
        (H0, y - 1, {}, "from 0, got -1"),
        (H0, y == 1, {}, "12 whole numbers"),
        (H0, F.one_hot(y), {}, r"argmax\(1\)"),
        (H0 * float("nan"), y, {}, "NaN"),
        (H0, torch.tensor([0] * 8 + [1] * 4), {}, "of one size"),
        (H0, y * 0, {}, "two or more classes"),
        (H0, y, {"lam_w": 0.0}, "lam_w is above 0"),
        (H0, y, {"lam_w": math.inf}, "lam_w is above 0"),
        (H0, y, {"lam_h": math.nan}, "lam_h at least 0"),
        (H0, y, {"lam_h": math.inf}, "lam_h at least 0"),
        (H0, y, {"lam_h": -0.1}, "lam_h at least 0"),
        (H0, 2 * (y > 0), {}, "two or more classes of one size"),
        (H0, y, {"beta": -1.0}, "beta is a number"),
        (H0, y, {"beta": math.inf}, "beta is a number"),
        (H0, y, {"beta": 0.0, "lam_h": 0.0}, "above 0 where lam_h is 0"),
        (H0, y, {"max_rounds": 0}, "max_rounds is at least 1"),
    ):
        with pytest.raises(ValueError, match=words):
            near_collapse(features, labels, **{**LAMBDAS, "beta": 1.0, **options})
    for sizes in ((3, 4, 2), (1, 4, 2), (3, 0, 7)):
        with pytest.raises(ValueError, match="as many dimensions"):
            orthogonal_collapse(*sizes, **LAMBDAS)
    for lam_w, lam_h in ((2.0, 0.6), (2.0, 0.5), (0.0, 0.2), (0.3, 0.0)):
        with pytest.raises(ValueError, match="product below 1"):
            orthogonal_collapse(3, 4, 7, lam_w=lam_w, lam_h=lam_h)
    with pytest.raises(TypeError, match="features is list: give real numbers"):
        near_collapse([["a"]], [0], **LAMBDAS, beta=1.0)
    at = near_collapse(H0, y, **LAMBDAS, beta=1.0)
    with pytest.raises(ValueError, match=r"is \(12, 7\), got \(7, 12\)"):
        at.perturbation(H0.T)
    assert near_collapse(H0, y, **LAMBDAS, beta=0.2).shrink[1] == 0.5
    with pytest.raises(ValueError, match="with beta = 0"):
        _ = near_collapse(H0, y, **LAMBDAS, beta=0.0).perturbation
    for options in ({"step": 0}, {"step": math.inf}, {"steps": 0}):
        with pytest.raises(ValueError, match="step is above 0"):
            central_path(H0, y, **LAMBDAS, **options)


@pytest.mark.parametrize("beta", [0.01, 0.1, 5.0])
def test_implied_beta_is_the_one_that_the_solver_was_given(given, beta):
    left = near_collapse(*given, **LAMBDAS, beta=beta).variability_after
    assert implied_beta(*given, left, **LAMBDAS) == pytest.approx(beta, rel=1e-3)


@pytest.mark.parametrize("wanted", [-1.0, 0.0, 5.0, math.nan])
def test_implied_beta_of_what_no_beta_leaves_is_one_sentence(given, wanted):
    with pytest.raises(ValueError, match="no beta from 1e-8 to 1e4 leaves a variability of"):
        implied_beta(*given, wanted, **LAMBDAS)


def test_implied_beta_ends_at_1e4(given):
    inside, beyond = (near_collapse(*given, **LAMBDAS, beta=beta).variability_after for beta in (9e3, 1.1e4))
    assert implied_beta(*given, inside, **LAMBDAS) == pytest.approx(9e3, rel=0.01)
    with pytest.raises(ValueError, match="no beta from 1e-8 to 1e4"):
        implied_beta(*given, beyond, **LAMBDAS)


@pytest.mark.parametrize("offset, scale", [(1e5, 1.0), (1e5, 1e3), (0.0, 1e3), (1e3, 1e-3)])
def test_implied_beta_of_features_far_from_zero_or_of_other_scales(given, offset, scale):
    H0, y = scale * given[0] + offset, given[1]
    left = near_collapse(H0, y, **LAMBDAS, beta=2.0).variability_after
    assert implied_beta(H0, y, left, **LAMBDAS) == pytest.approx(2.0, rel=1e-3)


@pytest.mark.parametrize("offset, scale", [(0.0, 1.0), (1e5, 1.0), (1e3, 1e-3), (0.0, 1e3)])
def test_solver_ends_where_both_slopes_vanish(given, offset, scale):
    H0, y = scale * given[0] + offset, given[1]
    at, Y = near_collapse(H0, y, **LAMBDAS, beta=1.0), F.one_hot(y).double()
    H, W = at.features, at.weight
    # Ridge regression by least squares on rows added to the features, which squares nothing.
    ridge = torch.cat([H, math.sqrt(4 * 0.3) * torch.eye(7, dtype=torch.float64)])
    best = torch.linalg.lstsq(ridge, torch.cat([Y, torch.zeros(7, 3, dtype=torch.float64)]), driver="gelsd").solution
    assert torch.allclose(W, best.T, rtol=1e-7, atol=1e-9 * float(W.abs().max()))
    slope = (H @ W.T - Y) @ W + 0.2 * H + (H - H0)
    assert float(slope.norm()) < 1e-8 * float((H - H.mean(0)).norm() * (1 + W.norm() ** 2))


def test_rounds_that_are_not_enough_are_told(given):
    with pytest.warns(ConvergenceWarning, match="after 3 rounds the features still change by"):
        near_collapse(*given, **LAMBDAS, beta=0.1, max_rounds=3)


def test_central_path_refuses_a_step_that_overshoots(given):
    H0, y = 0.05 * given[0], given[1]
    with pytest.raises(ValueError, match="overshoots on this path: take one below"):
        central_path(H0, y, lam_w=0.001, lam_h=0.2, step=0.5, steps=300)
    within, between = central_path(H0, y, lam_w=0.001, lam_h=0.2, step=0.002, steps=300).T
    assert ((within / between).diff() < 0).all()


def test_arrays_data_frames_and_other_dtypes_are_taken(given):
    H0, y = given
    expected = near_collapse(H0, y, **LAMBDAS, beta=1.0)
    for features, labels in (
        (H0.numpy(), y.to(torch.uint8)),
        (pd.DataFrame(H0.numpy()), pd.Series(y.numpy())),
        (H0, y.int().numpy()),
    ):
        found = near_collapse(features, labels, **LAMBDAS, beta=1.0)
        assert torch.equal(found.features, expected.features)
        assert torch.allclose(found.perturbation(np.ones((12, 7))), expected.perturbation(torch.ones(12, 7)))
    for dtype in (torch.float16, torch.bfloat16):
        half = near_collapse(H0.to(dtype), y, **LAMBDAS, beta=1.0)
        assert torch.equal(half.features, near_collapse(H0.to(dtype).double(), y, **LAMBDAS, beta=1.0).features)


def test_shrink_factors_and_conjugate_gradients_are_those_of_the_dense_map(given):
    H0, y = given
    at = near_collapse(H0, y, lam_w=0.3, lam_h=0.2, beta=4.0)
    assert at.shrink == pytest.approx((4 / (4 + math.sqrt(2 / 3)), 4 / 4.2))
    change = torch.randn(12, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    dense = torch.einsum("idje,je->id", at.perturbation.dense(), change)
    assert torch.allclose(at.perturbation(change), dense, atol=1e-9)


def traces(features, labels):
    means = torch.stack([features[labels == k].mean(0) for k in range(3)])
    within = (features - means[labels]).square().sum() / len(features)
    return [float(within), float((means - features.mean(0)).square().sum() / 3)]


def test_result_holds_what_was_given_and_tells_its_objective_and_variabilities(given):
    H0, y = given
    at, Y = near_collapse(H0, y, lam_w=0.3, lam_h=0.2, beta=2.0), F.one_hot(y).double()
    assert torch.equal(at.given, H0) and torch.equal(at.labels, y) and at.labels.dtype == torch.int64
    assert (at.lam_w, at.lam_h, at.beta) == (0.3, 0.2, 2.0)

    def objective(H, W):
        features = (H @ W.T - Y).square().sum() + 0.2 * H.square().sum() + 2 * (H - H0).square().sum()
        return float(features / 24 + 0.3 / 6 * W.square().sum())

    # The first round: both steps by normal equations, from H0.
    W = torch.linalg.solve(H0.T @ H0 + 4 * 0.3 * torch.eye(7, dtype=torch.float64), H0.T @ Y).T
    H = (Y @ W + 2 * H0) @ torch.linalg.inv(W.T @ W + 2.2 * torch.eye(7, dtype=torch.float64))
    assert at.losses[0] == pytest.approx(objective(H, W), rel=1e-10)
    assert at.losses[-1] == pytest.approx(objective(at.features, at.weight), rel=1e-10)
    for features, told in ((H0, at.variability_before), (at.features, at.variability_after)):
        within, between = traces(features, y)
        assert told == pytest.approx(within / between, rel=1e-10)


def test_path_begins_with_the_traces_of_the_given_features(given):
    path = central_path(*given, **LAMBDAS, step=0.02, steps=3)
    assert path.shape == (4, 2) and path[0].tolist() == pytest.approx(traces(*given), rel=1e-12)
    halves = central_path(*given, **LAMBDAS, step=0.01, steps=6)[::2]
    assert torch.allclose(halves, path, rtol=1e-2) and len(central_path(*given, **LAMBDAS)) == 2001
