"""Streaming what a layer gives, and what is taken for features and classes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from paperworks.representation import layer_features, layers_features
from paperworks.representation.features import as_classes, as_matrix, as_numbers, evaluated, named_layer, to_device_of


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


def test_batches_that_are_lists_as_a_data_loaders_are_pairs():
    x, y = torch.ones(4, 3), torch.arange(4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    features, labels = next(layer_features(nn.Identity(), loader, ""))
    assert torch.equal(features, x) and torch.equal(labels, y)
    for batch in ((), []):
        with pytest.raises(TypeError, match="let the loader give"):
            next(layer_features(nn.Identity(), [batch], ""))


def test_axes_behind_the_first_are_flattened_and_each_layer_is_told_in_the_order_asked_for():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 5))
    x = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    (head, conv), labels = next(layers_features(net, [x], ["2", "0"]))
    assert head.shape == (3, 5) and labels is None
    assert torch.equal(conv, net[0](x).reshape(3, 8)) and torch.equal(head, net(x))


def test_of_a_layer_that_runs_twice_the_last_run_is_told():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = nn.Linear(2, 2)

        def forward(self, x):
            return self.add(self.add(x))

    net, x = Twice(), torch.ones(3, 2)
    (features, _), *_ = layer_features(net, [x], "add")
    assert torch.equal(features, net(x))
    (features, _), *_ = layer_features(net, [x], "add", side="input")
    assert torch.equal(features, net.add(x))


def test_an_error_leaves_each_module_in_its_mode():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).train()
    net[0].eval()
    with pytest.raises(RuntimeError), evaluated(net):
        assert not any(module.training for module in net.modules()) and not torch.is_grad_enabled()
        net(torch.ones(3, 5))
    assert [module.training for module in net.modules()] == [True, False, True] and torch.is_grad_enabled()
    with evaluated("no module"):
        assert not torch.is_grad_enabled()


def test_tensors_go_where_the_modules_weights_are():
    value = torch.ones(2, 2)
    assert to_device_of(nn.Linear(2, 2, device="meta"), value).device.type == "meta"
    assert to_device_of(nn.ReLU(), value) is value and to_device_of("no module", value) is value
    labels = ["a", "b"]
    assert to_device_of(nn.Linear(2, 2, device="meta"), labels) is labels
    net = nn.Linear(2, 2, device="meta")
    (features, told), *_ = layer_features(net, [(value, torch.arange(2))], "")
    assert features.device.type == told.device.type == "meta"


def test_layers_of_like_names_are_offered_and_else_the_first_ones():
    net = nn.ModuleDict({name: nn.Identity() for name in ("alpha", "beta", "gamma", "delta", "epsilon", "zeta")})
    assert named_layer(net, "beta") is net["beta"]
    for name, offered in (("xyz", "alpha, beta, gamma, delta, epsilon and"), ("alp", "alpha and")):
        with pytest.raises(ValueError, match=f"no layer '{name}': it has {offered}"):
            named_layer(net, name)
    blocks = nn.ModuleDict({f"block{number}": nn.Identity() for number in range(9)})
    with pytest.raises(ValueError, match=r"it has (block\d, ){2}block\d and others"):
        named_layer(blocks, "blocks")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_numbers_keep_their_dtype_and_matrices_are_in_float64_and_of_no_gradient(dtype):
    values = torch.tensor([[1, 0], [1, 1]], dtype=dtype)
    assert as_numbers(values, "X").dtype == dtype
    assert as_matrix(values, "X").dtype == torch.float64 and as_matrix(values, "X").tolist() == [[1, 0], [1, 1]]
    assert not as_matrix(torch.ones(2, 2, requires_grad=True), "X").requires_grad
    with pytest.raises(TypeError, match=r"X is torch\.complex64 of"):
        as_matrix(values.to(torch.complex64), "X")
    with pytest.raises(ValueError, match="NaN or infinity"):
        as_matrix(torch.tensor([[1.0, torch.nan]]), "X")
    read_only = np.ones((2, 2))
    read_only.flags.writeable = False
    as_numbers(read_only, "X").add_(1)
    assert (read_only == 1).all()


def test_classes_are_whole_numbers_from_0_one_a_sample():
    assert as_classes(torch.tensor([2, 0, 1], dtype=torch.uint8), 3).dtype == torch.int64
    assert as_classes(torch.zeros(0, dtype=torch.int64), 0).shape == (0,)
    for labels, words in (
        (torch.tensor([0, -1, 2]), "from 0, got -1"),
        (torch.tensor([0.0, 1.0, 2.0]), r"got torch\.float32 of"),
        (torch.tensor([0, 1, 2], dtype=torch.complex64), r"got torch\.complex64 of"),
        (np.array([True, False, True]), "got bool of"),
        (torch.tensor([0, 1]), r"got \(2,\): give one for each row"),
        (torch.eye(3, dtype=torch.int64), r"got \(3, 3\): take argmax\(1\)"),
    ):
        with pytest.raises(ValueError, match=words):
            as_classes(labels, 3)
