"""The unconstrained feature model and its closed forms (arXiv 2301.00437), apart from the metric."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from scipy.optimize import minimize

from paperworks.representation import frame_geometry, unconstrained_features


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("depth", [1, 2])
def test_1_closed_form_is_what_scipy_finds(depth):
    """Features at their class means: scipy minimises over them and the layers, with no code of ours."""
    counts, lam, width = torch.tensor([30.0, 12.0], dtype=torch.float64), 0.006, 3
    wanted = torch.eye(2, dtype=torch.float64)
    shapes = [(width, width)] * (depth - 1) + [(2, width), (2, width)]

    def loss(flat):
        vector = torch.from_numpy(flat.copy()).requires_grad_()
        parts = [part.view(shape) for part, shape in zip(vector.split([a * b for a, b in shapes]), shapes, strict=True)]
        scores = parts[-1]
        for weight in parts[:-1]:
            scores = scores @ weight.T
        error = (counts[:, None] * (scores - wanted).square()).sum() / 2 / counts.sum()
        decay = lam * sum(weight.square().sum() for weight in parts[:-1])
        value = error + decay / 2 + lam / 2 * (counts[:, None] * parts[-1].square()).sum()
        value.backward()
        return float(value.detach()), vector.grad.numpy()

    size = sum(a * b for a, b in shapes)
    starts = (torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(6))
    options = {"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-10}
    best = min(
        (minimize(loss, start.numpy(), jac=True, method="L-BFGS-B", options=options) for start in starts),
        key=lambda found: found.fun,
    )
    parts = [
        part.view(shape)
        for part, shape in zip(torch.from_numpy(best.x).split([a * b for a, b in shapes]), shapes, strict=True)
    ]
    product = parts[0]
    for weight in parts[1:-1]:
        product = weight @ product
    geometry = frame_geometry(counts, lam_w=lam, lam_h=lam, depth=depth)
    assert torch.allclose(product @ product.T, torch.diag(geometry.weight_squared), atol=1e-3)
    found = unconstrained_features([30, 12], width, lam_w=lam, lam_h=lam, depth=depth, generator=generator())
    assert found.loss == pytest.approx(best.fun, rel=1e-6)


@pytest.mark.parametrize("lam_w, lam_h", [(0.004, 0.01), (0.01, 0.004)])
def test_1_decays_of_layers_and_features_have_their_own_parts(lam_w, lam_h):
    geometry = frame_geometry([20, 10], lam_w=lam_w, lam_h=lam_h, depth=2)
    found = unconstrained_features([20, 10], 3, lam_w=lam_w, lam_h=lam_h, depth=2, generator=generator())
    means = found.class_means
    assert torch.allclose(found.product @ found.product.T, torch.diag(geometry.weight_squared), atol=1e-3)
    assert torch.allclose(means @ means.T, torch.diag(geometry.feature_squared), atol=1e-3)


def test_2_threshold_is_where_the_rarest_class_vanishes():
    lam = 0.005
    n = frame_geometry([60, 30, 9], lam_w=lam, lam_h=lam).threshold
    assert n == pytest.approx(99**2 * lam**2)
    for depth in (1, 2, 3):
        geometry = frame_geometry([60, 30, 9], lam_w=lam, lam_h=lam, depth=depth)
        assert (geometry.collapsed == (geometry.counts <= geometry.threshold)).all()


def test_3_equal_counts_are_an_orthonormal_frame_at_every_depth():
    for depth in (1, 2):
        found = unconstrained_features([8] * 3, 4, lam_w=0.01, lam_h=0.01, depth=depth, generator=generator())
        gram = found.product @ found.product.T
        identity = torch.eye(3, dtype=torch.float64)
        assert float((gram / gram.norm() - identity / identity.norm()).norm()) < 1e-5


def test_the_same_seed_gives_the_same_minimiser_and_both_plot():
    one, two = (unconstrained_features([6, 3], 3, lam_w=0.01, lam_h=0.01, generator=generator()) for _ in range(2))
    assert torch.equal(one.features, two.features) and one.loss == two.loss and one.bias is None
    assert one.plot().axes and frame_geometry([6, 3], lam_w=0.01, lam_h=0.01).plot().axes


@pytest.mark.parametrize(
    "counts, options, words",
    [
        ([4.5, 2], {}, "counts are whole numbers"),
        ([4, float("nan")], {}, "two class sizes"),
        ([4, float("inf")], {}, "two class sizes"),
        ([4, 2], {"lam_w": float("inf")}, "decays are above 0"),
        ([4, 2], {"lam_h": float("nan")}, "decays are above 0"),
        ([4, 2], {"depth": 1.5}, "depth is a"),
        ([4, 2], {"depth": 0}, "depth is a"),
        ([4, 2], {"lam_w": 0.0}, "decays are above 0"),
        ([4, 2], {"lam_h": 0.0}, "decays are above 0"),
        ([4, 0.5], {}, "two class sizes of 1 or more"),
        ([4], {}, "two class sizes"),
        ([[4, 2]], {}, "two class sizes"),
    ],
)
def test_sizes_and_decays_out_of_range_are_one_sentence(counts, options, words):
    values = {"lam_w": 0.01, "lam_h": 0.01, **options}
    with pytest.raises(ValueError, match=words):
        unconstrained_features(counts, 3, **values)
    if "whole" not in words:
        with pytest.raises(ValueError, match=words):
            frame_geometry(counts, **values)


def test_names_for_counts_are_refused():
    with pytest.raises(TypeError, match="counts is list: give real numbers"):
        frame_geometry(["a", "b"], lam_w=0.1, lam_h=0.1)


def test_a_hundred_layers_are_counted_by_logarithms():
    counts, lam, depth = [40, 20, 10], 5e-4, 100
    geometry = frame_geometry(counts, lam_w=lam, lam_h=lam, depth=depth)
    # |p|^2 = N lam x^M, at which the slope of 1 / (1 + x^M) + b x / n is zero.
    total, power = 70, geometry.weight_squared / (70 * lam)
    b = depth * total * lam * (total * lam) ** (1 / depth)
    slope = b / torch.tensor(counts) - depth * power ** (1 - 1 / depth) / (1 + power) ** 2
    assert slope.abs().max() < 1e-9 and not geometry.collapsed.any()


def test_lengths_and_logits_belong_together():
    geometry = frame_geometry([40, 20, 10], lam_w=0.004, lam_h=0.009, depth=2)
    rows, lengths = geometry.weight_squared, geometry.feature_squared
    assert torch.allclose(lengths, rows / (rows + 70 * 0.009) ** 2, rtol=1e-12)
    # Row and features of a class point the same way, so that their product is the logit.
    assert torch.allclose((rows * lengths).sqrt(), geometry.logit, rtol=1e-12)


@pytest.mark.parametrize("loss, depth, bias", [("mse", 1, False), ("ce", 1, True), ("mse", 2, True), ("ce", 2, False)])
def test_minimiser_has_the_objectives_value_and_no_slope(loss, depth, bias):
    lam_w, lam_h, counts = 0.006, 0.002, torch.tensor([7, 4, 3])
    found = unconstrained_features(
        counts, 4, lam_w=lam_w, lam_h=lam_h, depth=depth, bias=bias, loss=loss, restarts=1, generator=generator()
    )
    assert found.features.shape == (14, 4) and [weight.shape[0] for weight in found.weights] == [4] * (depth - 1) + [3]
    assert torch.equal(found.labels, torch.arange(3).repeat_interleave(counts)) and (found.bias is None) == (not bias)
    parts = [
        part.clone().requires_grad_() for part in (*found.weights, found.features, *([found.bias] if bias else []))
    ]
    weights, features, shift = parts[:depth], parts[depth], parts[depth + 1] if bias else 0
    scores = features
    for weight in weights:
        scores = scores @ weight.T
    scores = scores + shift
    wanted = torch.eye(3, dtype=torch.float64)[found.labels]
    error = -(wanted * scores.log_softmax(1)).sum() / 14 if loss == "ce" else (scores - wanted).square().sum() / 28
    value = error + lam_w / 2 * sum(weight.square().sum() for weight in weights) + lam_h / 2 * features.square().sum()
    assert found.loss == pytest.approx(float(value.detach()), rel=1e-12)
    assert value < (math.log(3) if loss == "ce" else 0.5) and not any(part.requires_grad for part in found.weights)
    value.backward()
    assert max(float(part.grad.abs().max()) for part in parts) < 1e-7


def test_product_and_means_are_those_of_layers_and_features():
    found = unconstrained_features([5, 3], 3, lam_w=0.004, lam_h=0.004, depth=3, steps=30, generator=generator())
    first, second, last = found.weights
    assert torch.allclose(found.product, last @ second @ first, rtol=1e-12)
    assert torch.allclose(found.class_means, torch.stack([found.features[:5].mean(0), found.features[5:].mean(0)]))


def test_no_more_steps_than_told_are_taken():
    short, long = (
        unconstrained_features([6, 3], 3, lam_w=0.01, lam_h=0.01, restarts=1, steps=n, generator=generator()).loss
        for n in (2, 50)
    )
    assert short > long + 1e-3


def test_defaults_are_one_layer_without_bias_squared_error_and_four_starts():
    defaults = {name: one.default for name, one in inspect.signature(unconstrained_features).parameters.items()}
    assert (defaults["depth"], defaults["bias"], defaults["loss"]) == (1, False, "mse")
    assert (defaults["restarts"], defaults["steps"]) == (4, 2000)
    one, plain = (frame_geometry([8, 4], lam_w=0.01, lam_h=0.01, **depth) for depth in ({"depth": 1}, {}))
    assert torch.equal(one.weight_squared, plain.weight_squared)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_class_at_the_threshold_collapses_and_one_above_does_not(depth):
    edge = frame_geometry([60, 30, 9], lam_w=0.004, lam_h=0.006, depth=depth).threshold
    # By the paper: b / n of the last class to survive is 1 for one layer, and (M - 1)^((M - 1) / M) / M for M of them.
    b = depth * 99 * (99 * 0.004**depth * 0.006) ** (1 / depth)
    assert edge == pytest.approx(b / {1: 1.0, 2: 1 / 2, 3: 2 ** (2 / 3) / 3}[depth], rel=1e-12)
    for factor, lost in ((0.999, True), (1.001, False)):
        # The last class's size moves the total, and with it the edge: the others make up for it.
        counts = torch.tensor([60.0, 39 - edge * factor, edge * factor], dtype=torch.float64)
        if min(counts) >= 1:
            assert bool(frame_geometry(counts, lam_w=0.004, lam_h=0.006, depth=depth).collapsed[2]) == lost


def test_rank_keeps_the_largest_classes_in_whatever_order():
    plain = frame_geometry([10, 40, 5, 20], lam_w=0.01, lam_h=0.01)
    for rank, kept in (
        (1, [1]),
        (2, [1, 3]),
        (3, [0, 1, 3]),
        (4, [0, 1, 2, 3]),
        (9, [0, 1, 2, 3]),
        (None, [0, 1, 2, 3]),
    ):
        found = frame_geometry([10, 40, 5, 20], lam_w=0.01, lam_h=0.01, rank=rank)
        survives = torch.tensor([k in kept for k in range(4)])
        for name in ("weight_squared", "feature_squared", "logit"):
            assert torch.equal(getattr(found, name), torch.where(survives, getattr(plain, name), 0))
        assert torch.equal(found.collapsed, ~survives) and found.threshold == plain.threshold
    assert frame_geometry([10, 10, 5], lam_w=0.01, lam_h=0.01, rank=2).collapsed.tolist() == [False, False, True]
    for rank in (0, 1.5):
        with pytest.raises(ValueError, match="rank is a width of at least 1"):
            frame_geometry([40, 20, 10], lam_w=0.01, lam_h=0.01, rank=rank)
    for rank in (1, 2):
        with pytest.raises(ValueError, match="3 classes of 10 samples share the last of"):
            frame_geometry([10, 10, 10, 5], lam_w=0.01, lam_h=0.01, rank=rank)


def test_bad_sizes_and_names_are_one_sentence():
    for options, words in (
        *(({name: value}, f"{name} is a whole number of at least 1, got {value}")
          for name in ("dim", "depth", "restarts", "steps") for value in (0, 1.5)),
        ({"loss": "l1"}, "loss is mse or ce, got 'l1'"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            unconstrained_features([4, 2], **{"dim": 3, "lam_w": 0.1, "lam_h": 0.1, **options})
