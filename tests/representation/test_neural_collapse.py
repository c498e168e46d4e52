"""NeuralCollapse and the geometry it is measured against (arXiv 2301.00437)."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchmetrics import MetricCollection

from paperworks.representation import NeuralCollapse, frame_geometry, unconstrained_features


def simplex(classes: int, dim: int, generator: torch.Generator) -> torch.Tensor:
    rotation = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    return (torch.eye(classes, dtype=torch.float64) - 1 / classes) @ rotation[:classes]


def noisy(classes: int = 4, dim: int = 6, each: int = 10, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat(each)
    means = torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    features = means[labels] + 0.3 * torch.randn(len(labels), dim, dtype=torch.float64, generator=generator)
    weight = means + torch.randn(classes, dim, dtype=torch.float64, generator=generator)
    return features, labels, weight


def computed(features, labels, weight=None, bias=None, parts: int = 1):
    metric = NeuralCollapse(int(labels.max()) + 1, weight=weight, bias=bias)
    for part in torch.arange(len(features)).tensor_split(parts):
        metric.update(features[part], labels[part])
    if weight is not None:
        for part in torch.arange(len(features)).tensor_split(parts):
            metric.agree(features[part])
    return {name: float(value) for name, value in metric.compute().items()}


@pytest.mark.parametrize(
    "counts, lam, depth, lengths, logits",
    [
        ((40, 20, 10, 10), 0.01, 1, (5.5246, 3.6721, 2.3623, 2.3623), (0.8735, 0.8211, 0.7470, 0.7470)),
        ((40, 20, 10, 2), 0.004, 2, (11.3104, 6.9815, 4.2533, 1.1887), None),
        ((40, 20, 10, 10), 0.003, 3, (15.544, 9.095, 5.259, 5.259), None),
    ],
)
def test_1_solver_closed_form_and_published_values_agree(counts, lam, depth, lengths, logits):
    geometry = frame_geometry(counts, lam_w=lam, lam_h=lam, depth=depth)
    assert geometry.weight_squared.tolist() == pytest.approx(lengths, abs=1e-3)
    if logits:
        assert geometry.logit.tolist() == pytest.approx(logits, abs=1e-4)
    found = unconstrained_features(
        counts, 8, lam_w=lam, lam_h=lam, depth=depth, generator=torch.Generator().manual_seed(0)
    )
    gram = found.product @ found.product.T
    assert torch.allclose(gram, torch.diag(geometry.weight_squared), atol=1e-3)
    means = found.class_means
    assert torch.allclose(means @ means.T, torch.diag(geometry.feature_squared), atol=1e-3)
    assert torch.allclose(found.product @ means.T, torch.diag(geometry.logit), atol=1e-3)
    # Every sample is at its class mean.
    assert torch.allclose(found.features, means[found.labels], atol=1e-4)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_1_stationary_length_is_the_least_by_brute_force(depth):
    counts, lam = torch.tensor([60.0, 25.0, 9.0, 3.0], dtype=torch.float64), 0.004
    geometry = frame_geometry(counts, lam_w=lam, lam_h=lam, depth=depth)
    total = float(counts.sum())
    b = depth * total * (total * lam ** (depth + 1)) ** (1 / depth)
    x = torch.linspace(0, 40, 400_001, dtype=torch.float64)
    for size, squared in zip(counts, geometry.weight_squared, strict=True):
        best = x[(1 / (1 + x**depth) + b / size * x).argmin()]
        assert float(squared) == pytest.approx(total * lam * float(best) ** depth, rel=2e-3, abs=1e-6)


def test_2_threshold_of_one_layer_is_continuous():
    counts = (40, 20, 10)
    edge = (10 / 70**2) ** 0.5
    kept, lost = (frame_geometry(counts, lam_w=lam, lam_h=lam) for lam in (edge * 0.999, edge * 1.001))
    assert 0 < kept.weight_squared[2] < 0.05 and kept.threshold < 10 < lost.threshold
    assert lost.weight_squared[2] == 0 and lost.collapsed.tolist() == [False, False, True]
    found = unconstrained_features(counts, 4, lam_w=edge * 1.2, lam_h=edge * 1.2, generator=torch.Generator())
    assert float(found.product[2].norm()) < 1e-4 < float(found.product[1].norm())


def test_2_threshold_of_two_layers_is_a_jump():
    counts, total = (40, 20, 10), 70.0
    # b / n = 1/2 where 2 N sqrt(N lam^3) = n / 2.
    edge = ((10 / 2 / 2 / total) ** 2 / total) ** (1 / 3)
    kept, lost = (frame_geometry(counts, lam_w=lam, lam_h=lam, depth=2) for lam in (edge * 0.999, edge * 1.001))
    assert float(kept.weight_squared[2]) >= total * edge * 0.999 and lost.weight_squared[2] == 0


def test_3_equal_counts_with_a_bias_are_a_simplex():
    geometry = frame_geometry([10] * 4, lam_w=0.01, lam_h=0.01)
    assert geometry.weight_squared.std() == 0
    found = unconstrained_features(
        [10] * 4, 8, lam_w=0.005, lam_h=0.005, bias=True, generator=torch.Generator().manual_seed(0)
    )
    assert found.bias.tolist() == pytest.approx([0.25] * 4, abs=1e-3)
    gram = found.product @ found.product.T
    frame = torch.eye(4, dtype=torch.float64) - 0.25
    assert float((gram / gram.norm() - frame / frame.norm()).norm()) < 1e-6


def test_3_cross_entropy_with_a_bias_is_a_simplex():
    found = unconstrained_features(
        [10] * 4, 8, lam_w=0.01, lam_h=0.001, bias=True, loss="ce", generator=torch.Generator().manual_seed(0)
    )
    figures = computed(found.features, found.labels, found.product, found.bias)
    assert figures["nc1"] < 1e-6 and figures["nc2_etf"] < 1e-4 and figures["nc3"] < 1e-4 and figures["nc4"] == 0
    assert float(found.bias.std()) < 1e-4


def test_4_bottleneck_keeps_the_largest_classes():
    geometry = frame_geometry([40, 20, 10, 5], lam_w=0.01, lam_h=0.01, rank=2)
    assert geometry.weight_squared.tolist() == pytest.approx([5.5746, 3.7221, 0, 0], abs=1e-4)
    found = unconstrained_features([40, 20, 10, 5], 2, lam_w=0.01, lam_h=0.01, generator=torch.Generator())
    assert torch.allclose(found.product @ found.product.T, torch.diag(geometry.weight_squared), atol=1e-3)
    with pytest.raises(ValueError, match="share the last"):
        frame_geometry([40, 10, 10, 5], lam_w=0.01, lam_h=0.01, rank=2)


def test_5_known_values_on_constructed_features():
    generator = torch.Generator().manual_seed(0)
    means = simplex(4, 6, generator)
    labels = torch.arange(4).repeat(5)
    figures = computed(means[labels], labels, means, torch.zeros(4))
    zero = ("nc1", "nc1_trace_ratio", "nc2_etf", "nc2_means_etf", "nc3", "nc3_etf", "nc4")
    assert all(abs(figures[name]) < 1e-12 for name in zero) and figures["nc2_of"] > 0.1
    frame = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=generator)).Q[:4]
    figures = computed(frame[labels], labels, frame)
    # Centring an orthogonal frame gives a simplex.
    assert all(abs(figures[name]) < 1e-12 for name in ("nc1", "nc2_of", "nc3_of", "nc2_etf", "nc2_means_etf"))
    geometry = frame_geometry([40, 20, 10], lam_w=0.01, lam_h=0.01)
    metric = NeuralCollapse(3, weight=geometry.weight_squared.sqrt()[:, None] * frame[:3])
    metric.update(
        (geometry.feature_squared.sqrt()[:, None] * frame[:3])[torch.arange(3).repeat(2)], torch.arange(3).repeat(2)
    )
    assert all(float(value) < 1e-12 for value in metric.against(geometry).values())


def test_5_nothing_depends_on_rotation_scale_order_or_splitting():
    features, labels, weight = noisy()
    expected = computed(features, labels, weight)
    assert not any(value != value for value in expected.values()) and 0 < expected["nc4"] < 1
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))).Q
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(4))
    assert computed(features @ rotation, labels, weight @ rotation) == pytest.approx(expected, abs=1e-6)
    assert computed(features[order], labels[order], weight, parts=7) == pytest.approx(expected, abs=1e-6)
    assert computed(3 * features, labels, 5 * weight) == pytest.approx(expected, abs=1e-6)


def test_5_nc1_equals_its_definition_with_numpys_pseudo_inverse():
    features, labels, _ = noisy(each=7)
    # Of classes of different sizes, whose mean of all samples is not that of the class means.
    kept = torch.ones(len(labels), dtype=torch.bool)
    kept[(labels == 0).nonzero()[:5, 0]] = kept[(labels == 2).nonzero()[:3, 0]] = False
    features, labels = features[kept], labels[kept]
    means = torch.stack([features[labels == k].mean(0) for k in range(4)])
    within = torch.stack([torch.outer(h - means[y], h - means[y]) for h, y in zip(features, labels, strict=True)]).mean(
        0
    )
    apart = means - features.mean(0)
    between = torch.stack([torch.outer(row, row) for row in apart]).mean(0)
    expected = np.trace(within.numpy() @ np.linalg.pinv(between.numpy(), rcond=1e-6)) / 4
    figures = computed(features, labels)
    assert figures["nc1"] == pytest.approx(expected, rel=1e-9)
    assert figures["nc1_trace_ratio"] == pytest.approx(float(within.trace() / between.trace()), rel=1e-12)


def test_5_frames_are_compared_at_norm_one():
    # Rows (2, 0) and (0, 1): their Gram matrix diag(4, 1) / sqrt(17) against the identity / sqrt(2).
    weight = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    means = torch.tensor([[1.0, 0.0], [1.0, 3.0]])
    labels = torch.arange(2).repeat(2)
    figures = computed(means[labels] + 0.1 * torch.tensor([[1.0, 0], [1, 0], [-1, 0], [-1, 0]]), labels, weight)
    expected = math.hypot(4 / 17**0.5 - 0.5**0.5, 1 / 17**0.5 - 0.5**0.5)
    assert figures["nc2_of"] == pytest.approx(expected, rel=1e-6)
    # Centred, two rows are always opposite.
    assert figures["nc2_etf"] < 1e-9 and figures["nc2_means_etf"] < 1e-9
    gram = torch.tensor([[1.0, 1.0], [1.0, 10.0]])
    distance = (gram / gram.norm() - torch.eye(2) / 2**0.5).norm()
    assert figures["nc2_means_of"] == pytest.approx(float(distance), rel=1e-5)
    logits, simplex = weight @ means.T, torch.eye(2) - 0.5
    assert figures["nc3_of"] == pytest.approx(float((logits / logits.norm() - torch.eye(2) / 2**0.5).norm()), rel=1e-5)
    centred = weight @ (means - means.mean(0)).T
    assert figures["nc3_etf"] == pytest.approx(
        float((centred / centred.norm() - simplex / simplex.norm()).norm()), rel=1e-5
    )
    own, away = (
        float((weight / weight.norm() - other / other.norm()).norm()) for other in (means, means - means.mean(0))
    )
    assert figures["nc3"] == pytest.approx(min(own, away), rel=1e-5) and abs(own - away) > 0.1


def test_nc4_heeds_the_bias():
    features, labels = torch.tensor([[-1.2], [-0.8], [0.8], [1.2]]), torch.tensor([0, 0, 1, 1])
    weight = torch.tensor([[-1.0], [1.0]])
    assert computed(features, labels, weight)["nc4"] == 0
    assert computed(features, labels, weight, torch.tensor([0.0, 1.7]))["nc4"] == 0.25
    assert computed(features, labels, weight, torch.tensor([0.0, 3.0]))["nc4"] == 0.5


def test_nc3_takes_the_means_as_they_are_or_centred():
    generator = torch.Generator().manual_seed(0)
    means, labels = simplex(4, 6, generator), torch.arange(4).repeat(2)
    # The classifier is along the centred means, and far from the means themselves.
    assert computed(means[labels] + 3, labels, means)["nc3"] < 1e-12


def test_nc4_is_of_the_nearest_mean_whatever_its_length():
    features = torch.tensor([[-0.1], [0.1], [0.9], [1.1], [9.9], [10.1]])
    labels, weight = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([[0.0], [1.0], [10.0]])
    # Of the means 0, 1 and 10 this classifier says the nearest.
    assert computed(features, labels, weight, -weight[:, 0].square() / 2)["nc4"] == 0


def test_directions_in_which_samples_differ_are_kept_beside_coarse_rounding():
    labels = torch.arange(3).repeat(2)
    means = torch.tensor([[256.0, 0, 0], [256, 0, 1], [256, 100, 0]])
    # Whole numbers up to 256 are exact in bfloat16, which rounds features of this size by 2.
    features = means[labels] + torch.tensor([[0.0, 1, 4]] * 3 + [[0.0, -1, -4]] * 3)
    assert computed(features.bfloat16(), labels)["nc1"] == pytest.approx(computed(features.double(), labels)["nc1"])


def test_weak_directions_of_the_means_are_kept():
    labels = torch.arange(4).repeat(500)
    means = torch.tensor([[0.0, 0], [0, 1], [1e4, 0], [1e4, 1]], dtype=torch.float64)
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # Noise whose class means are zero: sum of s_i / 4 over the directions, of variances 1e8 / 4 and 1 / 4 between.
    for k in range(4):
        noise[labels == k] -= noise[labels == k].mean(0)
    noise /= noise.square().mean(0).sqrt()
    for features in (means[labels] + noise, means[labels] + noise + 1e5, 1e-3 * (means[labels] + noise)):
        assert computed(features, labels)["nc1"] == pytest.approx((1 / 0.25 + 1 / 0.25e8) / 4, rel=1e-3)


@pytest.mark.parametrize("rank", [2, 5])
def test_directions_that_rounding_alone_makes_are_left_out(rank):
    generator = torch.Generator().manual_seed(rank)
    labels = torch.arange(8).repeat(50)
    codes = torch.randn(8, rank, dtype=torch.float64, generator=generator)[labels]
    codes += 0.01 * torch.randn(400, rank, dtype=torch.float64, generator=generator)
    wide = torch.randn(rank, 32, dtype=torch.float64, generator=generator)
    exact = computed(codes, labels)["nc1"]
    narrow = computed(codes @ torch.linalg.qr(wide.T).R.T, labels)["nc1"]
    assert computed(codes @ wide, labels)["nc1"] == pytest.approx(narrow, rel=1e-9)
    assert computed(codes.float() @ wide.float() + 3, labels)["nc1"] == pytest.approx(narrow, rel=1e-4)
    assert computed((codes @ wide).bfloat16(), labels)["nc1"] == pytest.approx(narrow, rel=0.2)
    assert exact == pytest.approx(narrow, rel=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_features_far_from_zero_lose_no_digits(scale):
    features, labels, weight = noisy()
    near = computed(features, labels, weight, parts=3)
    far = computed(scale * features + 1e5, labels, weight, parts=3)
    for name in ("nc1", "nc1_trace_ratio", "nc2_means_etf", "nc3_etf"):
        assert far[name] == pytest.approx(near[name], rel=1e-10 / scale, abs=1e-10 / scale)
    bias = weight @ torch.full((6,), -1e5, dtype=torch.float64)
    assert computed(features + 1e5, labels, weight, bias, parts=3)["nc4"] == near["nc4"] > 0


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_labels_of_any_whole_dtype_are_taken(dtype):
    features, labels, weight = noisy()
    assert computed(features, labels.to(dtype), weight) == computed(features, labels, weight)


def test_data_frames_are_taken():
    features, labels, _ = noisy()
    metric = NeuralCollapse(4)
    metric.update(pd.DataFrame(features.numpy()), pd.Series(labels.numpy()))
    assert float(metric.compute()["nc1"]) == computed(features, labels)["nc1"]


@pytest.mark.parametrize(
    "labels, words",
    [
        (np.array(["a", "b", "c", "d"] * 10), "number the classes from 0"),
        (nn.functional.one_hot(torch.arange(4).repeat(10)), r"argmax\(1\)"),
        (torch.tensor([0.0, 1.0, 2.0, torch.nan] * 10), "whole numbers"),
        (torch.tensor([True, False] * 20), "whole numbers"),
        (torch.tensor([0, 1, 2, -1] * 10), "from 0, got -1"),
        (torch.tensor([0, 1, 2, 255] * 10, dtype=torch.uint8), r"within 0\.\.3, got 0\.\.255"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_anything_is_counted(labels, words):
    features, proper, _ = noisy()
    metric = NeuralCollapse(4)
    with pytest.raises(ValueError, match=words):
        metric.update(features, labels)
    metric.update(features, proper)
    assert float(metric.compute()["nc1"]) == computed(features, proper)["nc1"]


def test_two_classifiers_of_one_collection_keep_their_own_figures():
    features, labels, weight = noisy()
    weights = {"good": weight, "bad": weight.roll(1, 0)}
    collected = MetricCollection({name: NeuralCollapse(4, weight=one) for name, one in weights.items()})
    collected.update(features[:20], labels[:20])
    collected.update(features[20:], labels[20:])
    for metric in collected.values():
        metric.agree(features)
    for name, one in weights.items():
        expected = computed(features, labels, one)
        assert {key: float(collected[name].compute()[key]) for key in expected} == pytest.approx(expected, rel=1e-12)


def test_nc4_is_of_the_latest_means():
    features, labels, weight = noisy()
    metric = NeuralCollapse(4, weight=weight)
    metric.update(features, labels)
    assert metric.compute()["nc4"].isnan()
    metric.agree(features)
    assert float(metric.compute()["nc4"]) == computed(features, labels, weight)["nc4"]
    # Other means: what has been counted beside the earlier ones no longer holds.
    metric.update(features + torch.arange(6), (labels + 1) % 4)
    assert metric.compute()["nc4"].isnan()
    metric.agree(features)
    near = torch.cdist(features, metric.class_means).argmin(1)
    assert float(metric.compute()["nc4"]) == float(((features @ weight.T).argmax(1) != near).double().mean())


@pytest.mark.parametrize("lam", [0.002, 0.01])
def test_6_majority_has_longer_rows_and_shorter_features(lam):
    geometry = frame_geometry([80, 40, 20, 10], lam_w=lam, lam_h=lam)
    assert (geometry.weight_squared.diff() < 0).all() and (geometry.feature_squared.diff() > 0).all()
    found = unconstrained_features([80, 40, 20, 10], 6, lam_w=lam, lam_h=lam, generator=torch.Generator())
    gram = found.product @ found.product.T
    assert float((gram - gram.diag().diag()).abs().max()) < 1e-8


def test_streams_a_loader_through_a_named_layer():
    torch.manual_seed(0)
    features, labels, _ = noisy(dim=5)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4))
    batches = [(features[i : i + 9].float(), labels[i : i + 9]) for i in range(0, 40, 9)]
    metric = NeuralCollapse.from_model(model, batches, "2")
    with torch.no_grad():
        hidden = model[:2](features.float())
        head = model[2]
    expected = computed(hidden, labels, head.weight, head.bias)
    assert {name: float(value) for name, value in metric.compute().items()} == pytest.approx(expected, abs=1e-6)
    assert metric.plot().axes
    with pytest.raises(TypeError, match="is a ReLU"):
        NeuralCollapse.from_model(model, batches, "1")
    with pytest.raises(ValueError, match="no layer 'fc'"):
        NeuralCollapse.from_model(model, batches, "fc")
    with pytest.raises(ValueError, match=r"\(inputs, labels\)"):
        NeuralCollapse.from_model(model, [features.float()], "2")
    with pytest.raises(TypeError, match="is a generator, which is used up"):
        NeuralCollapse.from_model(model, (batch for batch in batches), "2")

    class Once:
        def __init__(self):
            self.left = batches

        def __iter__(self):
            self.left, left = [], self.left
            return iter(left)

    with pytest.raises(ValueError, match="gave 40 samples, and 0 when gone through again"):
        NeuralCollapse.from_model(model, Once(), "2")


def test_each_layer_is_measured_in_one_pass():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    x, labels = torch.randn(40, 6, dtype=torch.float64, generator=generator), torch.arange(4).repeat(10)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    batches = [(x[:25], labels[:25]), (x[25:], labels[25:])]
    found = NeuralCollapse.by_layer(net, batches, ["0", "2"], 4)
    assert len(calls) == 2
    with torch.no_grad():
        for layer, features in (("0", net[0](x)), ("2", net(x))):
            alone = computed(features, labels)
            assert float(found[layer].compute()["nc1"]) == pytest.approx(alone["nc1"], abs=1e-9)
    with pytest.raises(ValueError, match="no layer 'head'"):
        NeuralCollapse.by_layer(net, batches, ["0", "head"], 4)
    with pytest.raises(ValueError, match="inputs, labels"):
        NeuralCollapse.by_layer(net, [x], ["0"], 4)


def test_bad_input_is_one_clear_sentence():
    features, labels, weight = noisy()
    with pytest.raises(ValueError, match="at least 2"):
        NeuralCollapse(1)
    for number in (2.5, "4"):
        with pytest.raises(ValueError, match="at least 2"):
            NeuralCollapse(number)
    with pytest.raises(ValueError, match="a classifier of 3 classes"):
        NeuralCollapse(3, weight=weight)
    for classifier, words in (
        ({"weight": weight * float("nan")}, "weight holds NaN"),
        ({"weight": weight, "bias": torch.zeros(3)}, r"bias is \(4,\)"),
        ({"bias": torch.zeros(4)}, "belongs to a classifier"),
        ({"weight": [torch.zeros(5, 6), weight]}, "does not follow one with 5 outputs"),
        ({"weight": []}, "has no layers"),
    ):
        with pytest.raises(ValueError, match=words):
            NeuralCollapse(4, **classifier)
    with pytest.raises(TypeError, match="real numbers"):
        NeuralCollapse(4).update(features * 1j, labels)
    metric = NeuralCollapse(4, weight=weight)
    with pytest.raises(ValueError, match="NaN"):
        metric.update(features * float("nan"), labels)
    with pytest.raises(ValueError, match=r"within 0\.\.3"):
        metric.update(features, labels + 1)
    with pytest.raises(ValueError, match="whole numbers"):
        metric.update(features, labels.double())
    with pytest.raises(ValueError, match="6 numbers each"):
        metric.update(features[:, :5], labels)
    with pytest.raises(ValueError, match="are the same"):
        metric.update(torch.full((8, 6), 0.1), torch.arange(4).repeat(2))
        metric.compute()
    metric.reset()
    metric.update(features[:20], labels[:20] * 0 + 1)
    with pytest.raises(ValueError, match="no sample of class 0, 2, 3 was seen"):
        metric.compute()
    with pytest.raises(ValueError, match="no sample of class 0, 2, 3 was seen"):
        metric.agree(features)
    metric.reset()
    metric.update(features[:4], labels[:4])
    with pytest.raises(ValueError, match="single sample"):
        metric.compute()
    with pytest.raises(ValueError, match="compares a classifier"):
        NeuralCollapse(4).agree(features)
    for wrong in ({"lam_w": 0.0}, {"depth": 0}, {"rank": 0}):
        with pytest.raises(ValueError):
            frame_geometry([4, 2], **{"lam_w": 0.1, "lam_h": 0.1, **wrong})
    with pytest.raises(ValueError, match="mse or ce"):
        unconstrained_features([4, 2], 3, lam_w=0.1, lam_h=0.1, loss="l1")
    with pytest.raises(ValueError, match="at least two class sizes"):
        unconstrained_features([4], 3, lam_w=0.1, lam_h=0.1)
