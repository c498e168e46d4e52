"""Streaming what a layer gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paperworks.representation import layer_features


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
