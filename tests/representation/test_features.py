"""Streaming what a layer gives, and what is taken for features and classes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperworks.representation import layer_features, layers_features
from paperworks.representation.features import as_classes, as_matrix


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Dropout(0.9), nn.Flatten(), nn.Linear(12, 4))


def test_features_are_what_the_layer_gives_in_evaluation():
    net, x, y = model().train(), torch.randn(6, 1, 4, 4), torch.arange(6)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    conv = torch.cat([features for features, _ in layer_features(net, batches, "0")])
    head = [(features, labels) for features, labels in layer_features(net, batches, "3", side="input")]
    assert net.training
    torch.testing.assert_close(conv, net[0](x).flatten(1))
    torch.testing.assert_close(torch.cat([features for features, _ in head]), conv)
    assert torch.cat([labels for _, labels in head]).tolist() == y.tolist()


def test_batches_without_labels():
    assert [labels for _, labels in layer_features(model(), [torch.randn(2, 1, 4, 4)], "3")] == [None]


def test_hook_is_gone_when_the_reader_stops_early():
    net = model()
    reader = layer_features(net, [torch.randn(2, 1, 4, 4)] * 3, "0")
    next(reader)
    reader.close()
    assert not net[0]._forward_hooks and net.training


def test_bad_layers_are_one_sentence():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.unused = nn.LSTM(2, 3), nn.Linear(1, 1)

        def forward(self, x):
            return self.lstm(x)[0]

    x = [torch.randn(4, 5, 2)]
    with pytest.raises(ValueError, match="no layer 'lst': it has lstm"):
        next(layer_features(Pair(), x, "lst"))
    with pytest.raises(ValueError, match="'unused' did not run"):
        next(layer_features(Pair(), x, "unused"))
    with pytest.raises(TypeError, match="is a tuple, not a tensor"):
        next(layer_features(Pair(), x, "lstm"))
    with pytest.raises(TypeError, match="got dict: let the loader give"):
        next(layer_features(Pair(), [{"x": x[0]}], "lstm"))

    class Mean(nn.Module):
        def forward(self, x):
            return x.mean()

    with pytest.raises(TypeError, match="is a single number"):
        next(layer_features(nn.Sequential(Mean()), x, "0"))


@pytest.mark.parametrize("side", ["input", "output"])
def test_what_is_changed_in_place_is_told_as_it_was(side):
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    (features, _), *_ = layer_features(net, [x], "0" if side == "output" else "1", side=side)
    assert torch.equal(features, net[0](x)) and bool((features < 0).any())


def test_each_module_keeps_its_own_mode_between_batches_and_after():
    net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    net[1].eval()
    reader = layers_features(net, [torch.randn(4, 3)] * 2, ["2"])
    for _ in range(2):
        next(reader)
        assert [module.training for module in net.modules()] == [True, True, False, True]
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    reader.close()
    assert [module.training for module in net.modules()] == [True, True, False, True]


def test_a_probe_can_be_trained_on_features():
    (features, _), *_ = layer_features(nn.Linear(3, 2), [torch.randn(4, 3)], "")
    probe = nn.Linear(2, 1)
    probe(features).sum().backward()
    assert probe.weight.grad is not None and not features.requires_grad


def test_keywords_one_number_a_sample_and_longer_batches():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x):
            return self.layer(input=x.sum(1))

    x, y = torch.ones(4, 3), torch.arange(4)
    features, labels = next(layer_features(Keywords(), [(x, y, "more")], "layer", side="input"))
    assert features.tolist() == [[3.0]] * 4 and labels is y
    assert next(layer_features(Keywords(), [(x,)], "layer"))[1] is None


def test_odd_numbers_are_one_sentence():
    assert as_matrix([[1, 2], [3, 4]], "X").dtype == torch.float64
    for values, error, words in (
        ([["a", "b"]], TypeError, "X is list: give real numbers"),
        (None, TypeError, "X is NoneType"),
        (torch.ones(2), ValueError, r"X has shape \(2,\)"),
        (torch.tensor([[float("inf")]]), ValueError, "X holds NaN or infinity"),
    ):
        with pytest.raises(error, match=words):
            as_matrix(values, "X")
    assert as_classes([0, 2], 2).tolist() == [0, 2]
    with pytest.raises(ValueError, match="got list"):
        as_classes(["a", "b"], 2)
