"""Parts of networks that several rooms need."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperworks.nn import pack_linears, packed_scorer


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_packed_layers_give_the_same_products(rows, bias):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 40, bias=bias), nn.SiLU(), nn.Linear(40, 7, bias=bias))
    x = torch.randn(2, rows, 24)
    with torch.inference_mode():
        expected = plain.double()(x.double())
        actual = pack_linears(plain.float())(x)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_gradients_flow_through_packed_layers_as_before():
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    x = torch.randn(4, 6, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    (actual,) = torch.autograd.grad(pack_linears(layer)(x).square().sum(), x)
    torch.testing.assert_close(actual, expected)


def test_other_types_and_subclasses_are_left_alone():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (nn.Linear(4, 4).double(), Doubled(4, 4), nn.Linear(4, 4, device="meta")):
        pack_linears(layer)
        assert "forward" not in vars(layer)


def test_parameters_and_state_are_unchanged():
    layer = nn.Linear(4, 4)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert pack_linears(layer) is layer and list(layer.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_a_copy_and_another_dtype_take_their_own_weights():
    torch.manual_seed(0)
    layer = pack_linears(nn.Sequential(nn.Linear(64, 32)).to(torch.bfloat16))
    other = copy.deepcopy(layer).float()
    nn.init.zeros_(other[0].weight)
    x = torch.randn(3, 64)
    with torch.inference_mode():
        assert torch.equal(other(x), other[0].bias.expand(3, -1))
        assert float(layer(x.to(torch.bfloat16)).float().std()) > 0.1
        assert torch.equal(layer.float()(x), F.linear(x, layer[0].weight, layer[0].bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_packed_scorer_multiplies_by_the_rows(dtype):
    torch.manual_seed(0)
    rows, x = torch.randn(50, 16, dtype=dtype), torch.randn(2, 3, 16, dtype=dtype)
    with torch.inference_mode():
        assert torch.allclose(
            packed_scorer(rows)(x), x @ rows.T, rtol=1e-2, atol=1e-2 if dtype == torch.bfloat16 else 1e-5
        )
