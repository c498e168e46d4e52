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
