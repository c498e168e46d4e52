"""Parts of networks that several rooms need."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiplies_bfloat16(device: torch.device | str) -> bool:
    """Whether `device` multiplies bfloat16 in hardware; where it does not, float32 is faster.

    Example:
        >>> multiplies_bfloat16("meta")
        False
    """
    match torch.device(device).type:
        case "cuda":
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
        case "cpu":
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        case _:
            return False


def pack_linears(model: nn.Module) -> nn.Module:
    """Lay out the weights of a frozen model's linear layers once for oneDNN, in place, so that few tokens cost little.

    A product with 2 to 32 rows otherwise rearranges the whole weight matrix at every call, which on a CPU costs more
    than the product itself. Results change by rounding only. It takes the memory of the weights once more. Where
    gradients are wanted, in a deep copy, or once the model is brought to another dtype, the layers work as before; layers
    not on a CPU, or not in float32 or bfloat16, are left alone.

    Args:
        model: A model whose weights will not change any more.

    Returns:
        The same model.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = pack_linears(nn.Sequential(nn.Linear(8, 4)))
        >>> x = torch.ones(2, 8)
        >>> bool(torch.allclose(model(x), model[0](x), atol=1e-6))
        True
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return model
    for layer in model.modules():
        if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
            continue
        if layer.weight.device.type == "cpu" and layer.weight.dtype in (torch.float32, torch.bfloat16):
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), None)
            layer.forward = _PackedForward(layer, weight)  # type: ignore[method-assign, assignment]
    return model


def packed_scorer(rows: Tensor, bias: Tensor | None = None) -> nn.Module:
    """Scores x -> x rows^T + bias of frozen `rows` (n, d) and `bias` (n,), laid out as `pack_linears` does.

    Example:
        >>> packed_scorer(torch.eye(2))(torch.ones(1, 2)).tolist()
        [[1.0, 1.0]]
    """
    scorer = nn.Linear(rows.shape[1], rows.shape[0], bias=False, device="meta")
    scorer.weight = nn.Parameter(rows, requires_grad=False)
    if bias is not None:
        scorer.bias = nn.Parameter(bias, requires_grad=False)
    return pack_linears(scorer)


class _PackedForward:
    """A layer's forward by its packed weight; a deep copy of the layer gets its own forward back."""

    def __init__(self, layer: nn.Linear, weight: Tensor) -> None:
        self.layer, self.weight = layer, weight

    def __call__(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or x.dtype != self.weight.dtype or not x.numel():
            return F.linear(x, self.layer.weight, self.layer.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.layer.bias, "none", [], "")
        return product

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[[Tensor], Tensor]:
        return MethodType(nn.Linear.forward, copy.deepcopy(self.layer, memo))


class FlatNetwork:
    """A network as a function of one vector of weights, so that many networks of one shape run at once.

    Args:
        module: Any module whose `forward` takes one tensor; its own weights stay as they are, and buffers are constants.

    Attributes:
        size: Number of weights d.
        shapes: Shape of each weight by name, in the order in which they lie in the vector.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> network = FlatNetwork(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)))
        >>> network.size, network(torch.randn(5, network.size), torch.ones(7, 3)).shape
        (26, torch.Size([5, 7, 2]))
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.shapes = {name: weight.shape for name, weight in module.named_parameters()}
        self.size = sum(shape.numel() for shape in self.shapes.values())
        self._buffers = dict(module.named_buffers())

    @property
    def weights(self) -> Tensor:
        """The module's own weights as one vector (d,)."""
        return torch.cat([weight.detach().reshape(-1) for weight in self.module.parameters()])

    def named(self, weights: Tensor) -> dict[str, Tensor]:
        """Vectors (..., d) as weights by name, (..., *shape)."""
        parts = torch.split(weights, [shape.numel() for shape in self.shapes.values()], dim=-1)
        return {
            name: part.reshape(*weights.shape[:-1], *shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def __call__(self, weights: Tensor, x: Tensor) -> Tensor:
        """Outputs (..., n, outputs) of inputs x (n, inputs) for each vector of weights (..., d)."""
        if weights.shape[-1] != self.size:
            raise ValueError(f"this network has {self.size} weights, got vectors of {weights.shape[-1]}")

        def one(flat: Tensor) -> Tensor:
            found: Tensor = torch.func.functional_call(self.module, (self.named(flat), self._buffers), (x,))
            return found

        if weights.ndim == 1:
            return one(weights)
        found: Tensor = torch.func.vmap(one)(weights.reshape(-1, self.size))
        return found.reshape(*weights.shape[:-1], *found.shape[1:])
